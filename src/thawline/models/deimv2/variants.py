"""The eight published sizes: shape, schedule, where the weights are, and what their authors report.

Everything here is a value of DEIMv2's paper, README or recipe files (arXiv 2509.20787, repository
Intellindust-AI-Lab/DEIMv2 at 0fff8d4); nothing was measured by this project. Two published values are known
to mislead and are given as the weights were really trained: S and M take the transformer blocks 3, 7, 11 (the
hub's files say 5, 8, 11), and the lite sizes use SiLU throughout (the hub's files leave it out).
"""

from __future__ import annotations

__all__ = ["VARIANTS", "Reported", "Schedule", "Variant", "get_variant"]

from dataclasses import dataclass

from thawline.errors import ConfigError, did_you_mean
from thawline.models.deimv2.config import DEIMv2Config
from thawline.models.deimv2.criterion import CriterionConfig
from thawline.models.deimv2.decoder import DecoderConfig
from thawline.models.deimv2.hgnetv2 import HGNetV2Config, StageConfig
from thawline.models.deimv2.hybrid_encoder import HybridEncoderConfig
from thawline.models.deimv2.lite_encoder import LiteEncoderConfig
from thawline.models.deimv2.sta import AdaptedViTConfig
from thawline.models.deimv2.vit import ViTConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the published weights were trained on COCO. Epochs count from 0; an interval is [first, end)."""

    epochs: int
    stop_epoch: int
    """Stage 2 starts: back to the best weights, no heavy augmentation."""
    flat_epoch: int
    """Until here the learning rate is flat, then it falls by a cosine. Beyond `epochs`: never."""
    no_aug_epoch: int
    """Length of stage 2, with the final learning rate."""
    warmup_steps: int
    lr: float
    backbone_lr: float
    lr_gamma: float = 0.5
    """Final learning rate as a share of the first."""
    weight_decay: float = 1e-4
    batch_size: int = 32
    """Of all processes together."""
    ema_decay: float = 0.9999
    ema_warmup_steps: int = 1000
    clip_grad_norm: float = 0.1
    augment_epochs: tuple[int, int, int]
    """Mosaic or the other heavy operations from the first to the second, those others alone to the third."""
    mosaic_probability: float = 0.5
    mosaic_size: int = 320
    """Short side of each mosaic tile before it is placed, pixels."""
    min_box_size: int = 1
    """Boxes with a smaller side are dropped after augmentation, pixels."""
    mixup_probability: float = 0.0
    mixup_epochs: tuple[int, int] = (0, 0)
    copy_blend_probability: float = 0.0
    copy_blend_epochs: tuple[int, int] = (0, 0)
    multi_scale_repeat: int | None = None
    """How often the base size stands among the thirteen scales around it; None: one size throughout."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What the authors publish for a size. The GFLOPs leave out the products inside the ViT's attention."""

    coco_ap: float
    params_m: float
    gflops: float
    t4_latency_ms: float
    """TensorRT, fp16, batch 1, on an NVIDIA T4."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One published size."""

    config: DEIMv2Config
    schedule: Schedule
    weights_id: str
    """The authors' repository on the Hugging Face hub."""
    backbone_weights: str
    """File of the pretrained backbone that training started from."""
    reported: Reported


def get_variant(name: str) -> Variant:
    """The size called `name`.

    Raises: ConfigError: there is none.
    """
    if name not in VARIANTS:
        raise ConfigError(f"Unknown variant '{name}'. {did_you_mean(name, VARIANTS)}")
    return VARIANTS[name]


def _hgnetv2(*stages: StageConfig, out_stages: tuple[int, ...]) -> HGNetV2Config:
    first = StageConfig(in_channels=16, mid_channels=16, out_channels=64, downsample=False)
    second = StageConfig(in_channels=64, mid_channels=32, out_channels=256)
    return HGNetV2Config(stages=(first, second, *stages), out_stages=out_stages)


def _third_stage(out_channels: int, *, n_blocks: int = 1, kernel_size: int = 5) -> StageConfig:
    return StageConfig(
        in_channels=256,
        mid_channels=64,
        out_channels=out_channels,
        n_blocks=n_blocks,
        light=True,
        kernel_size=kernel_size,
    )


def _lite(
    name: str, image_size: int, backbone: HGNetV2Config, dim: int, *, num_queries: int, ffn_dim: int
) -> DEIMv2Config:
    return DEIMv2Config(
        variant=name,
        image_size=(image_size, image_size),
        backbone=backbone,
        encoder=LiteEncoderConfig(hidden_dim=dim),
        decoder=DecoderConfig(
            hidden_dim=dim,
            num_layers=3,
            num_queries=num_queries,
            num_points=(4, 2),
            ffn_dim=ffn_dim,
            gateway=False,
            share_bbox_head=True,
        ),
        criterion=CriterionConfig(local=False, union_set=False, matcher_change_epoch=450),
    )


