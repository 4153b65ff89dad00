"""TrainingArguments of a detector's recipe, and the data that its trainer asks for."""

from __future__ import annotations

__all__ = ["DetectionTrainingData", "detection_arguments"]

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainingArguments

from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.collate import Collate
from thawline.data.detection.mixture import MixedImages
from thawline.errors import ConfigError
from thawline.models.deimv2.model import DEIMv2
from thawline.recipe import DetectionBase, DetectionSettings, DetectionTraining, RunConfig, Training
from thawline.training.arguments import training_arguments
from thawline.training.detection.datasets import RunDataset
from thawline.training.detection.detectors import Detectors
from thawline.training.detection.domain import DomainRun
from thawline.training.detection.schedule import DetectionSchedule
from thawline.training.evaluation import Evaluation, TrainingData

# Fields that `Training` and `DetectionTraining` have in common, with the same meaning.
_COMMON = (
    "max_steps", "gradient_accumulation", "max_grad_norm", "precision", "log_every", "eval_every",
    "save_every", "keep_checkpoints", "report_to",
)  # fmt: skip


class DetectionTrainingData(TrainingData, Protocol):
    """Images, batches and schedule of a detection run; `DetectionObjective` implements it."""

    settings: DetectionSettings
    base: DetectionBase
    training: DetectionTraining
    datasets: tuple[RunDataset, ...]
    domain: DomainRun | None

    @property
    def schedule(self) -> DetectionSchedule:
        """Rates and windows of the run."""

    @property
    def train_rows(self) -> TrainingImages | MixedImages:
        """Augmented training images, by draw."""

    @property
    def collate(self) -> Collate:
        """Collation of samples into a batch."""

    @property
    def device_batch_size(self) -> int:
        """Images in one forward pass of one device."""

    @property
    def workers(self) -> int:
        """Processes that prepare images, per device."""

    def first_batch(self) -> dict[str, Any]:
        """Return the first batch, as the network gets it."""

    def load_base(self, source: str | None = None) -> DEIMv2 | Detectors:
        """Load the detector, or one that a run saved in `source`."""

    def save(self, model: nn.Module, evaluation: Evaluation | None, folder: Path) -> None:
        """Write the detector and its domains as they stand."""


def detection_arguments(config: RunConfig, data: DetectionTrainingData) -> TrainingArguments:
    """Build the TrainingArguments of a detector's recipe. Raises: ConfigError: see `training_arguments`."""
    training, schedule, batch_size = data.training, data.schedule, data.device_batch_size
    if schedule.published and training.eval_every != "epoch":
        raise ConfigError(
            "`objective.preset: published` evaluates once an epoch: stage 2 depends on it. Leave out "
            "`training.eval_every`."
        )
    common: dict[str, Any] = {name: getattr(training, name) for name in _COMMON}
    if not data.held_out_rows:
        if schedule.published:
            raise ConfigError(
                "`objective.preset: published` chooses its best epoch by held-out images, and there are none."
            )
        common["eval_every"] = "end"
    settings = Training(
        **common,
        epochs=schedule.epochs,
        batch_size=batch_size,
        eval_batch_size=training.eval_batch_size or 2 * batch_size,
        lr=schedule.settings.lr,
        weight_decay=schedule.settings.weight_decay,
        schedule="constant",  # the trainer makes its own
        warmup=0,
        workers=data.workers,
        args={
            "accelerator_config": {"non_blocking": torch.cuda.is_available()},
            # The published sizes use every parameter for every batch, also for one without boxes.
            "ddp_find_unused_parameters": bool(data.base.overrides) or len(data.datasets) > 1,
            **training.args,
        },
    )
    return training_arguments(settings, folder=config.run_folder, tuner=config.tuner, seed=config.seed)
