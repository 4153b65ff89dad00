"""The eight published sizes: shape, schedule, where the weights are, and what their authors report.

Everything here is a value of DEIMv2's paper, README or recipe files (arXiv 2509.20787, repository
Intellindust-AI-Lab/DEIMv2 at 0fff8d4); nothing was measured by this project. Two published values are known
to mislead and are given as the weights were really trained: S and M take the transformer's blocks 3, 7, 11
(the hub's files say 5, 8, 11), and the lite sizes use SiLU throughout (the hub's files leave it out).
"""

from __future__ import annotations

__all__ = ["VARIANTS", "Reported", "Variant", "get_variant"]

from dataclasses import dataclass, replace

from thawline.errors import ConfigError, did_you_mean
from thawline.models.deimv2.config import CriterionConfig, DEIMv2Config
from thawline.models.deimv2.network.decoder import DecoderConfig
from thawline.models.deimv2.network.hgnetv2 import HGNetV2Config, StageConfig
from thawline.models.deimv2.network.hybrid_encoder import HybridEncoderConfig
from thawline.models.deimv2.network.lite_encoder import LiteEncoderConfig
from thawline.models.deimv2.network.sta import AdaptedViTConfig
from thawline.models.deimv2.network.vit import ViTConfig
from thawline.models.deimv2.published import PUBLISHED
from thawline.recipe.resolved import TrainingSettings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
B0_WEIGHTS = "PPHGNetV2_B0_stage1.pth"


@dataclass(frozen=True)
class Reported:
    """Figures that the authors publish for a size."""

    coco_ap: float
    """AP at IoU 0.50 … 0.95 on COCO val2017, percent."""
    params_m: float
    gflops: float
    """Without the products inside the transformer's attention, which are as much again for S to X."""
    t4_latency_ms: float
    """TensorRT, fp16, batch 1, on an NVIDIA T4."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One published size."""

    config: DEIMv2Config
    schedule: TrainingSettings
    """Settings that the published weights were trained with."""
    weights_id: str
    """The authors' repository on the Hugging Face hub."""
    backbone_weights: str
    """File of the pretrained backbone that training started from."""
    reported: Reported


def get_variant(name: str) -> Variant:
    """Return the size called `name`.

    Raises: ConfigError: there is none.
    """
    if name not in VARIANTS:
        raise ConfigError(f"Unknown variant '{name}'. {did_you_mean(name, VARIANTS)}")
    return VARIANTS[name]


def _variant(config: DEIMv2Config, family: str, backbone_weights: str, reported: Reported) -> Variant:
    """Complete a size with what its published training settings and its name determine."""
    name = str(config.variant)
    schedule = PUBLISHED[name]
    config = replace(
        config,
        image_size=schedule.height_width,
        criterion=replace(config.criterion, matcher_change_epoch=schedule.matcher_change_epoch),
    )
    return Variant(
        config=config,
        schedule=schedule,
        weights_id=f"Intellindust/DEIMv2_{family}_{name.upper()}_COCO",
        backbone_weights=backbone_weights,
        reported=reported,
    )


def _hgnetv2(*later: StageConfig) -> HGNetV2Config:
    """Return B0 or a pruning of it: its first two stages, then `later`, whose outputs are taken."""
    first = StageConfig(in_channels=16, mid_channels=16, out_channels=64, downsample=False)
    second = StageConfig(in_channels=64, mid_channels=32, out_channels=256)
    return HGNetV2Config(stages=(first, second, *later), out_stages=tuple(range(2, 2 + len(later))))


def _third_stage(out_channels: int, n_blocks: int = 1, kernel_size: int = 5) -> StageConfig:
    return StageConfig(
        in_channels=256, mid_channels=64, out_channels=out_channels, n_blocks=n_blocks, light=True,
        kernel_size=kernel_size,
    )  # fmt: skip


def _lite(
    name: str, third: StageConfig, dim: int, *, num_queries: int, ffn_dim: int, reported: Reported
) -> Variant:
    config = DEIMv2Config(
        variant=name,
        backbone=_hgnetv2(third),
        encoder=LiteEncoderConfig(hidden_dim=dim),
        decoder=DecoderConfig(
            hidden_dim=dim, num_layers=3, num_queries=num_queries, num_points=(4, 2), ffn_dim=ffn_dim,
            gateway=False, share_bbox_head=True,
        ),
        criterion=CriterionConfig(local=False, union_set=False),
    )  # fmt: skip
    return _variant(config, "HGNetv2", B0_WEIGHTS, reported)