def _vit_tiny(dim: int) -> ViTConfig:
    return ViTConfig(
        family="vit_tiny", dim=dim, num_heads=dim // 64, hidden_dim=4 * dim, out_blocks=(3, 7, 11)
    )


def _dinov3(*, swiglu: bool) -> ViTConfig:
    return ViTConfig(
        family="dinov3",
        dim=384,
        num_heads=6,
        hidden_dim=1536,
        ffn="swiglu" if swiglu else "mlp",
        out_blocks=(5, 8, 11),
        n_storage_tokens=4,
        norm_eps=1e-5,
        layer_scale=1e-5,
        mask_key_bias=True,
        final_norm=True,
        rope_rescale=2.0,
    )


def _with_vit(
    name: str,
    vit: ViTConfig,
    dim: int,
    *,
    detail_channels: int,
    encoder_ffn: int,
    expansion: float,
    n_blocks: int,
    num_layers: int = 4,
    ffn_dim: int,
    matcher_change_epoch: int,
) -> DEIMv2Config:
    return DEIMv2Config(
        variant=name,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        backbone=AdaptedViTConfig(vit=vit, detail_channels=detail_channels, out_channels_each=dim),
        encoder=HybridEncoderConfig(
            hidden_dim=dim, ffn_dim=encoder_ffn, expansion=expansion, n_blocks=n_blocks
        ),
        decoder=DecoderConfig(hidden_dim=dim, num_layers=num_layers, num_points=(3, 6, 3), ffn_dim=ffn_dim),
        criterion=CriterionConfig(matcher_change_epoch=matcher_change_epoch),
    )


def _lite_schedule(lr: float, *, mosaic_probability: float, mosaic_size: int, min_box_size: int) -> Schedule:
    return Schedule(
        epochs=500,
        stop_epoch=468,
        flat_epoch=250,
        no_aug_epoch=32,
        warmup_steps=4000,
        lr=lr,
        backbone_lr=lr / 2,
        batch_size=128,
        augment_epochs=(4, 250, 400),
        mosaic_probability=mosaic_probability,
        mosaic_size=mosaic_size,
        min_box_size=min_box_size,
    )


def _vit_schedule(
    epochs: int, flat_epoch: int, *, backbone_lr: float, weight_decay: float, repeat: int, no_aug_epoch: int
) -> Schedule:
    stop_epoch = epochs - no_aug_epoch
    return Schedule(
        epochs=epochs,
        stop_epoch=stop_epoch,
        flat_epoch=flat_epoch,
        no_aug_epoch=no_aug_epoch,
        warmup_steps=2000,
        lr=5e-4,
        backbone_lr=backbone_lr,
        weight_decay=weight_decay,
        augment_epochs=(4, flat_epoch, stop_epoch),
        mixup_probability=0.5,
        mixup_epochs=(4, flat_epoch),
        copy_blend_probability=0.5,
        copy_blend_epochs=(4, stop_epoch),
        multi_scale_repeat=repeat,
    )


_B0_WEIGHTS = "PPHGNetV2_B0_stage1.pth"

