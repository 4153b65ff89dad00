"""Recipe sections of detection: base, data, objective and training."""

from __future__ import annotations

__all__ = ["DetectionBase", "DetectionData", "DetectionSettings", "DetectionTraining"]

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from thawline.errors import ConfigError
from thawline.recipe.checks import (
    all_at_least,
    check_patience,
    dataset_names,
    fraction,
    height_width,
    require,
)
from thawline.recipe.resolved import COARSEST_STRIDE, TrainingSettings, check_probabilities

NO_OVERRIDES = {
    "variant": "`base.variant` does",
    "image_size": "`base.size` does",
    "num_classes": "the classes of the data do",
    "class_names": "the classes of the data do",
    "class_loss": "`objective.class_loss` does",
    "matcher_change_epoch": "`training.epochs` does",
}
"""Settings of the network that are set elsewhere → where."""


@dataclass(frozen=True, kw_only=True)
class DetectionBase:
    """Detector to train: a size of DEIMv2 and its initial weights."""

    variant: Literal["atto", "femto", "pico", "n", "s", "m", "l", "x"] = "n"
    """Size. Atto to N have an HGNetv2 backbone, S to X a vision transformer."""
    weights: str | None = None
    """Initial weights: a detector (a run's folder, a file, a folder, a Hub id; the name of a size for its
    published weights) or a pretrained backbone. None: random weights."""
    size: int | list[int] | None = None
    """Size of the input in pixels, multiples of 32: side of a square or [height, width]. None: published."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Other settings of the network, by the names of its config (`{num_queries: 500}`)."""

    def __post_init__(self) -> None:
        if self.size is not None:
            height_width("base.size", self.size, COARSEST_STRIDE)
        for name in _names(self.overrides):
            if name in NO_OVERRIDES:
                raise ConfigError(f"`base.overrides` cannot set `{name}`: {NO_OVERRIDES[name]}.")

    @property
    def label(self) -> str:
        """Name of the detector, for messages and run names."""
        return f"deimv2_{self.variant}"


