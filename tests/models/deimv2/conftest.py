"""Detectors small enough to test with, of both families, and the authors' numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

from thawline.models.deimv2.config import CriterionConfig, DEIMv2Config, with_overrides
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.network.decoder import DecoderConfig
from thawline.models.deimv2.network.hgnetv2 import HGNetV2Config, StageConfig
from thawline.models.deimv2.network.hybrid_encoder import HybridEncoderConfig
from thawline.models.deimv2.network.lite_encoder import LiteEncoderConfig
from thawline.models.deimv2.network.sta import AdaptedViTConfig
from thawline.models.deimv2.network.vit import ViTConfig
from thawline.models.deimv2.outputs import DetectionOutput

STAGES = (
    StageConfig(in_channels=4, mid_channels=4, out_channels=6, downsample=False, n_layers=2),
    StageConfig(in_channels=6, mid_channels=5, out_channels=8, n_layers=2),
    StageConfig(in_channels=8, mid_channels=6, out_channels=12, n_blocks=2, light=True, kernel_size=5),
)
LITE = DEIMv2Config(
    num_classes=5,
    image_size=(64, 64),
    backbone=HGNetV2Config(stem_channels=(3, 4, 4), stages=STAGES, out_stages=(2,)),
    encoder=LiteEncoderConfig(hidden_dim=16),
    decoder=DecoderConfig(
        hidden_dim=16, num_layers=2, num_queries=7, num_points=(4, 2), ffn_dim=24, gateway=False,
        share_bbox_head=True
    ),
    num_denoising=6,
    criterion=CriterionConfig(local=False, union_set=False),
)  # fmt: skip
DINO = DEIMv2Config(
    num_classes=5,
    image_size=(64, 64),
    backbone=AdaptedViTConfig(
        vit=ViTConfig(
            family="dinov3", dim=16, num_heads=2, depth=3, hidden_dim=24, ffn="swiglu", out_blocks=(0, 1, 2),
            n_storage_tokens=2, norm_eps=1e-5, layer_scale=0.5, mask_key_bias=True, final_norm=True,
            rope_rescale=2.0,
        ),
        detail_channels=4,
        out_channels_each=16,
    ),
    encoder=HybridEncoderConfig(hidden_dim=16, ffn_dim=24, expansion=0.5, n_blocks=1, num_heads=4),
    decoder=DecoderConfig(hidden_dim=16, num_layers=3, num_queries=9, num_points=(3, 6, 3), ffn_dim=20),
    num_denoising=6,
)  # fmt: skip
TINY = with_overrides(
    DINO,
    {
        "vit": ViTConfig(
            family="vit_tiny", dim=16, num_heads=2, depth=3, hidden_dim=24, out_blocks=(0, 1, 2)
        ),
        "num_classes": 4,
    },
)
HGNET = with_overrides(
    LITE,
    {
        "backbone": {"out_stages": (1, 2)},
        "encoder": HybridEncoderConfig(
            hidden_dim=16, ffn_dim=24, expansion=0.5, n_blocks=1, trailing_conv=True, num_heads=4
        ),
        "decoder": {"num_points": (6, 6), "gateway": True, "share_bbox_head": False},
    },
)
SHAPES = {"lite": LITE, "hgnet": HGNET, "tiny": TINY, "dino": DINO}


@pytest.fixture(params=SHAPES)
def tiny_config(request: pytest.FixtureRequest) -> DEIMv2Config:
    """A config of every kind of part."""
    return SHAPES[request.param]


@pytest.fixture
def build() -> Callable[..., DEIMv2]:
    """A small detector of a kind ("lite", "hgnet", "tiny", "dino"), in eval mode."""

    def build_one(kind: str, **overrides: Any) -> DEIMv2:
        return DEIMv2(with_overrides(SHAPES[kind], overrides)).eval()

    return build_one


@pytest.fixture(scope="session")
def assert_same_detections() -> Callable[..., None]:
    """Assert that two networks give each image the same queries, in any order.

    Queries come in the order of their scores, which rounding swaps where two are nearly equal.
    """

    def check(got: DetectionOutput, expected: DetectionOutput, **tolerance: float) -> None:
        first, second = (torch.cat([out.logits, out.pred_boxes], dim=-1) for out in (got, expected))
        assert first.shape == second.shape
        for one, other in zip(first, second, strict=True):
            rows, partners = linear_sum_assignment(torch.cdist(one, other, p=1).numpy())
            assert_close(one[rows], other[partners], **tolerance)

    return check


@pytest.fixture(scope="session")
def official(shared: Path) -> ModuleType:
    """The module that rebuilds the weights with which the authors' numbers were made."""
    path = shared / "fixtures" / "deimv2" / "official_weights.py"
    spec = importlib.util.spec_from_file_location("official_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