VARIANTS: dict[str, Variant] = {
    "atto": Variant(
        config=_lite(
            "atto",
            320,
            _hgnetv2(_third_stage(256, kernel_size=3), out_stages=(2,)),
            64,
            num_queries=100,
            ffn_dim=160,
        ),
        schedule=_lite_schedule(2e-3, mosaic_probability=0.3, mosaic_size=160, min_box_size=12),
        weights_id="Intellindust/DEIMv2_HGNetv2_ATTO_COCO",
        backbone_weights=_B0_WEIGHTS,
        reported=Reported(coco_ap=23.8, params_m=0.49, gflops=0.76, t4_latency_ms=1.10),
    ),
    "femto": Variant(
        config=_lite(
            "femto", 416, _hgnetv2(_third_stage(512), out_stages=(2,)), 96, num_queries=150, ffn_dim=256
        ),
        schedule=_lite_schedule(1.6e-3, mosaic_probability=0.5, mosaic_size=208, min_box_size=10),
        weights_id="Intellindust/DEIMv2_HGNetv2_FEMTO_COCO",
        backbone_weights=_B0_WEIGHTS,
        reported=Reported(coco_ap=31.0, params_m=0.96, gflops=1.67, t4_latency_ms=1.45),
    ),
    "pico": Variant(
        config=_lite(
            "pico",
            640,
            _hgnetv2(_third_stage(512, n_blocks=2), out_stages=(2,)),
            112,
            num_queries=200,
            ffn_dim=320,
        ),
        schedule=_lite_schedule(1.6e-3, mosaic_probability=0.5, mosaic_size=320, min_box_size=8),
        weights_id="Intellindust/DEIMv2_HGNetv2_PICO_COCO",
        backbone_weights=_B0_WEIGHTS,
        reported=Reported(coco_ap=38.5, params_m=1.51, gflops=5.15, t4_latency_ms=2.13),
    ),
    "n": Variant(
        config=DEIMv2Config(
            variant="n",
            backbone=_hgnetv2(
                _third_stage(512, n_blocks=2),
                StageConfig(in_channels=512, mid_channels=128, out_channels=1024, light=True, kernel_size=5),
                out_stages=(2, 3),
            ),
            encoder=HybridEncoderConfig(
                hidden_dim=128, ffn_dim=512, expansion=0.34, n_blocks=2, trailing_conv=True
            ),
            decoder=DecoderConfig(hidden_dim=128, num_layers=3, num_points=(6, 6), ffn_dim=512),
            criterion=CriterionConfig(matcher_change_epoch=136),
        ),
        schedule=Schedule(
            epochs=160,
            stop_epoch=148,
            flat_epoch=7800,
            no_aug_epoch=12,
            warmup_steps=2000,
            lr_gamma=1.0,
            lr=8e-4,
            backbone_lr=4e-4,
            augment_epochs=(4, 78, 148),
            mixup_probability=0.5,
            mixup_epochs=(4, 78),
            copy_blend_probability=0.4,
            copy_blend_epochs=(4, 78),
        ),
        weights_id="Intellindust/DEIMv2_HGNetv2_N_COCO",
        backbone_weights=_B0_WEIGHTS,
        reported=Reported(coco_ap=43.0, params_m=3.57, gflops=6.86, t4_latency_ms=2.32),
    ),
    "s": Variant(
        config=_with_vit(
            "s",
            _vit_tiny(192),
            192,
            detail_channels=16,
            encoder_ffn=512,
            expansion=0.34,
            n_blocks=2,
            ffn_dim=512,
            matcher_change_epoch=100,
        ),
        schedule=_vit_schedule(132, 64, backbone_lr=2.5e-5, weight_decay=1e-4, repeat=20, no_aug_epoch=12),
        weights_id="Intellindust/DEIMv2_DINOv3_S_COCO",
        backbone_weights="vitt_distill.pt",
        reported=Reported(coco_ap=50.9, params_m=9.71, gflops=25.62, t4_latency_ms=5.78),
    ),
    "m": Variant(
        config=_with_vit(
            "m",
            _vit_tiny(256),
            256,
            detail_channels=16,
            encoder_ffn=512,
            expansion=0.67,
            n_blocks=3,
            ffn_dim=512,
            matcher_change_epoch=80,
        ),
        schedule=_vit_schedule(102, 49, backbone_lr=2.5e-5, weight_decay=1e-4, repeat=6, no_aug_epoch=12),
        weights_id="Intellindust/DEIMv2_DINOv3_M_COCO",
        backbone_weights="vittplus_distill.pt",
        reported=Reported(coco_ap=53.0, params_m=18.11, gflops=52.20, t4_latency_ms=8.80),
    ),
    "l": Variant(
        config=_with_vit(
            "l",
            _dinov3(swiglu=False),
            224,
            detail_channels=32,
            encoder_ffn=896,
            expansion=1.0,
            n_blocks=3,
            ffn_dim=1792,
            matcher_change_epoch=50,
        ),
        schedule=_vit_schedule(68, 34, backbone_lr=1.25e-5, weight_decay=1.25e-4, repeat=3, no_aug_epoch=8),
        weights_id="Intellindust/DEIMv2_DINOv3_L_COCO",
        backbone_weights="dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
        reported=Reported(coco_ap=56.0, params_m=32.18, gflops=96.32, t4_latency_ms=10.47),
    ),
    "x": Variant(
        config=_with_vit(
            "x",
            _dinov3(swiglu=True),
            256,
            detail_channels=64,
            encoder_ffn=1024,
            expansion=1.25,
            n_blocks=4,
            num_layers=6,
            ffn_dim=2048,
            matcher_change_epoch=45,
        ),
        schedule=_vit_schedule(58, 29, backbone_lr=1e-5, weight_decay=1.25e-4, repeat=3, no_aug_epoch=8),
        weights_id="Intellindust/DEIMv2_DINOv3_X_COCO",
        backbone_weights="dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
        reported=Reported(coco_ap=57.8, params_m=50.26, gflops=151.6, t4_latency_ms=13.75),
    ),
}
"""By name, small to large."""
