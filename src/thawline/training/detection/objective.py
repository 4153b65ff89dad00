"""The detection objective: labelled images, the detector that learns them, and how good it gets.

DetectionObjective ── schedule     ──► rates and windows, derived from epochs and data
                   ── train_rows   ──► augmented pictures by draw
                   ── load_base    ──► DEIMv2 with the data's classes
                   ── evaluate     ──► COCO's numbers on the held-out images
"""

from __future__ import annotations

__all__ = ["DetectionObjective"]

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback

from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.collate import Collate, to_float
from thawline.data.detection.dataset import DetectionDataset, Sample, load_detection
from thawline.data.detection.drawing import Panel, panel_grid, save_image
from thawline.data.detection.geometry import resize
from thawline.data.detection.records import DetectionSet, ImageRecord, clip_boxes
from thawline.data.draws import Draw
from thawline.errors import ConfigError, DataError
from thawline.metrics.detection import STATISTICS, DetectionEvaluator, DetectionMetrics
from thawline.models.deimv2.checkpoints.read import read_checkpoint
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.variants import get_variant
from thawline.ops.boxes import cxcywh_to_xyxy
from thawline.recipe import (
    DetectionBase,
    DetectionData,
    DetectionSettings,
    DetectionTraining,
    Full,
    Mhr,
    RunConfig,
    TunerSettings,
)
from thawline.training.detection.backbone import tune_backbone
from thawline.training.detection.schedule import (
    DetectionSchedule,
    derive_schedule,
    override,
    published_schedule,
)
from thawline.training.evaluation import Evaluation
from thawline.training.objective import Objective, ReadRows
from thawline.training.trainer import Trainer

logger = logging.getLogger(__name__)

USUAL_EPOCHS = 72
"""Of a derived run that is told none: what N needs from a pretrained backbone on a few hundred images."""
EVAL_SPLITS = ("val", "valid", "validation", "test")
SHOWN_SCORE = 0.05
"""Detections below this score are left out of predictions.jsonl."""


