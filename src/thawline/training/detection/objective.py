"""The detection objective: labelled images, the detector trained on them, and its evaluation.

DetectionObjective ── schedule      ──► rates and windows, derived from epochs and data
                   ── train_rows    ──► augmented images by draw
                   ── load_base     ──► DEIMv2 with the data's classes
                   ── build_trainer ──► DetectionTrainer
                   ── evaluate      ──► COCO metrics on the held-out images
"""

from __future__ import annotations

__all__ = ["DetectionObjective"]

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.collate import Collate
from thawline.data.detection.drawing import Panel, panel_grid, save_image
from thawline.data.detection.mixture import MixedImages
from thawline.data.detection.records import ImageRecord
from thawline.data.draws import Draw
from thawline.domains import BASE, DOMAINS
from thawline.domains.domain import base_digest, load_domain
from thawline.errors import ConfigError
from thawline.files import read_json
from thawline.metrics.detection import DetectionEvaluator, DetectionMetrics
from thawline.models.deimv2.checkpoints.read import read_checkpoint
from thawline.models.deimv2.config import with_overrides
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.network.hybrid_encoder import HybridEncoderConfig
from thawline.models.deimv2.variants import get_variant
from thawline.ops.boxes import cxcywh_to_xyxy
from thawline.ops.lean import is_lean
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
from thawline.recipe.checks import height_width
from thawline.training.callbacks import Annealing
from thawline.training.checkpoints import load_state
from thawline.training.detection.arguments import detection_arguments
from thawline.training.detection.backbone import tune_backbone
from thawline.training.detection.datasets import (
    RunDataset,
    build_images,
    check_boxes,
    count_batches,
    read_dataset,
)
from thawline.training.detection.detectors import Detectors
from thawline.training.detection.domain import DomainRun, ExtendedDomainRun, save_domains
from thawline.training.detection.evaluation import (
    mean_evaluation,
    measure_detector,
    n_devices,
    to_evaluation,
)
from thawline.training.detection.learner import HostTargets, Learner
from thawline.training.detection.schedule import (
    DetectionSchedule,
    asks_for_augmentation,
    derive_schedule,
    override,
    published_schedule,
)
from thawline.training.detection.split import shorter_sides, warn_of_crowded
from thawline.training.detection.trainer import SCORES, WEIGHTS, DetectionTrainer
from thawline.training.evaluation import Evaluation
from thawline.training.objective import Objective, ReadRows

logger = logging.getLogger(__name__)

ALIGN_IMAGES = 32
"""Images of each dataset that alignment is measured on."""
DEFAULT_EPOCHS = 72
"""Epochs of a derived run: N needs them from a pretrained backbone on a few hundred images."""


