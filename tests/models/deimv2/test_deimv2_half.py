"""Detectors converted to bfloat16 or float16: the same boxes as in float32, as far as 8 or 11 bits go."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from thawline.inference import Detector
from thawline.models.deimv2.loss.criterion import Criterion
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.outputs import DetectionOutput
from thawline.ops.boxes import box_iou, cxcywh_to_xyxy

SIZES = ("atto", "femto", "pico", "n", "s", "m", "l", "x")


def trained_like(name: str, **settings: object) -> DEIMv2:
    """A model with real statistics whose box heads move boxes; all tokens are queries, so no tie decides."""
    torch.manual_seed(0)
    if name in ("s", "m", "l", "x"):
        settings["backbone"] = {"vit": {"depth": 3, "out_blocks": (0, 1, 2)}}
    model = DEIMv2.from_variant(name, num_classes=3, image_size=(64, 96), **settings).eval()
    with torch.no_grad():
        for head in (model.decoder.pre_bbox_head, *model.decoder.dec_bbox_head):
            nn.init.normal_(head.layers[-1].weight, std=0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(torch.rand(4, 3, 64, 96))
    return model.eval()


def distance(got: DetectionOutput, want: DetectionOutput) -> tuple[float, float]:
    """Mean of 1 - IoU of each box with the nearest one of `want`, and of the difference of their scores."""
    boxes, expected = (cxcywh_to_xyxy(output.pred_boxes[0]) for output in (got, want))
    overlap, nearest = box_iou(boxes[:, None], expected[None]).max(dim=1)
    scores, expected_scores = got.logits[0].sigmoid(), want.logits[0].sigmoid()
    return (1 - overlap).mean().item(), (scores - expected_scores[nearest]).abs().mean().item()


@pytest.mark.parametrize("name", SIZES)
def test_half_precision_is_as_close_to_float32_as_autocast_is(name: str) -> None:
    model = trained_like(name)
    pixels = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        want = model(pixels)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                usual = distance(model(pixels), want)
            assert usual[0] < 0.25
            for form in (model, model.fuse()):
                got = deepcopy(form).to(dtype)(pixels)  # pixels in float32: the network converts them
                assert got.logits.dtype == got.pred_boxes.dtype == torch.float32
                for ours, theirs in zip(distance(got, want), usual, strict=True):
                    assert ours < 2 * theirs


def test_constants_of_the_boxes_keep_float32() -> None:
    model = trained_like("l").bfloat16()
    assert model.backbone.vit.rope_embed.periods.dtype == torch.float32
    assert model.fuse().decoder.edges.dtype == torch.float32
    assert model.state_dict()["decoder.enc_score_head.weight"].dtype == torch.bfloat16
    assert model.double().backbone.vit.rope_embed.periods.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_detector_of_half_precision_takes_images(dtype: torch.dtype) -> None:
    model = trained_like("atto")
    image = np.random.default_rng(0).integers(0, 255, (50, 80, 3)).astype(np.uint8)
    want = Detector(deepcopy(model), device="cpu", threshold=0.0)(image)
    for form in (deepcopy(model).to(dtype), model.fuse().to(dtype)):
        found = Detector(form, device="cpu", threshold=0.0)(image)
        assert found.xyxy.dtype == want.xyxy.dtype
        assert abs(found.confidence[0] - want.confidence[0]) < 0.01


@pytest.mark.parametrize("name", ["atto", "s"])
def test_losses_of_a_bfloat16_detector_are_finite_and_have_gradients(name: str) -> None:
    model = trained_like(name, num_denoising=4).bfloat16().train()
    targets = [{"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6] * 4])}]
    terms = Criterion(model.config)(model(torch.rand(1, 3, 64, 96), targets), targets, epoch=0)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
