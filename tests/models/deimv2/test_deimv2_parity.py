"""The same numbers as the authors' own network, from the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thawline.models.deimv2 import DEIMv2

SIZES = ["pico", "n", "s", "l"]
# The authors' postprocessor gives COCO's category ids, ours the class index: ids skip ten numbers.
COCO_IDS = torch.tensor(sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(size: str, official: ModuleType) -> DEIMv2:
    """In float64, with the weights that the numbers were made with."""
    torch.set_default_dtype(torch.float64)
    try:
        model = DEIMv2.from_variant(size).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    weights = official.state_dict(size)
    model.load_state_dict(weights, strict=True)
    # Exactly, in float64; a head that layers share keeps the last of its names, as in the authors' loader.
    for key, value in model.state_dict().items():
        if key in weights and "dec_bbox_head" not in key:
            assert torch.equal(value, weights[key]), key
    return model


def expected(shared: Path, name: str) -> dict[str, Tensor]:
    arrays = np.load(shared / "fixtures" / "deimv2" / f"{name}.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


# The reference is stored in float32: half a unit in the last place of a logit of 3 is 1.2e-7.
def close(ours: Tensor, theirs: Tensor, atol: float = 1e-6) -> None:
    assert_close(ours, theirs.double(), rtol=0, atol=atol)


def test_a_square_image_gives_the_authors_logits_boxes_and_detections(
    size: str, model: DEIMv2, official: ModuleType, shared: Path
) -> None:
    wanted = expected(shared, size)
    with torch.no_grad():
        output = model(official.eval_image(size))
        detected = model.postprocess(output, [(360, 480)])[0]
    close(output.logits[0], wanted["logits"])
    close(output.pred_boxes[0], wanted["boxes"])
    close(detected["scores"], wanted["pp_scores"])
    close(detected["boxes"], wanted["pp_boxes"], atol=5e-4)  # pixels, stored in float32
    assert torch.equal(COCO_IDS[detected["labels"]], wanted["pp_labels"])


def test_a_batch_of_wide_images_gives_the_authors_logits_and_boxes(
    size: str, model: DEIMv2, official: ModuleType, shared: Path
) -> None:
    wanted = expected(shared, f"{size}_320x480")
    with torch.no_grad():
        output = model(official.wide_images())
    close(output.logits, wanted["logits"])
    close(output.pred_boxes, wanted["boxes"])


def test_fused_in_float32_changes_nothing_beyond_a_hundred_thousandth(
    size: str, model: DEIMv2, official: ModuleType, assert_same_detections: Callable[..., None]
) -> None:
    narrow = copy.deepcopy(model).float()
    image = official.eval_image(size).float()
    with torch.no_grad():
        expected, got = narrow(image), narrow.fuse()(image)
    assert_same_detections(got, expected, rtol=0, atol=1e-5)