class DetectionObjective(Objective):
    """Labelled images and the detector that learns them.

    Raises: DataError: data that cannot be trained on, all its faults named. ConfigError: settings that do not
        fit.
    """

    settings: DetectionSettings
    base: DetectionBase
    data: DetectionData
    training: DetectionTraining
    smaller_is_better: tuple[str, ...] = ()
    held_out_rows: Sequence[ImageRecord] = ()

    def __init__(self, config: RunConfig, *, read: ReadRows = "all", described: Mapping[str, Any]) -> None:
        super().__init__(config, read=read, described=described)
        base, data, seed = self.base, self.data, config.seed
        self.seed = seed
        trained_on = tuple(described.get("class_names", ()))
        self.size = base.size or get_variant(base.variant).config.image_size[0]
        records: Sequence[ImageRecord] = ()
        self.class_names = trained_on
        if read != "none":
            found = load_detection(data.path, None if data.format == "auto" else data.format, data.images)
            records, self.held_out_rows = _split(found, data, seed)
            self.class_names = _classes(found, trained_on, data.path)
        self.records = records if read == "all" else ()
        if read == "all" and not self.records:
            raise DataError(f"'{data.path}' holds no image to train on: all are held out.")

    @cached_property
    def schedule(self) -> DetectionSchedule:
        """Rates and windows of the run."""
        schedule = self._published() if self.settings.preset == "published" else self._derived()
        settings = override(schedule.settings, self.base, self.settings, self.training)
        n_batches = max(1, len(self.records) // self._per_forward(settings.batch_size))
        steps = math.ceil(math.ceil(n_batches / _n_devices()) / self.training.gradient_accumulation)
        return dataclasses.replace(schedule, settings=settings, steps_per_epoch=steps)

    @property
    def device_batch_size(self) -> int:
        """Images in one forward pass of one device."""
        return self._per_forward(self.schedule.settings.batch_size)

    @cached_property
    def start(self) -> Literal["scratch", "backbone", "detector"]:
        """What the weights come from."""
        if self.base.weights is None:
            return "scratch"
        return "backbone" if read_checkpoint(self.base.weights).layout == "backbone" else "detector"

    @cached_property
    def train_rows(self) -> TrainingImages:
        """Training pictures, by draw."""
        return TrainingImages(
            DetectionDataset(self.records),
            self.schedule.settings,
            seed=self.seed,
            batch_size=self.device_batch_size,
            n_lanes=8 * _n_devices(),
        )

    @cached_property
    def collate(self) -> Collate:
        """Samples to a batch."""
        return Collate(self.schedule.settings, seed=self.seed)

    def first_batch(self, epoch: int = 0) -> dict[str, Any]:
        """The first batch of an epoch, as the network will get it."""
        n = min(self.device_batch_size, len(self.records))
        return self.collate([self.train_rows[Draw(epoch, position)] for position in range(n)])

    def _pictures(self, epoch: int, n: int) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        batch = self.first_batch(epoch)
        for picture, target in zip(batch["pixel_values"][:n], batch["targets"], strict=False):
            yield picture.permute(1, 2, 0).numpy(), target

    def load_base(self, source: str | None = None) -> DEIMv2:
        """The detector with the data's classes; with `source`, one that a run saved, as it is."""
        if source is not None:
            return DEIMv2.from_pretrained(source)
        overrides = {
            **self.base.overrides,
            "class_names": self.class_names,
            "image_size": (self.size, self.size),
            "criterion": {
                "class_loss": self.settings.class_loss,
                "matcher_change_epoch": self.schedule.settings.matcher_change_epoch,
            },
        }
        if self.base.weights is None:
            return DEIMv2.from_variant(self.base.variant, **overrides)
        return DEIMv2.from_pretrained(self.base.weights, self.base.variant, **overrides)

    def attach_tuner(self, model: nn.Module, tuner: TunerSettings, *, saved: bool = False) -> nn.Module:
        """Apply the tuner to the backbone; the rest trains.

        Raises: ConfigError: for a tuner that routes tasks, or that would keep random weights frozen.
        """
        if isinstance(tuner, Mhr):
            raise ConfigError(
                f"`tuner: {tuner.method}` routes tasks, and a detector has one. Use lora or paca."
            )
        if not isinstance(tuner, Full) and self.start == "scratch":
            raise ConfigError(
                f"`tuner: {tuner.method}` would keep a backbone of random weights. Give pretrained "
                "ones as `base.weights`, or `--tuner none` to train all of it."
            )
        return tune_backbone(model, tuner)

    def build_trainer(self, model: nn.Module, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
        """Build the detector's trainer. Raises: ConfigError: as `detection_arguments`."""
        # The trainer is written for this class.
        from thawline.training.detection.trainer import DetectionTrainer, detection_arguments

        config = self.config
        arguments = detection_arguments(
            self.training, self, folder=config.run_folder, tuner=config.tuner, seed=config.seed
        )
        return DetectionTrainer(model, arguments, self, config.tuner, callbacks)

    def preview(self) -> str:
        """The first training picture, in words."""
        sample = self.train_rows[Draw(0, 0)]
        counts = Counter(self.class_names[label] for label in sample.labels)
        boxes = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "no boxes"
        return f"{self.records[sample.index].path.name} at {self.size} × {self.size}: ⟦{boxes}⟧"

    def save_pictures(self, folder: Path) -> None:
        """training.png: pictures as the network gets them, of the epochs with Mosaic and of those after."""
        panels = []
        for name in ("mosaic", "strong", "stage_2"):
            start, stop = self.schedule.windows[name]
            if start == stop:
                continue
            epoch = stop - 1
            for picture, target in self._pictures(epoch, n=4):
                panels.append(
                    Panel(
                        image=picture,
                        boxes_xyxy=cxcywh_to_xyxy(target["boxes"]).numpy() * len(picture),
                        labels=target["labels"].numpy(),
                        caption=f"epoch {epoch}",
                    )
                )
        save_image(folder / "training.png", panel_grid(panels, self.class_names))

    def describe(self) -> dict[str, Any]:
        """The classes."""
        return {"class_names": list(self.class_names)}

    def evaluate(self, model: nn.Module, batch_size: int) -> Evaluation:
        """COCO's numbers, over all and by class. In a process group each process takes its share."""
        metrics, evaluator = self.measure(model, batch_size)
        rows = [
            {"image": record.path.name, "detections": self._told(evaluator, index)}
            for index, record in enumerate(self.held_out_rows)
        ]
        by_class = {
            entry.name: {"rows": entry.n_boxes, **_finite({key: getattr(entry, key) for key in _OF_CLASS})}
            for entry in metrics.classes
        }
        return Evaluation(
            metrics=_finite(metrics.statistics),
            parts=by_class,
            rows=rows,
            files={"detection_metrics.json": metrics.to_dict()},
            detections=(DetectionDataset(self.held_out_rows), evaluator, metrics),
        )

    def measure(self, model: nn.Module, batch_size: int) -> tuple[DetectionMetrics, DetectionEvaluator]:
        """Every metric there is, and the detections behind it."""
        evaluator = DetectionEvaluator(self.held_out_rows, self.class_names)
        model.eval()
        for indices, found in self._detect(model, batch_size):
            evaluator.update(indices, found)
        return evaluator.compute(), evaluator

    def _detect(self, model: nn.Module, batch_size: int) -> Iterator[tuple[list[int], list[Any]]]:
        """Detections on the held-out images that are this process's share."""
        device = next(model.parameters()).device
        config: Any = model.config
        mine = range(_rank(), len(self.held_out_rows), _n_devices())
        images = DetectionDataset(self.held_out_rows, transform=self._fit)
        loader = DataLoader(
            torch.utils.data.Subset(images, mine),
            batch_size=batch_size,
            num_workers=self.workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # leaves the run's own random state alone
        )
        bar = tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=len(loader) < 20 or None)
        with torch.no_grad():
            for pixels, indices, sizes in bar:
                inputs = to_float(pixels.to(device), mean=config.image_mean, std=config.image_std)
                yield indices, model.postprocess(model(inputs), sizes)

    @property
    def workers(self) -> int:
        """Processes that prepare pictures, per device."""
        if self.training.workers is not None:
            return self.training.workers
        if not torch.cuda.is_available():
            return 0
        return min(8, max(1, (os.cpu_count() or 1) // max(1, torch.cuda.device_count()) - 1))

    def _published(self) -> DetectionSchedule:
        schedule, epochs = published_schedule(self.base.variant, 1), self.training.epochs
        if epochs not in (None, schedule.epochs):
            raise ConfigError(
                f"`training.epochs={epochs}`: the published run of '{self.base.variant}' has "
                f"{schedule.epochs}, and its windows are made for them. Leave it out, or use "
                "`objective.preset: derived`."
            )
        return schedule

    def _derived(self) -> DetectionSchedule:
        return derive_schedule(
            self.training.epochs or USUAL_EPOCHS,
            variant=self.base.variant,
            n_images=len(self.records),
            batch_size=self.training.batch_size,
            size=self.size,
            start=self.start,
            box_sides=_shorter_sides(self.records),
        )

    def _fit(self, sample: Sample) -> Sample:
        return dataclasses.replace(sample, image=resize(sample.image, self.size, self.size))

    def _told(self, evaluator: DetectionEvaluator, index: int) -> list[dict[str, Any]]:
        found = evaluator.detections(index)
        return [
            {"class": self.class_names[label], "score": round(score, 4), "xyxy": [round(v, 1) for v in box]}
            for box, score, label in zip(
                found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
            )
            if score >= SHOWN_SCORE
        ]

    def _per_forward(self, batch_size: int) -> int:
        parts = _n_devices() * self.training.gradient_accumulation
        if batch_size % parts and self.training.batch_size is not None:
            raise ConfigError(
                f"`training.batch_size={batch_size}` does not divide among {_n_devices()} devices × "
                f"{self.training.gradient_accumulation} forward passes. Use a multiple of {parts}."
            )
        return max(1, batch_size // parts)


def _shorter_sides(records: Sequence[ImageRecord]) -> np.ndarray:
    """Of the boxes that are learned, in images of side 1, (N,)."""
    sides = [np.empty((0, 2))]
    for record in records:
        boxes = clip_boxes(record.boxes_xyxy[~record.iscrowd], record.width, record.height)
        sides.append((boxes[:, 2:] - boxes[:, :2]) / (record.width, record.height))
    shorter = np.concatenate(sides).min(axis=1)
    return shorter[shorter > 0]


_OF_CLASS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")
assert set(_OF_CLASS) <= set(STATISTICS)


def _split(
    found: DetectionSet, data: DetectionData, seed: int
) -> tuple[Sequence[ImageRecord], Sequence[ImageRecord]]:
    """Images to learn from, and images to judge by."""
    held_out: Sequence[ImageRecord]
    train = found.records(data.train_split)
    name = data.eval_split or next(
        (s for s in EVAL_SPLITS if s in found.splits and s != data.train_split), None
    )
    if name is not None:
        held_out = found.records(name)
    else:
        order = np.random.default_rng(seed).permutation(len(train))
        n = round(len(train) * data.eval_fraction)
        logger.info("'%s' holds no other split: %d of %d images are held out.", data.path, n, len(train))
        held_out = [train[i] for i in sorted(order[:n])]
        train = tuple(train[i] for i in sorted(order[n:]))
    return _draw(train, data.max_images, seed), _draw(held_out, data.max_eval_images, seed)


def _draw(records: Sequence[ImageRecord], n: int | None, seed: int) -> Sequence[ImageRecord]:
    if n is None or n >= len(records):
        return records
    return [records[i] for i in sorted(np.random.default_rng(seed).permutation(len(records))[:n])]


def _classes(found: DetectionSet, trained_on: tuple[str, ...], path: str) -> tuple[str, ...]:
    """The classes of the data, which must be those of the run that is looked at."""
    if trained_on and trained_on != found.class_names:
        raise DataError(
            f"'{path}' has the classes {', '.join(found.class_names)}; the detector was trained on "
            f"{', '.join(trained_on)}. Evaluate on data with the same classes, in the same order."
        )
    return found.class_names


def _stack(items: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> tuple[Tensor, list[int], Tensor]:
    """Pictures, their places, and their (height, width) before they were resized."""
    pixels = torch.stack([image for image, _ in items])
    sizes = torch.stack([target["orig_size"].flip(0) for _, target in items])
    return pixels, [int(target["index"]) for _, target in items], sizes


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """Without what there was nothing to measure for."""
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _n_devices() -> int:
    """Processes that train together, as torchrun says, also before the process group is up."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
