"""Settings of a detection run with every value filled in: each is declared here and read where it acts.

`thawline.models.deimv2.published` holds the authors' values for each size and
`thawline.training.detection.schedule` scales them to other data, and overrides by name what a recipe gives.
Augmentation, collation, schedule, optimiser and EMA read the result directly.
"""

from __future__ import annotations

__all__ = ["COARSEST_STRIDE", "NEVER", "Augmentation", "TrainingSettings", "Window", "check_probabilities"]

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from thawline.errors import ConfigError
from thawline.recipe.checks import height_width


class Window(NamedTuple):
    """Epochs start … stop - 1, counted from 0."""

    start: int
    stop: int

    def covers(self, epoch: int) -> bool:
        """Return whether `epoch` lies inside."""
        return self.start <= epoch < self.stop


NEVER = Window(0, 0)
COARSEST_STRIDE = 32
"""Coarsest stride of every published size; sides of the input are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Operations on images and batches: their probabilities and the epochs that have them."""

    size: int | tuple[int, int] = 640
    """Size of the input, pixels: the side of a square, or (height, width)."""
    strong_epochs: Window = NEVER
    """Epochs with colour changes, and zoom-out and IoU crop or Mosaic."""
    mosaic_epochs: Window = NEVER
    """Epochs with Mosaic, inside `strong_epochs`."""
    mosaic_prob: float = 0.5
    """Share of images that become a Mosaic in `mosaic_epochs`; the others get zoom-out and crop."""
    mixup_epochs: Window = NEVER
    mixup_prob: float = 0.0
    """Share of batches with MixUp in `mixup_epochs`."""
    copyblend_epochs: Window = NEVER
    copyblend_prob: float = 0.0
    """Share of the batches without MixUp that get CopyBlend in `copyblend_epochs`."""
    stop_epoch: int = 0
    """Start of stage 2, which has a single size; the best checkpoint of stage 1 is loaded again."""
    multi_scale_repeat: int | None = None
    """How often `size` is in the list that multi-scale draws from; `None` is no multi-scale."""
    colour_prob: float = 0.5
    """Probability of each colour change on its own."""
    zoom_out_prob: float = 0.5
    max_zoom_out: float = 4.0
    """Largest side of the zoomed-out view over the image's."""
    crop_prob: float = 0.8
    flip_prob: float = 0.5
    """Probability of a left-right flip."""
    vertical_flip_prob: float = 0.0
    min_box_size: int = 1
    """Boxes with a side below this many pixels are dropped after cropping and after resizing."""
    merged_mosaic: bool = False
    """One bilinear warp per Mosaic tile instead of the published steps."""
    published: bool = False
    """Repeat the slips of the published runs: multi-scale takes the nearest pixel, and what
    `thawline.training.detection.schedule` lists."""

    def __post_init__(self) -> None:
        check_probabilities(self)
        height, width = height_width("size", self.size)
        object.__setattr__(self, "size", height if height == width else (height, width))
        if self.max_zoom_out < 1:
            raise ConfigError(f"`max_zoom_out={self.max_zoom_out}`: expected 1 or more.")
        (start, stop), strong = self.mosaic_epochs, self.strong_epochs
        if start < stop and not strong[0] <= start < stop <= strong[1]:
            raise ConfigError(
                f"`mosaic_epochs={(start, stop)}`: expected a window inside `strong_epochs={tuple(strong)}`."
            )

    @property
    def height_width(self) -> tuple[int, int]:
        """Size of the input, pixels."""
        return height_width("size", self.size)

    @property
    def tile_size(self) -> tuple[int, int]:
        """Height and width that each of the four images of a Mosaic covers, pixels."""
        height, width = self.height_width
        return height // 2, width // 2

    @property
    def multi_scale_epochs(self) -> Window:
        """Epochs with batches of several sizes: stage 1, where there is multi-scale."""
        return Window(0, self.stop_epoch if self.multi_scale_repeat is not None else 0)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Augmentation):
    """Every setting of a training run. Defaults are those most published runs share."""

    epochs: int
    flat_epoch: int
    """End of the constant rate; the cosine starts here."""
    no_aug_epochs: int
    """Epochs at the end with the final rate."""
    lr: float
    """Rate of everything but the backbone, at `batch_size`."""
    backbone_lr: float
    matcher_change_epoch: int
    """From here on queries are matched by score and overlap alone."""
    group_patterns: tuple[str, ...] = ()
    """Name patterns of the parameter groups: backbone, backbone undecayed, others undecayed. Empty: groups by
    kind of parameter (`thawline.training.detection.groups`)."""
    warmup_steps: int = 2000
    lr_gamma: float = 0.5
    """Final rate over full rate."""
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 0.1
    batch_size: int = 32
    """Images per step over all devices."""
    ema_decay: float = 0.9999
    ema_warmup_steps: int = 1000


def check_probabilities(section: Any, prefix: str = "") -> None:
    """Check that the fields ending in `_prob` are None or in 0 … 1. Raises: ConfigError."""
    for name in (field.name for field in fields(section) if field.name.endswith("_prob")):
        value = getattr(section, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"`{prefix}{name}` must be a probability, 0 to 1, got {value!r}.")