class DetectionObjective(Objective):
    """Labelled images and the detector that is trained on them.

    Raises: DataError: data that cannot be trained on, with all its faults. ConfigError: settings that do not
        fit.
    """

    settings: DetectionSettings
    base: DetectionBase
    data: DetectionData
    training: DetectionTraining

    def __init__(self, config: RunConfig, *, read: ReadRows = "all", described: Mapping[str, Any]) -> None:
        super().__init__(config, read=read, described=described)
        run = ExtendedDomainRun if config.added_classes else DomainRun
        self.domain = run(config) if config.keeps_base and read == "all" else None
        usual: Any = described.get("image_size", get_variant(self.base.variant).config.image_size)
        usual = usual if self.domain is None else self.domain.image_size
        self.size = height_width("base.size", self.base.size or usual)
        """Height and width of the input, pixels."""
        if self.domain is not None and self.size != self.domain.image_size:
            raise ConfigError(
                f"`base.size={self.base.size}`: the domains of a base share its size, which is "
                f"{list(self.domain.image_size)}. Leave it out."
            )
        names = described.get("class_names", () if self.domain is None else self.domain.class_names)
        known = described.get("datasets", {"": names})
        self.datasets = tuple(
            read_dataset(
                self.data, path, name=name, seed=config.seed, read=read, class_names=known.get(name, ())
            )
            for name, path in self.data.datasets.items()
        )
        """Datasets that the run trains and is evaluated on: one, or several."""
        if read == "all" and config.added_classes:
            check_boxes(self.datasets[0], config.added_classes)

    @cached_property
    def records(self) -> list[ImageRecord]:
        """Images to train on, of all datasets."""
        return [record for dataset in self.datasets for record in dataset.records]

    @cached_property
    def held_out_rows(self) -> list[ImageRecord]:
        """Images to judge by, of all datasets."""
        return [record for dataset in self.datasets for record in dataset.held_out]

    @cached_property
    def schedule(self) -> DetectionSchedule:
        """Rates and windows of the run."""
        schedule = self._published() if self.settings.preset == "published" else self._derived()
        settings = override(schedule.settings, self.base, self.settings, self.training)
        batch_size = self._per_forward(settings.batch_size)
        n_batches = sum(count_batches(self.datasets, self.data, batch_size))
        steps = math.ceil(math.ceil(n_batches / n_devices()) / self.training.gradient_accumulation)
        given = {"rates": self.training.lr, "boxes": self.settings.min_box_size}
        reasons = {name: why for name, why in schedule.reasons.items() if given.get(name) is None}
        return replace(schedule, settings=settings, steps_per_epoch=steps, reasons=reasons)

    @property
    def device_batch_size(self) -> int:
        """Images in one forward pass of one device."""
        return self._per_forward(self.schedule.settings.batch_size)

    @cached_property
    def start(self) -> Literal["scratch", "backbone", "detector"]:
        """Source of the initial weights."""
        if self.base.weights is None:
            return "scratch"
        return "backbone" if read_checkpoint(self.base.weights).layout == "backbone" else "detector"

    def row_facts(self) -> Iterator[bytes]:
        """Return name, boxes and classes of each training image."""
        for record in self.records:
            yield record.path.name.encode() + record.boxes_xyxy.tobytes() + record.labels.tobytes()

    @cached_property
    def train_rows(self) -> TrainingImages | MixedImages:
        """Augmented training images, by draw."""
        return build_images(
            self.datasets, self.data, self.schedule.settings, batch_size=self.device_batch_size,
            seed=self.config.seed, augmentation=self.settings.augmentation,
        )  # fmt: skip

    @cached_property
    def collate(self) -> Collate:
        """Collation of samples into a batch."""
        return Collate(self.schedule.settings, seed=self.config.seed)

    @property
    def workers(self) -> int:
        """Processes that prepare images, per device."""
        if self.training.workers is not None:
            return self.training.workers
        if not torch.cuda.is_available():
            return 0
        return min(8, max(1, (os.cpu_count() or 1) // max(1, torch.cuda.device_count()) - 1))

    def first_batch(self, epoch: int = 0, dataset: int = 0) -> dict[str, Any]:
        """Return a dataset's first batch of an epoch, as the network gets it."""
        return next(self._batches_of(dataset, epoch))

    def _batches_of(self, dataset: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield a dataset's whole batches of an epoch; its only one, if it has fewer images."""
        rows = self.train_rows
        images = rows.parts[dataset] if isinstance(rows, MixedImages) else rows
        size = min(self.device_batch_size, len(images.order))
        for start in range(0, len(images.order) - size + 1, size):
            yield self.collate([images[Draw(epoch, start + place)] for place in range(size)])

    @property
    def align_every(self) -> int | None:
        """Steps between measurements of gradient alignment. None: not measured."""
        return self.training.align_every

    def alignment_batches(self) -> dict[str, list[Any]]:
        """Return batches of each dataset, as the last epoch has them: without strong augmentation.

        Raises: ConfigError: there is one dataset.
        """
        if len(self.datasets) == 1:
            raise ConfigError("Alignment is between datasets, and the run has one (docs/domains.md).")
        n, epoch = max(1, ALIGN_IMAGES // self.device_batch_size), self.schedule.epochs - 1
        return {
            dataset.name: [
                {"pixel_values": batch["pixel_values"], "targets": HostTargets(batch["targets"], number)}
                for batch in islice(self._batches_of(number, epoch), n)
            ]
            for number, dataset in enumerate(self.datasets)
        }

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the sum of a batch's loss terms, in which alignment is measured."""
        learner = model if isinstance(model, Learner) else Learner(model)
        return torch.stack(list(learner(**batch, epoch=0).values())).sum()

    def load_base(self, source: str | None = None) -> DEIMv2 | Detectors:
        """Load the detector with the data's classes, of several datasets one for each.

        Args:
            source: detector that a run saved, which is loaded as it is.
        """
        if len(self.datasets) == 1:
            if source is not None:
                return DEIMv2.from_pretrained(source, **self._position_order())
            return self._new_detector(self.datasets[0])
        names = [dataset.name for dataset in self.datasets]
        if source is None:
            return Detectors(names, [self._new_detector(dataset) for dataset in self.datasets]).share()
        base = DEIMv2.from_pretrained(Path(source) / BASE)
        digest, folder = base_digest(base), Path(source) / DOMAINS
        return Detectors(names, [load_domain(base, folder / name, digest) for name in names])

    def load_tuned(self, folder: Path | None) -> nn.Module:
        """Load what a run saved in `folder`: a detector, adapters merged, or a checkpoint, as it trains.

        None: the base as it is.
        """
        if folder is None:
            return super().load_tuned(None)
        if (folder / SCORES).is_file():
            learner = Learner(self.build_model())
            learner.load_state_dict(load_state(folder / WEIGHTS))
            return learner.detector
        return self.load_base(str(folder))

    def _new_detector(self, dataset: RunDataset) -> DEIMv2:
        overrides = {
            **self.base.overrides,
            **self._position_order(),
            "class_names": dataset.class_names,
            "image_size": self.size,
            "class_loss": self.settings.class_loss,
            "matcher_change_epoch": self.schedule.settings.matcher_change_epoch,
        }
        if self.base.weights is None:
            model = DEIMv2.from_variant(self.base.variant, **overrides)
        elif self.domain is not None:
            model = self.domain.new_detector(overrides)
        else:
            model = DEIMv2.from_pretrained(self.base.weights, self.base.variant, **overrides)
        warn_of_crowded(dataset.records, model.config.decoder.num_queries)
        return model

    def attach_tuner(self, model: nn.Module, tuner: TunerSettings, *, saved: bool = False) -> nn.Module:
        """Apply the tuner to the backbone; the rest trains. A domain is an adapter on all of the detector.

        Raises: ConfigError: for a tuner that routes tasks, or that would keep random weights frozen; for
            `lean`, where the detector has nothing for it.
        """
        if self.config.lean and not is_lean(model):
            raise ConfigError(f"`lean`: '{self.base.variant}' has nothing that can be lean. Leave it out.")
        if isinstance(model, Detectors):
            if self.domain is None:
                model.requires_grad_(True)
                return model
            self.domain.attach(model.member(0))
            return model.share()
        if self.domain is not None and isinstance(model, DEIMv2):
            return self.domain.attach(model)
        if not isinstance(tuner, Full) and self.start == "scratch":
            raise ConfigError(
                f"`tuner: {tuner.method}` would keep a backbone of random weights. Give pretrained "
                "ones as `base.weights`, or `--tuner none` to train all of it."
            )
        return tune_backbone(model, tuner)

    def build_trainer(self, model: nn.Module, callbacks: Sequence[TrainerCallback] = ()) -> DetectionTrainer:
        """Build the detector's trainer. Raises: ConfigError: see `detection_arguments`."""
        arguments, tuner = detection_arguments(self.config, self), self.config.tuner
        if isinstance(tuner, Mhr) and tuner.anneal:
            callbacks = [*callbacks, Annealing(tuner.anneal)]
        return DetectionTrainer(model, arguments, self, tuner, callbacks)

    def preview(self) -> str:
        """Describe the first training image in words."""
        sample = self.train_rows[Draw(0, 0)]
        dataset = self.datasets[sample.dataset]
        counts = Counter(dataset.class_names[label] for label in sample.labels)
        boxes = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "no boxes"
        name, (height, width) = dataset.records[sample.index].path.name, self.size
        name = f"{dataset.name}/{name}" if dataset.name else name
        return f"{name} at {height} × {width}: ⟦{boxes}⟧"

    def save_images(self, folder: Path) -> None:
        """Draw training.png: images as the network gets them, from the last epoch of each phase."""
        panels: list[Panel] = []
        names: list[str] = []
        windows = [self.schedule.windows[name] for name in ("mosaic", "strong", "stage_2")]
        # A run of one epoch may have none of the phases.
        epochs = [stop - 1 for start, stop in windows if start < stop] or [self.schedule.epochs - 1]
        for number, dataset in enumerate(self.datasets):
            for epoch in epochs:
                batch = self.first_batch(epoch, number)
                height, width = batch["pixel_values"].shape[-2:]
                panels += [
                    Panel(
                        image=pixels.permute(1, 2, 0).numpy(),
                        boxes_xyxy=cxcywh_to_xyxy(target["boxes"]).numpy() * ([width, height] * 2),
                        labels=target["labels"].numpy() + len(names),
                        caption=f"{dataset.name} epoch {epoch}".strip(),
                    )
                    for pixels, target in zip(batch["pixel_values"][:4], batch["targets"][:4], strict=True)
                ]
            names += dataset.class_names
        save_image(folder / "training.png", panel_grid(panels, names))

    def describe(self) -> dict[str, Any]:
        """Return the class names; of a domain also its size, which is that of its base."""
        size = {} if self.domain is None else {"image_size": list(self.size)}
        if len(self.datasets) > 1:
            return {"datasets": {one.name: list(one.class_names) for one in self.datasets}, **size}
        return {"class_names": list(self.datasets[0].class_names), **size}

    def evaluate(self, model: nn.Module, batch_size: int) -> Evaluation:
        """Evaluate on the held-out images. In a process group each process takes its share."""
        if not isinstance(model, Detectors):
            return self._evaluate(model, batch_size, self.datasets[0])
        return mean_evaluation(
            {
                dataset.name: self._evaluate(model.member(number), batch_size, dataset)
                for number, dataset in enumerate(self.datasets)
                if dataset.held_out
            }
        )

    def _evaluate(self, model: nn.Module, batch_size: int, dataset: RunDataset) -> Evaluation:
        found = self.measure(model, batch_size, dataset)
        return to_evaluation(dataset.held_out, *found, class_ids=dataset.class_ids)

    def measure(
        self, model: nn.Module, batch_size: int, dataset: RunDataset | None = None
    ) -> tuple[DetectionMetrics, DetectionEvaluator]:
        """Compute every metric on a dataset's held-out images; return it with the detections behind it."""
        dataset = dataset or self.datasets[0]
        return measure_detector(
            model,
            dataset.held_out,
            dataset.class_names,
            size=self.size,
            batch_size=batch_size,
            workers=self.workers,
            max_dets=self.settings.max_dets,
        )

    def save(self, model: nn.Module, evaluation: Evaluation | None, folder: Path) -> None:
        """Write the detector and its domains as they stand (`save_domains`)."""
        found = {} if evaluation is None else evaluation.datasets or {"": evaluation}
        save_domains(model, self.config, self.domain, found, folder)

    def _position_order(self) -> dict[str, Any]:
        """Return what a rectangle asks of the encoder: the rows and columns that published weights know."""
        config = get_variant(self.base.variant).config
        if (
            self.domain is not None
            or self.size[0] == self.size[1]
            or not isinstance(config.encoder, HybridEncoderConfig)
        ):
            return {}
        encoder: Any = with_overrides(config, {"position_order": "row_column", **self.base.overrides}).encoder
        return {"position_order": encoder.position_order}

    def _published(self) -> DetectionSchedule:
        schedule, epochs = published_schedule(self.base.variant, 1), self.training.epochs
        if self.training.patience is not None:
            raise ConfigError(
                "`training.patience`: a published run has its length. Leave it out, or use derived."
            )
        if epochs not in (None, schedule.epochs):
            raise ConfigError(
                f"`training.epochs={epochs}`: the published run of '{self.base.variant}' has "
                f"{schedule.epochs}, and its windows are made for them. Leave it out, or use "
                "`objective.preset: derived`."
            )
        return schedule

    def _derived(self) -> DetectionSchedule:
        return derive_schedule(
            self.training.epochs or DEFAULT_EPOCHS,
            variant=self.base.variant,
            n_images=len(self.records),
            batch_size=self.training.batch_size or self._resumed_batch_size(),
            size=self.size,
            start=self.start if self.domain is None else "domain",
            box_sides=shorter_sides(self.records, self.size),
            strong_augmentation=asks_for_augmentation(self.settings),
        )

    def _resumed_batch_size(self) -> int | None:
        """Return the batch that this run's steps have had: in a longer run, an epoch stays as many steps."""
        folder = self.config.run_folder
        has_steps = any(folder.glob("checkpoint-*"))
        return read_json(folder / "plan.json").get("rows_a_step") if has_steps else None

    def _per_forward(self, batch_size: int) -> int:
        parts = n_devices() * self.training.gradient_accumulation
        if batch_size % parts and self.training.batch_size is not None:
            raise ConfigError(
                f"`training.batch_size={batch_size}` does not divide among {n_devices()} devices × "
                f"{self.training.gradient_accumulation} forward passes. Use a multiple of {parts}."
            )
        return max(1, batch_size // parts)
