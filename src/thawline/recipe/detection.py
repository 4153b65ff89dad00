"""Detectors: size and weights, images, the losses, and how they train."""

from __future__ import annotations

__all__ = [
    "DetectionBase",
    "DetectionData",
    "DetectionSettings",
    "DetectionTraining",
]

from dataclasses import dataclass, field
from typing import Any, Literal

from thawline.errors import ConfigError
from thawline.recipe.checks import at_least, fraction, require
from thawline.recipe.resolved import TrainingSettings, check_probabilities


@dataclass(frozen=True, kw_only=True)
class DetectionBase:
    """The detector that is trained: a size of DEIMv2, and what its weights come from."""

    variant: Literal["atto", "femto", "pico", "n", "s", "m", "l", "x"] = "n"
    """Size. Atto to N have an HGNetv2 backbone, S to X a vision transformer."""
    weights: str | None = None
    """What to start from: a detector (a run's folder, a file, a folder, a Hub id; a size's name for its
    published weights) or a pretrained backbone. None: random weights."""
    size: int | None = None
    """Side of the square input in pixels, a multiple of 32. None: the published one."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Other settings of the network, by the names of its config (`{num_queries: 500}`)."""

    def __post_init__(self) -> None:
        if self.size is not None and (self.size < 32 or self.size % 32):
            raise ConfigError(f"`base.size` must be a multiple of 32, got {self.size}: 320, 416, 640, …")

    @property
    def label(self) -> str:
        """What is trained, for messages and names."""
        return f"deimv2_{self.variant}"


@dataclass(frozen=True, kw_only=True)
class DetectionData:
    """Labelled images: COCO, YOLO or Pascal VOC."""

    path: str = ""
    """Folder, COCO JSON or data.yaml."""
    format: Literal["auto", "coco", "yolo", "voc"] = "auto"
    """auto: found by looking."""
    images: str | None = None
    """Folder that image names start from. None: looked for around the annotations."""
    train_split: str = "train"
    """Split to learn from."""
    eval_split: str | None = None
    """Split to evaluate on. None: val, valid, validation or test, whichever is there first."""
    eval_fraction: float = 0.1
    """Share of the training images to hold out, drawn by `seed`, where there is no other split."""
    max_images: int | None = None
    """Use this many training images, drawn by `seed`. None: all."""
    max_eval_images: int | None = None
    """Evaluate on this many held-out images, drawn by `seed`. None: all."""

    def __post_init__(self) -> None:
        require(self.path, "`data.path` is missing: give a folder of labelled images, e.g. `--data set/`.")
        fraction("data.eval_fraction", self.eval_fraction)
        for name in ("max_images", "max_eval_images"):
            if getattr(self, name) is not None:
                at_least(f"data.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """Find objects: boxes and classes, as DEIMv2 learns them."""

    kind: Literal["detection"] = "detection"
    """detection."""
    preset: Literal["derived", "published"] = "derived"
    """derived: everything follows from epochs and data. published: the authors' run as it was, slips
    included; epochs, batch and rates are theirs where not given."""
    class_loss: Literal["mal", "vfl", "focal"] = "mal"
    """Loss on the classes; mal as published."""
    ema: bool = True
    """Evaluate and keep an average of the weights."""
    dense_o2o: bool = True
    """Mosaic, MixUp and CopyBlend: more boxes a picture."""
    strong_augmentation: bool = True
    """All of it: Dense O2O, colours, zoom-out, crop. Off: flips alone."""
    multi_scale: bool = True
    """Batches of several sizes, for the sizes of network that were trained so (S to X)."""
    mosaic_prob: float | None = None
    """None: the size's published one; so for the next two."""
    mixup_prob: float | None = None
    """Share of the batches with MixUp, in its epochs."""
    copyblend_prob: float | None = None
    """Share of the other batches with CopyBlend, in its epochs."""
    colour_prob: float = TrainingSettings.colour_prob
    """Chance of each change of colour; 0 where colour is what tells classes apart."""
    vertical_flip_prob: float = TrainingSettings.vertical_flip_prob
    """Chance of turning an image upside down: for pictures from the air or the microscope."""
    min_box_size: int | None = None
    """Pixels of the input: boxes with a shorter side are not learned. None: the published one, or less where
    that would leave out more than a twentieth of the boxes."""
    merged_mosaic: bool = TrainingSettings.merged_mosaic
    """Warp each tile of a Mosaic once, bilinearly, instead of by the published steps."""

    def __post_init__(self) -> None:
        check_probabilities(self, "objective.")
        if self.min_box_size is not None:
            at_least("objective.min_box_size", self.min_box_size, 1)


@dataclass(frozen=True, kw_only=True)
class DetectionTraining:
    """How a detector is trained. `epochs` is enough; None is derived (docs/training-detection.md)."""

    epochs: int | None = None
    """Passes over the data. None: 72, or those of the published run."""
    max_steps: int | None = None
    """Stop after this many optimiser steps; the schedule stays that of `epochs`."""
    batch_size: int | None = None
    """Images per optimiser step, over all devices. None: derived from the number of images."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step, each with its share of the batch."""
    lr: float | None = None
    """Full learning rate of all but the backbone. None: derived."""
    backbone_lr: float | None = None
    """Full learning rate of the backbone. None: derived."""
    weight_decay: float | None = None
    """AdamW's decoupled weight decay. None: the published one."""
    max_grad_norm: float = TrainingSettings.max_grad_norm
    """Gradients are clipped to this norm. 0: not."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training. auto: bf16 on a GPU that supports it, else fp32."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between evaluations, or once an epoch, or at the end only. The end is always evaluated."""
    eval_batch_size: int | None = None
    """Images per device in evaluation. None: twice the batch of a device."""
    save_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between checkpoints, or once an epoch, or at the end only. A run resumes from its newest one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept. The best and the last detector lie beside them."""
    best_metric: str = "AP"
    """Metric that chooses the best detector (AP, AP50, …)."""
    report_to: str | list[str] = "none"
    """Trackers as transformers knows them (tensorboard, wandb, mlflow, …)."""
    workers: int | None = None
    """Processes that prepare pictures, per device. None: up to 8 beside a GPU, else 0."""
    args: dict[str, Any] = field(default_factory=dict)
    """Any other field of `transformers.TrainingArguments`, by its name there."""

    def __post_init__(self) -> None:
        for name in ("gradient_accumulation", "log_every", "keep_checkpoints"):
            at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("epochs", "max_steps", "batch_size", "eval_batch_size"):
            if getattr(self, name) is not None:
                at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("eval_every", "save_every"):
            if not isinstance(getattr(self, name), str):
                at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("weight_decay", "max_grad_norm", "workers"):
            if getattr(self, name) is not None:
                at_least(f"training.{name}", getattr(self, name), 0)
        for name in ("lr", "backbone_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"`training.{name}` must be positive, got {value}. None derives it.")
