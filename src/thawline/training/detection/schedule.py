"""Learning-rate and augmentation schedules of detection: the rates of every step, the epochs of every window.

Two forms of one schedule. `published_schedule` repeats what ran when the published weights were made, slips
included, because their AP depends on it. `derive_schedule` scales the same shape to a user's own data, and
there every setting does what it says:

| | published | derived |
|---|---|---|
| rate of step k | curve at k - 1; step 0 a 500th of the full rate, step 1 none | curve at k + 1 |
| size N | constant after warm-up | flat, then cosine to half, like the others |
| stage 2 | starts from the best checkpoint, again after every worse epoch | goes on from where it is |

Rates follow a flat-cosine: a warm-up that grows with the square of the step, the full rate, half a cosine
down to `lr_gamma` of it, and that rate to the end.
"""

from __future__ import annotations

__all__ = [
    "DetectionSchedule",
    "asks_for_augmentation",
    "derive_schedule",
    "flat_cosine",
    "override",
    "published_schedule",
]

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from thawline.errors import ConfigError, did_you_mean
from thawline.models.deimv2.published import PUBLISHED
from thawline.recipe import DetectionBase, DetectionSettings, DetectionTraining
from thawline.recipe.checks import height_width
from thawline.recipe.resolved import COARSEST_STRIDE, NEVER, TrainingSettings, Window

# Step 0 of the published runs still had the start value of a linear warm-up over this many steps.
_PUBLISHED_FIRST_STEP = 1 / 500

# Derived settings, see `derive_schedule`.
_MIN_BATCHES_PER_EPOCH = 16
_MIN_STEPS = 1000
_MIN_BATCH_SIZE = 4
_SHORT_RUN, _LONG_RUN = (8_000, 30), (16_000, 60)  # images seen, epochs
_SHORT_RUN_RATE = 4.0
_DOMAIN_RATE = 4.0
_MAX_WARMUP_SHARE = 0.05
_MAX_EMA_SHARE = 0.05
_MANY_IMAGES = 5000
_LOWEST_PRETRAINED_SHARE = 0.25
_MAX_SHARE_OF_SMALL_BOXES = 0.05

_OF_STRONG_AUGMENTATION = ("mosaic_prob", "mixup_prob", "copyblend_prob", "colour_prob", "merged_mosaic")