@dataclass(frozen=True, kw_only=True)
class DetectionData:
    """Labelled images: COCO, YOLO or Pascal VOC."""

    path: str | list[str] = ""
    """Folder, COCO JSON or data.yaml; or a list of several, which train one detector with class heads for
    each. Their names are those of their folders (docs/domains.md)."""
    format: Literal["auto", "coco", "yolo", "voc"] = "auto"
    """Annotation format. auto: detected."""
    images: str | None = None
    """Folder that image names are relative to. None: searched for around the annotations."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str | None = None
    """Split to evaluate on. None: the first of val, valid, validation and test that exists."""
    eval_fraction: float = 0.1
    """Share of the training images to hold out, drawn by `seed`, if there is no evaluation split: at least
    one image, unless it is 0. 1: all, to evaluate only."""
    sampling: Literal["each", "repeat", "size", "temperature", "equal"] = "each"
    """Frequency of the images. each: every image once an epoch; repeat: those with a rare class several times
    (LVIS' repeat factors), which makes an epoch longer. Of several datasets: batches in proportion to their
    images (size), to a root of them (temperature), or as many of each (equal)."""
    sampling_temperature: float = 2.0
    """Root for `sampling: temperature`: 1 equals size, a large value approaches equal."""
    sampling_threshold: float = 0.1
    """For `sampling: repeat`: classes in less than this share of the images are rare. At a share f an image
    comes √(threshold / f) times; LVIS has 0.001 for 1,203 classes."""
    max_images: int | None = None
    """Use this many training images of each dataset, drawn by `seed`. None: all."""
    max_eval_images: int | None = None
    """Evaluate on this many held-out images of each dataset, drawn by `seed`. None: all."""

    def __post_init__(self) -> None:
        require(self.path, "`data.path` is missing: give a folder of labelled images, e.g. `--data set/`.")
        if isinstance(self.path, list) and len(self.path) == 1:
            object.__setattr__(self, "path", self.path[0])
        fraction("data.eval_fraction", self.eval_fraction, may_be_one=True)
        if not 0 < self.sampling_threshold <= 1:
            raise ConfigError(
                f"`data.sampling_threshold` must be a share of the images, above 0 to 1, got "
                f"{self.sampling_threshold!r}."
            )
        all_at_least(self, "data", 1, "max_images", "max_eval_images")
        if not self.sampling_temperature > 0:
            raise ConfigError(
                f"`data.sampling_temperature` must be positive, got {self.sampling_temperature!r}."
            )
        if len(self.datasets) > 1:
            if self.images is not None:
                raise ConfigError("`data.images` is for one dataset, and `data.path` has several.")
        elif self.sampling not in ("each", "repeat"):
            raise ConfigError(
                f"`data.sampling: {self.sampling}` draws from several datasets, and `data.path` has one. Use "
                "each or repeat."
            )

    @property
    def datasets(self) -> dict[str, str]:
        """Path of each dataset by its name, that of its folder.

        Raises: ConfigError: two of one name, or one that cannot be a name.
        """
        paths = [self.path] if isinstance(self.path, str) else self.path
        return dataset_names(paths) if len(paths) > 1 else {"": paths[0]}


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """Object detection: boxes and classes, trained as DEIMv2 was."""

    kind: Literal["detection"] = "detection"
    """Kind of objective: detection."""
    preset: Literal["derived", "published"] = "derived"
    """derived: everything follows from epochs and data. published: the authors' run as it was, slips
    included; epochs, batch size and learning rates are theirs if not given."""
    class_loss: Literal["mal", "vfl", "focal"] = "mal"
    """Classification loss; mal as published."""
    ema: bool = True
    """Evaluate and save an exponential moving average of the weights."""
    dense_o2o: bool = True
    """Mosaic, MixUp and CopyBlend: more boxes per image."""
    strong_augmentation: bool | None = None
    """Dense O2O, colour changes, zoom-out and crop. true: in the published share of the epochs; false: flips
    only. None: true, but less or none in a short run, unless one of the probabilities below is given."""
    multi_scale: bool = True
    """Batches of several image sizes, for the detectors that were trained so (S to X)."""
    mosaic_prob: float | None = None
    """Share of images that become a Mosaic, in its epochs. None: the published one."""
    mixup_prob: float | None = None
    """Share of batches with MixUp, in its epochs. None: the published one."""
    copyblend_prob: float | None = None
    """Share of the other batches with CopyBlend, in its epochs. None: the published one."""
    colour_prob: float = TrainingSettings.colour_prob
    """Probability of each colour change; 0 if classes differ by colour."""
    vertical_flip_prob: float = TrainingSettings.vertical_flip_prob
    """Probability of an upside-down flip, for aerial or microscope images."""
    min_box_size: int | None = None
    """Boxes with a side below this many pixels of the input are not trained on. None: the published limit, or
    less if that would leave out more than a twentieth of the boxes."""
    merged_mosaic: bool = TrainingSettings.merged_mosaic
    """Warp each tile of a Mosaic once, bilinearly, instead of in the published steps."""
    max_dets: int = 100
    """Detections per image and class that count in an evaluation, at least 100, which is COCO's number."""

    augmentation: str | None = None
    """Own augmentation, applied last: "module:name" of a function or an Albumentations pipeline
    (docs/training-detection.md). None: none."""

    def __post_init__(self) -> None:
        check_probabilities(self, "objective.")
        all_at_least(self, "objective", 1, "min_box_size")
        all_at_least(self, "objective", 100, "max_dets")


@dataclass(frozen=True, kw_only=True)
class DetectionTraining:
    """Training of a detector. `epochs` is enough; None is derived (docs/training-detection.md)."""

    epochs: int | None = None
    """Passes over the data. None: 72, or those of the published run."""
    max_steps: int | None = None
    """Stop after this many optimiser steps; the schedule stays that of `epochs`."""
    batch_size: int | None = None
    """Images per optimiser step, over all devices. None: derived from the number of images."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step, each with its share of the batch."""
    lr: float | None = None
    """Full learning rate of everything but the backbone. None: derived."""
    backbone_lr: float | None = None
    """Full learning rate of the backbone. None: derived."""
    weight_decay: float | None = None
    """AdamW's decoupled weight decay. None: the published one."""
    max_grad_norm: float = TrainingSettings.max_grad_norm
    """Largest gradient norm; gradients are clipped to it. 0: no clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of training. auto: bf16 on a GPU that supports it, else fp32."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between evaluations, or "epoch", or "end" only. The end is always evaluated."""
    eval_batch_size: int | None = None
    """Images per device in evaluation. None: twice a device's training batch."""
    save_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between checkpoints, or "epoch", or "end" only. A run resumes from its newest one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep. The best and the last detector are kept as well."""
    align_every: int | None = None
    """Steps between measurements of the alignment of several datasets' gradients (`thawline align`), each a
    forward and a backward pass over 32 images of every dataset. None: not measured."""
    best_metric: str = "AP"
    """Metric that chooses the best detector (AP, AP50, …)."""
    patience: int | None = None
    """Evaluations without an improvement of `best_metric` after which training ends early. None: it never
    does."""
    on_broken_loss: Literal["stop", "warn"] = "stop"
    """Where the loss is no longer finite: stop with an error, or say so and go on (fp16 may recover)."""
    report_to: str | list[str] = "none"
    """Experiment trackers, by transformers' names (tensorboard, wandb, mlflow, …)."""
    workers: int | None = None
    """Processes that prepare images, per device. None: up to 8 with a GPU, else 0."""
    args: dict[str, Any] = field(default_factory=dict)
    """Any other field of `transformers.TrainingArguments`, by its name there."""

    def __post_init__(self) -> None:
        counts = (
            "gradient_accumulation",
            "log_every",
            "keep_checkpoints",
            "epochs",
            "max_steps",
            "batch_size",
            "patience",
        )
        all_at_least(
            self, "training", 1, *counts, "eval_batch_size", "align_every", "eval_every", "save_every"
        )
        all_at_least(self, "training", 0, "weight_decay", "max_grad_norm", "workers")
        check_patience(self)
        for name in ("lr", "backbone_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"`training.{name}` must be positive, got {value}. None derives it.")


def _names(overrides: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of all settings, also those in parts."""
    for name, value in overrides.items():
        yield name
        if isinstance(value, Mapping):
            yield from _names(value)
