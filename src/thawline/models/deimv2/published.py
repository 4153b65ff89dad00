"""How a detector is trained: every setting of the recipe, and the authors' values for each size.

Facts only, nothing computes. Epochs count from 0 and a window `(start, stop)` holds the epochs start … stop
- 1. The numbers are what really ran, which is not always what was meant: N's flat epoch lies beyond its
end, and the first rule of the HGNetv2 sizes catches their normalisation layers as well (`|` binds weaker
than the lookahead around it suggests). `thawline.training.detection.schedule` turns them into rates,
`thawline.training.detection.groups` into groups.

Source: the authors' recipe files, with includes resolved (Huang et al., arXiv 2509.20787).
"""

from __future__ import annotations

__all__ = ["PUBLISHED", "GroupRule", "TrainingSettings"]

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupRule:
    """One line of an optimiser recipe: the parameters whose name matches, and what differs for them."""

    pattern: str
    """Searched in the parameter's name; the first rule that matches wins."""
    is_backbone: bool = False
    """Trains at the backbone's rate."""
    has_decay: bool = True
    """Decays; else its weight decay is 0."""


_HGNET_BACKBONE = (
    GroupRule(r"^(?=.*backbone)(?!.*norm|bn).*$", is_backbone=True),
    GroupRule(r"^(?=.*backbone)(?=.*norm|bn).*$", is_backbone=True, has_decay=False),
)
_ATTO_RULES = (
    *_HGNET_BACKBONE,
    GroupRule(r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn)).*$", has_decay=False),
)
_HGNET_RULES = (
    *_HGNET_BACKBONE,
    GroupRule(r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn|bias)).*$", has_decay=False),
)
_VIT_RULES = (
    GroupRule(r"^(?=.*.dinov3)(?!.*(?:norm|bn|bias)).*$", is_backbone=True),
    GroupRule(r"^(?=.*.dinov3)(?=.*(?:norm|bn|bias)).*$", is_backbone=True, has_decay=False),
    GroupRule(r"^(?=.*(?:sta|encoder|decoder))(?=.*(?:norm|bn|bias)).*$", has_decay=False),
)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of a training run. Defaults are those most published runs share."""

    epochs: int
    stop_epoch: int
    """Start of stage 2: strong augmentation ends and the best checkpoint of stage 1 is loaded again."""
    flat_epoch: int
    """End of the constant rate; the cosine starts here."""
    no_aug_epochs: int
    """Epochs at the end with the final rate."""
    lr: float
    """Rate of everything but the backbone, at `batch_size`."""
    backbone_lr: float
    policy: tuple[int, int, int]
    """Epochs at which strong augmentation starts, Mosaic ends, and all of it ends."""
    matcher_change_epoch: int
    """From here on queries are matched by score and overlap alone."""
    group_rules: tuple[GroupRule, ...]
    """Optimiser groups in order; what no rule matches is the last group. Empty: the clean groups."""
    base_size: int = 640
    """Side of the square input."""
    multi_scale_repeat: int | None = None
    """How often `base_size` is in the list multi-scale draws from; `None` is no multi-scale."""
    warmup_steps: int = 2000
    lr_gamma: float = 0.5
    """Final rate over full rate."""
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 0.1
    batch_size: int = 32
    """Images per step over all devices."""
    val_batch_size: int = 64
    mosaic_prob: float = 0.5
    min_box_size: int = 1
    """Boxes with a side below this many pixels are dropped after cropping and after resizing."""
    mixup_prob: float = 0.0
    mixup_epochs: tuple[int, int] = (0, 0)
    copyblend_prob: float = 0.0
    copyblend_epochs: tuple[int, int] = (0, 0)
    ema_decay: float = 0.9999
    ema_warmup_steps: int = 1000

    @property
    def mosaic_size(self) -> int:
        """Short side of the four images of a Mosaic, pixels."""
        return self.base_size // 2


PUBLISHED: dict[str, TrainingSettings] = {
    "atto": TrainingSettings(
        epochs=500, stop_epoch=468, flat_epoch=250, no_aug_epochs=32, warmup_steps=4000,
        lr=2e-3, backbone_lr=1e-3, batch_size=128, val_batch_size=256,
        policy=(4, 250, 400), matcher_change_epoch=450, mosaic_prob=0.3, min_box_size=12,
        base_size=320, group_rules=_ATTO_RULES,
    ),
    "femto": TrainingSettings(
        epochs=500, stop_epoch=468, flat_epoch=250, no_aug_epochs=32, warmup_steps=4000,
        lr=1.6e-3, backbone_lr=8e-4, batch_size=128, val_batch_size=256,
        policy=(4, 250, 400), matcher_change_epoch=450, min_box_size=10,
        base_size=416, group_rules=_HGNET_RULES,
    ),
    "pico": TrainingSettings(
        epochs=500, stop_epoch=468, flat_epoch=250, no_aug_epochs=32, warmup_steps=4000,
        lr=1.6e-3, backbone_lr=8e-4, batch_size=128, val_batch_size=256,
        policy=(4, 250, 400), matcher_change_epoch=450, min_box_size=8,
        group_rules=_HGNET_RULES,
    ),
    "n": TrainingSettings(
        epochs=160, stop_epoch=148, flat_epoch=7800, no_aug_epochs=12, lr_gamma=1.0,
        lr=8e-4, backbone_lr=4e-4,
        policy=(4, 78, 148), matcher_change_epoch=136,
        mixup_prob=0.5, mixup_epochs=(4, 78), copyblend_prob=0.4, copyblend_epochs=(4, 78),
        group_rules=_HGNET_RULES,
    ),
    "s": TrainingSettings(
        epochs=132, stop_epoch=120, flat_epoch=64, no_aug_epochs=12,
        lr=5e-4, backbone_lr=2.5e-5,
        policy=(4, 64, 120), matcher_change_epoch=100, multi_scale_repeat=20,
        mixup_prob=0.5, mixup_epochs=(4, 64), copyblend_prob=0.5, copyblend_epochs=(4, 120),
        group_rules=_VIT_RULES,
    ),
    "m": TrainingSettings(
        epochs=102, stop_epoch=90, flat_epoch=49, no_aug_epochs=12,
        lr=5e-4, backbone_lr=2.5e-5,
        policy=(4, 49, 90), matcher_change_epoch=80, multi_scale_repeat=6,
        mixup_prob=0.5, mixup_epochs=(4, 49), copyblend_prob=0.5, copyblend_epochs=(4, 90),
        group_rules=_VIT_RULES,
    ),
    "l": TrainingSettings(
        epochs=68, stop_epoch=60, flat_epoch=34, no_aug_epochs=8,
        lr=5e-4, backbone_lr=1.25e-5, weight_decay=1.25e-4,
        policy=(4, 34, 60), matcher_change_epoch=50, multi_scale_repeat=3,
        mixup_prob=0.5, mixup_epochs=(4, 34), copyblend_prob=0.5, copyblend_epochs=(4, 60),
        group_rules=_VIT_RULES,
    ),
    "x": TrainingSettings(
        epochs=58, stop_epoch=50, flat_epoch=29, no_aug_epochs=8,
        lr=5e-4, backbone_lr=1e-5, weight_decay=1.25e-4,
        policy=(4, 29, 50), matcher_change_epoch=45, multi_scale_repeat=3,
        mixup_prob=0.5, mixup_epochs=(4, 29), copyblend_prob=0.5, copyblend_epochs=(4, 50),
        group_rules=_VIT_RULES,
    ),
}  # fmt: skip
"""By size, smallest first."""
