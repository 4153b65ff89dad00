"""The deployed form: fewer, leaner layers, the same detections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from thawline.models.deimv2.model import DEIMv2

# Parameters of the authors' deployed graphs, which leave the backbone unfolded.
DEPLOYED = {
    "atto": 494_159,
    "femto": 962_311,
    "pico": 1_514_285,
    "n": 3_571_527,
    "s": 9_707_403,
    "m": 18_106_355,
    "l": 32_178_043,
    "x": 50_260_163,
}


def randomised(name: str) -> DEIMv2:
    """A model whose norms and scales are not at their trivial start."""
    torch.manual_seed(0)
    model = DEIMv2.from_variant(name).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    return model


@pytest.mark.parametrize("name", DEPLOYED)
def test_fused_model_gives_the_same_detections_with_no_more_parameters_than_the_authors(name: str) -> None:
    model = randomised(name).double()
    fused = model.fuse()
    assert sum(p.numel() for p in fused.parameters()) <= DEPLOYED[name]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())  # the original stays
    pixels = torch.rand(2, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        expected, got = model(pixels), fused(pixels)
    # Not to the last digits: parts of the network compute in float32 in either form.
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-5)


def test_fused_in_float32_stays_within_a_hundred_thousandth(
    assert_same_detections: Callable[..., None],
) -> None:
    model = randomised("atto")
    pixels = torch.rand(1, 3, 320, 320)
    with torch.no_grad():
        expected, got = model(pixels), model.fuse()(pixels)
    assert_same_detections(got, expected, atol=1e-5, rtol=1e-5)


def test_a_fused_model_has_nothing_left_to_fuse_or_train() -> None:
    fused = randomised("atto").fuse()
    assert fused.fuse() is fused
    assert not any(p.requires_grad for p in fused.parameters())