@dataclass(frozen=True, kw_only=True)
class DetectionSchedule:
    """Settings of a run, laid out over its steps.

    Args:
        variant: a size of DEIMv2.
        settings: the run's settings.
        steps_per_epoch: optimiser steps.
        reasons: rules behind derived values, in words.
    """

    variant: str
    settings: TrainingSettings
    steps_per_epoch: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Rules behind derived values, in words, by the line of the plan that shows those."""

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise ConfigError(
                f"`steps_per_epoch={self.steps_per_epoch}`: expected 1 or more. "
                "An epoch holds images // batch size steps; is the dataset empty?"
            )

    @property
    def published(self) -> bool:
        """True if the run repeats the slips of the published runs, see the top of this file."""
        return self.settings.published

    @property
    def epochs(self) -> int:
        """Length of the run in epochs."""
        return self.settings.epochs

    @property
    def n_steps(self) -> int:
        """Length of the run in optimiser steps."""
        return self.epochs * self.steps_per_epoch

    @property
    def base_lrs(self) -> list[float]:
        """Full rate of each parameter group: backbone, backbone undecayed, others undecayed, others."""
        backbone, others = self.settings.backbone_lr, self.settings.lr
        return [backbone, backbone, others, others]

    @property
    def windows(self) -> dict[str, Window]:
        """Windows of epochs, by name.

        The rate's phases after warm-up: `flat`, `cosine`, `final`. Augmentation: `strong` (photometric,
        zoom-out, IoU crop, Mosaic), `mosaic` (with its probability, and then instead of zoom-out and crop),
        `mixup`, `copyblend`, `multi_scale`. `overlap_matcher`: matching by score and overlap alone.
        `stage_1`, `stage_2`.
        """
        s, end = self.settings, self.settings.epochs
        flat = min(s.flat_epoch, end)
        final = max(flat, end - s.no_aug_epochs)
        return {
            "flat": Window(0, flat),
            "cosine": Window(flat, final),
            "final": Window(final, end),
            "strong": s.strong_epochs,
            "mosaic": s.mosaic_epochs,
            "mixup": s.mixup_epochs,
            "copyblend": s.copyblend_epochs,
            "multi_scale": s.multi_scale_epochs,
            "overlap_matcher": Window(min(s.matcher_change_epoch, end), end),
            "stage_1": Window(0, s.stop_epoch),
            "stage_2": Window(s.stop_epoch, end),
        }

    def factor_at(self, step: int) -> float:
        """Return the rate of `step`, counted from 0, as a share of the full rate, equal for every group."""
        if self.published and step == 0:
            return _PUBLISHED_FIRST_STEP
        s, per_epoch = self.settings, self.steps_per_epoch
        return flat_cosine(
            step - 1 if self.published else step + 1,
            warmup=s.warmup_steps,
            flat=s.flat_epoch * per_epoch,
            final=(s.epochs - s.no_aug_epochs) * per_epoch,
            gamma=s.lr_gamma,
        )

    def lr_at(self, step: int) -> list[float]:
        """Return the rate of each parameter group at optimiser step `step`, counted from 0.

        Returns: one value per group, in the order of `base_lrs`.
        """
        factor = self.factor_at(step)
        return [lr * factor for lr in self.base_lrs]

    def describe(self) -> dict[str, Any]:
        """Return the whole schedule as plain values, for people and for JSON."""
        s = self.settings
        return {
            "variant": self.variant,
            "form": "published" if self.published else "derived",
            "epochs": self.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.n_steps,
            "batch_size": s.batch_size,
            "lr": s.lr,
            "backbone_lr": s.backbone_lr,
            "final_lr_share": s.lr_gamma,
            "weight_decay": s.weight_decay,
            "min_box_size": s.min_box_size,
            "warmup_steps": s.warmup_steps,
            "ema": {"decay": s.ema_decay, "warmup_steps": s.ema_warmup_steps},
            "probabilities": {
                "mosaic": s.mosaic_prob, "mixup": s.mixup_prob, "copyblend": s.copyblend_prob,
            },
            "windows": {name: list(window) for name, window in self.windows.items()},
            "reasons": dict(self.reasons),
        }  # fmt: skip


def flat_cosine(t: float, *, warmup: int, flat: int, final: int, gamma: float) -> float:
    """Return the share of the full rate at time `t`: square warm-up, flat, half a cosine down, `gamma`.

    Args:
        t: time in steps.
        warmup: end of the warm-up.
        flat: end of the full rate.
        final: start of the final rate.
        gamma: final rate over full rate.
    """
    if t < warmup:
        return (t / warmup) ** 2
    if t <= flat:
        return 1.0
    if t >= final:
        return gamma
    return gamma + (1 - gamma) * 0.5 * (1 + math.cos(math.pi * (t - flat) / (final - flat)))


def published_schedule(variant: str, steps_per_epoch: int) -> DetectionSchedule:
    """Return the authors' schedule of a size, as it ran.

    Args:
        variant: "atto" … "x".
        steps_per_epoch: COCO's 118,287 images make 924 steps at the lite sizes' batch of 128, 3,696 at 32.
    Raises: ConfigError: unknown size.
    """
    return DetectionSchedule(variant=variant, settings=_published(variant), steps_per_epoch=steps_per_epoch)


def derive_schedule(
    epochs: int,
    *,
    variant: str,
    n_images: int,
    batch_size: int | None = None,
    size: int | tuple[int, int] | None = None,
    start: Literal["scratch", "backbone", "detector", "domain"] = "scratch",
    box_sides: np.ndarray | None = None,
    strong_augmentation: bool = False,
) -> DetectionSchedule:
    """Scale the published schedule of a size to a user's own data.

    - **Windows** keep their share of the run: an epoch of the published run moves to the same fraction of
      `epochs`, but the last epoch is always without strong augmentation. At the published length they are
      the published windows. N gets the cosine its recipe named and never reached.
    - **Batch**: the published one, halved until an epoch has at least 16 steps and the run 1,000, but not
      below 4.
    - **Rates** follow the square root of the batch, the rule for Adam (Malladi et al., NeurIPS 2022).
    - **Small data**: what is pretrained moves less, by √(n_images / 5000), a quarter at least. `start` says
      what that is: nothing, the backbone, or, in a run that is not short, the whole detector. A backbone with
      random weights trains at the full rate, not at the low one for pretrained weights.
    - **Domains**, an adapter and class heads on a frozen detector, train at four times the published rate,
      whatever the batch: few weights have to move further.
    - **Short runs**: a run of at most 30 epochs that sees at most 8,000 images, epochs × `n_images`, has four
      times the rate, at most the published one, no strong augmentation, and matching by score and overlap
      never replaces the first form of matching, since boxes overlap too little. From 60 epochs or 16,000
      images on all of it is as published; between, it changes with their logarithm.
    - **Warm-up**: the published steps, at most a twentieth of the run.
    - **EMA** averages over the published number of images, at most a twentieth of the run; its warm-up is a
      tenth of that, as published.
    - **Small boxes**: the lite sizes leave out boxes under 8 to 12 pixels, but here never more than a
      twentieth of all boxes: at 320 pixels Atto would drop 83 % of cars in aerial images.

    Args:
        epochs: length of the run, 1 or more.
        variant: "atto" … "x".
        n_images: number of training images.
        batch_size: images per optimiser step over all devices; `None` derives it.
        size: side of the square input or (height, width), pixels, multiples of 32; `None` is the published
            one.
        start: source of the initial weights; "domain": an adapter on a frozen detector.
        box_sides: (N,), the shorter side of every training box in an input whose longer side is 1; `None`
            leaves the published limit of small boxes.
        strong_augmentation: `True` leaves it its share of a short run, too.
    Raises: ConfigError: unknown size, or no epochs, images or batch.
    """
    published = _published(variant)
    for name, value in (("epochs", epochs), ("n_images", n_images), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"`{name}={value}`: expected 1 or more.")
    size = published.size if size is None else height_width("size", size, COARSEST_STRIDE)
    batch = batch_size if batch_size is not None else _batch_size(published.batch_size, n_images, epochs)
    steps_per_epoch = max(1, n_images // batch)
    n_steps = epochs * steps_per_epoch
    # 1 for a run that is too short for the published recipe, 0 for one that is long enough.
    shortness = _shortness(epochs * n_images, epochs)

    def scaled(epoch: float) -> int:
        return min(round(epoch * epochs / published.epochs), max(1, epochs - 1))

    left_out = 0.0 if strong_augmentation else shortness

    def shortened(window: Window) -> Window:
        return Window(scaled(window.start), scaled(window.stop - left_out * (window.stop - window.start)))

    pretrained = min(1.0, max(_LOWEST_PRETRAINED_SHARE, math.sqrt(n_images / _MANY_IMAGES)))
    if start == "detector":
        pretrained **= 1 - shortness
    per_batch = math.sqrt(batch / published.batch_size)
    boost = max(1.0, min(_SHORT_RUN_RATE**shortness, 1 / per_batch))
    lr = published.lr * (_DOMAIN_RATE if start == "domain" else per_batch * boost)
    backbone_lr = published.backbone_lr * per_batch * pretrained * (boost if start == "detector" else 1.0)
    # 1 / (1 - decay) is how many steps the average reaches back.
    ema_steps = (1 / (1 - published.ema_decay)) * published.batch_size / batch
    ema_steps = max(1.0, min(ema_steps, _MAX_EMA_SHARE * n_steps))
    min_box_size = published.min_box_size
    if box_sides is not None and len(box_sides):
        smallest = max(height_width("size", size)) * float(np.quantile(box_sides, _MAX_SHARE_OF_SMALL_BOXES))
        min_box_size = max(1, min(min_box_size, math.floor(smallest)))
    flat_epoch, change = published.flat_epoch, scaled(published.matcher_change_epoch)
    settings = replace(
        published,
        published=False,
        group_patterns=(),
        epochs=epochs,
        size=size,
        min_box_size=min_box_size,
        batch_size=batch,
        stop_epoch=scaled(published.stop_epoch),
        no_aug_epochs=epochs - scaled(published.epochs - published.no_aug_epochs),
        flat_epoch=scaled(flat_epoch if flat_epoch <= published.epochs else published.mosaic_epochs.stop),
        lr_gamma=published.lr_gamma if published.lr_gamma < 1 else 0.5,
        strong_epochs=shortened(published.strong_epochs),
        mosaic_epochs=shortened(published.mosaic_epochs),
        mixup_epochs=shortened(published.mixup_epochs),
        copyblend_epochs=shortened(published.copyblend_epochs),
        matcher_change_epoch=change + round(shortness * (epochs - change)),
        warmup_steps=min(published.warmup_steps, math.ceil(_MAX_WARMUP_SHARE * n_steps)),
        lr=lr * pretrained if start == "detector" else lr,
        backbone_lr=lr if start in ("scratch", "domain") else backbone_lr,
        ema_decay=1 - 1 / ema_steps,
        ema_warmup_steps=max(1, round(ema_steps / 10)),
    )
    reasons = {
        "rates": f"published {published.lr:g} × √({batch} / {published.batch_size})",
        "epochs": f"shares of the published {published.epochs}",
    }
    if batch_size is None and batch < published.batch_size:
        reasons["steps"] = (
            f"published {published.batch_size}, less for {_MIN_BATCHES_PER_EPOCH} steps an epoch and "
            f"{_MIN_STEPS:,} a run"
        )
    if start == "domain":
        reasons["rates"] = f"published {published.lr:g} × {_DOMAIN_RATE:g}, whatever the batch: an adapter"
    elif shortness:
        reasons["rates"] += f" × {boost:.2g}: a short run, of {epochs * n_images:,} images"
    if left_out:
        reasons["epochs"] += f"; {left_out:.0%} of the strong ones left out: a short run"
    if start in ("backbone", "detector") and pretrained < 1:
        reasons["rates"] += f"; what is pretrained × {pretrained:.2g}: {n_images:,} images"
    if min_box_size < published.min_box_size:
        reasons["boxes"] = f"published {published.min_box_size}, less to keep 95 % of the boxes"
    return DetectionSchedule(
        variant=variant, settings=settings, steps_per_epoch=steps_per_epoch, reasons=reasons
    )


def override(
    settings: TrainingSettings, base: DetectionBase, objective: DetectionSettings, training: DetectionTraining
) -> TrainingSettings:
    """Return `settings` with the values that a recipe gives: fields of the same name that are not None.

    Raises: ConfigError: one is given that nothing reads, in this size or with what is switched off.
    """
    _check_augmentation(base.variant, objective)
    names = {field.name for field in fields(settings)}
    given: dict[str, Any] = {
        name: value
        for section in (base, objective, training)
        for name, value in vars(section).items()
        if name in names and value is not None
    }
    start = settings.strong_epochs.start
    if not objective.multi_scale:
        given["multi_scale_repeat"] = None
    is_plain = objective.strong_augmentation is False
    if is_plain:
        given["strong_epochs"] = Window(start, start)
    if is_plain or not objective.dense_o2o:
        given["mosaic_epochs"] = Window(start, start)
        given["mixup_epochs"] = given["copyblend_epochs"] = NEVER
    return replace(settings, **given)


def _check_augmentation(variant: str, objective: DetectionSettings) -> None:
    """Refuse settings of augmentation that nothing reads."""
    published = _published(variant)
    off = [name for name in ("strong_augmentation", "dense_o2o") if getattr(objective, name) is False]
    reason = {name: f"`objective.{off[0]}` is off" for name in ("mosaic_prob", "merged_mosaic") if off}
    if off[:1] == ["strong_augmentation"]:
        reason["colour_prob"] = "`objective.strong_augmentation` is off"
    for name, window in (
        ("mixup_prob", published.mixup_epochs),
        ("copyblend_prob", published.copyblend_epochs),
    ):
        if off or window == NEVER:
            reason[name] = f"`objective.{off[0]}` is off" if off else f"'{variant}' is trained without it"
    for name, why in reason.items():
        if _is_given(objective, name):
            value = getattr(objective, name)
            raise ConfigError(f"`objective.{name}={value}`: nothing reads it, since {why}. Leave it out.")


def asks_for_augmentation(objective: DetectionSettings) -> bool:
    """Return whether a recipe asks for strong augmentation: as such, or by giving one of its settings."""
    return bool(objective.strong_augmentation) or any(
        _is_given(objective, name) for name in _OF_STRONG_AUGMENTATION
    )


def _is_given(objective: DetectionSettings, name: str) -> bool:
    value = getattr(objective, name)
    return bool(value) and value != getattr(DetectionSettings, name)


def _published(variant: str) -> TrainingSettings:
    if variant not in PUBLISHED:
        raise ConfigError(f"Unknown variant '{variant}'. {did_you_mean(variant, PUBLISHED)}")
    return PUBLISHED[variant]


def _batch_size(published: int, n_images: int, epochs: int) -> int:
    batch = published
    while batch > _MIN_BATCH_SIZE and (
        n_images // batch < _MIN_BATCHES_PER_EPOCH or epochs * (n_images // batch) < _MIN_STEPS
    ):
        batch //= 2
    return min(batch, n_images)


def _shortness(n_seen: int, epochs: int) -> float:
    """Return 1 for a short run, 0 for a long one: the lesser of what images seen and epochs say."""
    limits = zip((n_seen, epochs), _SHORT_RUN, _LONG_RUN, strict=True)
    share = min(math.log(long / value) / math.log(long / short) for value, short, long in limits)
    return min(1.0, max(0.0, share))