_FOURTH_STAGE = StageConfig(in_channels=512, mid_channels=128, out_channels=1024, light=True, kernel_size=5)
_NANO = DEIMv2Config(
    variant="n",
    backbone=_hgnetv2(_third_stage(512, n_blocks=2), _FOURTH_STAGE),
    encoder=HybridEncoderConfig(hidden_dim=128, ffn_dim=512, expansion=0.34, n_blocks=2, trailing_conv=True),
    decoder=DecoderConfig(hidden_dim=128, num_layers=3, num_points=(6, 6), ffn_dim=512),
)


def _vit_tiny(dim: int) -> ViTConfig:
    return ViTConfig(
        family="vit_tiny", dim=dim, num_heads=dim // 64, hidden_dim=4 * dim, out_blocks=(3, 7, 11)
    )


_DINOV3 = ViTConfig(
    family="dinov3", dim=384, num_heads=6, hidden_dim=1536, out_blocks=(5, 8, 11), n_storage_tokens=4,
    norm_eps=1e-5, layer_scale=1e-5, mask_key_bias=True, final_norm=True, rope_rescale=2.0,
)  # fmt: skip


def _with_vit(
    name: str, vit: ViTConfig, dim: int, *, detail_channels: int, encoder_ffn: int, expansion: float,
    n_blocks: int, ffn_dim: int, num_layers: int = 4, weights: str, reported: Reported,
) -> Variant:  # fmt: skip
    config = DEIMv2Config(
        variant=name,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        backbone=AdaptedViTConfig(vit=vit, detail_channels=detail_channels, out_channels_each=dim),
        encoder=HybridEncoderConfig(
            hidden_dim=dim, ffn_dim=encoder_ffn, expansion=expansion, n_blocks=n_blocks
        ),
        decoder=DecoderConfig(hidden_dim=dim, num_layers=num_layers, num_points=(3, 6, 3), ffn_dim=ffn_dim),
    )
    return _variant(config, "DINOv3", weights, reported)


_SIZES = (
    _lite(
        "atto", _third_stage(256, kernel_size=3), 64, num_queries=100, ffn_dim=160,
        reported=Reported(23.8, 0.49, 0.76, 1.10),
    ),
    _lite(
        "femto", _third_stage(512), 96, num_queries=150, ffn_dim=256,
        reported=Reported(31.0, 0.96, 1.67, 1.45),
    ),
    _lite(
        "pico", _third_stage(512, n_blocks=2), 112, num_queries=200, ffn_dim=320,
        reported=Reported(38.5, 1.51, 5.15, 2.13),
    ),
    _variant(_NANO, "HGNetv2", B0_WEIGHTS, Reported(43.0, 3.57, 6.86, 2.32)),
    _with_vit(
        "s", _vit_tiny(192), 192, detail_channels=16, encoder_ffn=512, expansion=0.34, n_blocks=2,
        ffn_dim=512, weights="vitt_distill.pt", reported=Reported(50.9, 9.71, 25.62, 5.78),
    ),
    _with_vit(
        "m", _vit_tiny(256), 256, detail_channels=16, encoder_ffn=512, expansion=0.67, n_blocks=3,
        ffn_dim=512, weights="vittplus_distill.pt", reported=Reported(53.0, 18.11, 52.20, 8.80),
    ),
    _with_vit(
        "l", _DINOV3, 224, detail_channels=32, encoder_ffn=896, expansion=1.0, n_blocks=3, ffn_dim=1792,
        weights="dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
        reported=Reported(56.0, 32.18, 96.32, 10.47),
    ),
    _with_vit(
        "x", replace(_DINOV3, ffn="swiglu"), 256, detail_channels=64, encoder_ffn=1024, expansion=1.25,
        n_blocks=4, num_layers=6, ffn_dim=2048,
        weights="dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
        reported=Reported(57.8, 50.26, 151.6, 13.75),
    ),
)  # fmt: skip
VARIANTS: dict[str, Variant] = {str(size.config.variant): size for size in _SIZES}
"""By name, small to large."""
