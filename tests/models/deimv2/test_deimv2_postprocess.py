"""Post-processing on tensors made by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from thawline.errors import ConfigError
from thawline.models.deimv2.postprocess import postprocess


def test_best_pairs_come_first_in_pixels_of_the_original() -> None:
    logits = torch.tensor([[[-1.0, 3.0, -5.0], [2.0, 0.5, -4.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.1]]])
    (found,) = postprocess(logits, boxes, [(100, 200)], max_detections=3)
    assert found["labels"].tolist() == [1, 0, 1]
    assert_close(found["scores"], torch.tensor([3.0, 2.0, 0.5]).sigmoid())
    first, second = torch.tensor([80.0, 30.0, 120.0, 70.0]), torch.tensor([0.0, 70.0, 100.0, 80.0])
    assert_close(found["boxes"], torch.stack([first, second, second]))


@pytest.mark.parametrize("num_classes", [1, 2, 400])
def test_any_number_of_classes(num_classes: int) -> None:
    found = postprocess(torch.randn(2, 5, num_classes), torch.rand(2, 5, 4), [(30, 40), (50, 60)])
    for image in found:
        assert len(image["scores"]) == min(300, 5 * num_classes)
        assert (image["scores"].diff() <= 0).all()
        assert image["labels"].max() < num_classes


def test_boxes_are_neither_clipped_nor_dropped() -> None:
    (found,) = postprocess(torch.zeros(1, 1, 1), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), [(10, 20)])
    assert_close(found["boxes"], torch.tensor([[-10.0, -5.0, 10.0, 5.0]]))


def test_sizes_must_be_one_pair_per_image() -> None:
    with pytest.raises(ConfigError, match="each of 2 images"):
        postprocess(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), [(10, 20)])
