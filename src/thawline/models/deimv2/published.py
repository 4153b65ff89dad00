"""The authors' training settings of each DEIMv2 size, as they ran.

Facts only, nothing is computed here. The numbers are what really ran, which is not always what was meant:
N's flat epoch lies beyond its end, and the first pattern of the HGNetv2 sizes also matches their
normalisation layers (`|` binds weaker than the lookahead around it suggests).
`thawline.training.detection.schedule` turns them into rates, `thawline.training.detection.groups` into
parameter groups.

Source: the authors' recipe files, with includes resolved (Huang et al., arXiv 2509.20787).
"""

from __future__ import annotations

__all__ = ["PUBLISHED"]

from functools import partial

from thawline.recipe.resolved import TrainingSettings, Window

# Patterns of the parameter groups in order: backbone, backbone undecayed, others undecayed.
_HGNET_BACKBONE = (r"^(?=.*backbone)(?!.*norm|bn).*$", r"^(?=.*backbone)(?=.*norm|bn).*$")
_ATTO_GROUPS = (*_HGNET_BACKBONE, r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn)).*$")
_HGNET_GROUPS = (*_HGNET_BACKBONE, r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn|bias)).*$")
_VIT_GROUPS = (
    r"^(?=.*.dinov3)(?!.*(?:norm|bn|bias)).*$",
    r"^(?=.*.dinov3)(?=.*(?:norm|bn|bias)).*$",
    r"^(?=.*(?:sta|encoder|decoder))(?=.*(?:norm|bn|bias)).*$",
)

_lite = partial(
    TrainingSettings, published=True, group_patterns=_HGNET_GROUPS, batch_size=128, warmup_steps=4000,
    epochs=500, stop_epoch=468, flat_epoch=250, no_aug_epochs=32, matcher_change_epoch=450,
    strong_epochs=Window(4, 400), mosaic_epochs=Window(4, 250),
)  # fmt: skip
_vit = partial(
    TrainingSettings, published=True, group_patterns=_VIT_GROUPS, lr=5e-4, mixup_prob=0.5, copyblend_prob=0.5,
)  # fmt: skip

PUBLISHED: dict[str, TrainingSettings] = {
    "atto": _lite(
        size=320, lr=2e-3, backbone_lr=1e-3, mosaic_prob=0.3, min_box_size=12, group_patterns=_ATTO_GROUPS,
    ),
    "femto": _lite(size=416, lr=1.6e-3, backbone_lr=8e-4, min_box_size=10),
    "pico": _lite(lr=1.6e-3, backbone_lr=8e-4, min_box_size=8),
    "n": TrainingSettings(
        published=True, group_patterns=_HGNET_GROUPS, lr=8e-4, backbone_lr=4e-4, lr_gamma=1.0,
        epochs=160, stop_epoch=148, flat_epoch=7800, no_aug_epochs=12, matcher_change_epoch=136,
        strong_epochs=Window(4, 148), mosaic_epochs=Window(4, 78),
        mixup_epochs=Window(4, 78), copyblend_epochs=Window(4, 78), mixup_prob=0.5, copyblend_prob=0.4,
    ),
    "s": _vit(
        epochs=132, stop_epoch=120, flat_epoch=64, no_aug_epochs=12, matcher_change_epoch=100,
        strong_epochs=Window(4, 120), mosaic_epochs=Window(4, 64),
        mixup_epochs=Window(4, 64), copyblend_epochs=Window(4, 120),
        backbone_lr=2.5e-5, multi_scale_repeat=20,
    ),
    "m": _vit(
        epochs=102, stop_epoch=90, flat_epoch=49, no_aug_epochs=12, matcher_change_epoch=80,
        strong_epochs=Window(4, 90), mosaic_epochs=Window(4, 49),
        mixup_epochs=Window(4, 49), copyblend_epochs=Window(4, 90),
        backbone_lr=2.5e-5, multi_scale_repeat=6,
    ),
    "l": _vit(
        epochs=68, stop_epoch=60, flat_epoch=34, no_aug_epochs=8, matcher_change_epoch=50,
        strong_epochs=Window(4, 60), mosaic_epochs=Window(4, 34),
        mixup_epochs=Window(4, 34), copyblend_epochs=Window(4, 60),
        backbone_lr=1.25e-5, weight_decay=1.25e-4, multi_scale_repeat=3,
    ),
    "x": _vit(
        epochs=58, stop_epoch=50, flat_epoch=29, no_aug_epochs=8, matcher_change_epoch=45,
        strong_epochs=Window(4, 50), mosaic_epochs=Window(4, 29),
        mixup_epochs=Window(4, 29), copyblend_epochs=Window(4, 50),
        backbone_lr=1e-5, weight_decay=1.25e-4, multi_scale_repeat=3,
    ),
}  # fmt: skip
"""By size, smallest first."""
