"""Objectives: what a model is trained for. An objective builds its model and trainer and judges the result.

recipe ── build_objective ──► Objective ── build_model   ──► base with its tuner
                                        ── build_trainer ──► Trainer
                                        ── evaluate      ──► Evaluation
"""

from __future__ import annotations

__all__ = ["OBJECTIVES", "Objective", "ReadRows", "build_objective"]

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import TrainerCallback

from thawline.errors import ConfigError
from thawline.ops.lean import apply_lean
from thawline.recipe import Frozen, Full, RunConfig, TunerSettings
from thawline.training.evaluation import Evaluation
from thawline.training.trainer import Trainer

OBJECTIVES = {
    "text": "thawline.training.text.objective:TextObjective",
    "match": "thawline.training.text.match:MatchObjective",
    "detection": "thawline.training.detection.objective:DetectionObjective",
}
"""`objective.kind` of a recipe → module and class, imported when a recipe asks for it."""

ReadRows = Literal["all", "held-out", "none", "config"]
"""Rows an objective reads: predicting needs none, evaluating the held-out ones. config: no file but the
base's config; `described` says the rest, and models have no weights (meta device)."""


class Objective(ABC):
    """Owner of data and base: builds and loads models, batches rows, trains and evaluates.

    Args:
        config: the recipe, whose sections are of this objective's kind.
        read: rows to read.
        described: what `describe` returned when the run was trained.
    """

    settings: Any
    base: Any
    data: Any
    training: Any
    # The four sections; each objective annotates them with its own dataclasses, which RunConfig has checked.
    processor: Any = None
    """Tokenizer or image processor, saved next to the model. None: there is none."""
    smaller_is_better: tuple[str, ...] = ("loss",)
    """Metrics that are best at their smallest."""
    loss: ClassVar[Callable[..., Tensor] | None] = None
    """Training loss, `loss(self, model, batch)`, a mean over rows. None: the model's own."""

    def __init__(self, config: RunConfig, *, read: ReadRows = "all", described: Mapping[str, Any]) -> None:
        self.config = config
        self.settings, self.base = config.objective, config.base
        self.data, self.training = config.data, config.training

    @property
    @abstractmethod
    def train_rows(self) -> Sequence[Any]:
        """Rows to train on, as `collate` takes them."""

    @property
    @abstractmethod
    def held_out_rows(self) -> Sequence[Any]:
        """Rows to evaluate on."""

    @property
    @abstractmethod
    def collate(self) -> Callable[[Sequence[Any]], Mapping[str, Any]]:
        """Build a batch for the model's forward, which returns its loss first or as "loss"."""

    @abstractmethod
    def row_facts(self) -> Iterable[bytes]:
        """Return what each training row holds, by which a resumed run knows its rows again."""

    @property
    def align_every(self) -> int | None:
        """Steps between measurements of gradient alignment. None: not measured."""
        return None

    @property
    def start_name(self) -> str | None:
        """Name of the evaluation before the first step. None: there is none."""
        return None

    @abstractmethod
    def load_base(self, source: str | None = None) -> nn.Module:
        """Load the pretrained model on the CPU, or one of its kind saved in `source`."""

    @abstractmethod
    def attach_tuner(self, model: nn.Module, tuner: TunerSettings, *, saved: bool = False) -> nn.Module:
        """Make trainable what `tuner` says. `saved`: see `build_model`.

        Raises: ConfigError: if the tuner does not fit the objective or the model.
        """

    @abstractmethod
    def build_trainer(self, model: nn.Module, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
        """Build the trainer, with the arguments that the recipe gives. Raises: ConfigError."""

    @abstractmethod
    def preview(self) -> str:
        """Return one training row as the model sees it, for a person to check before step 1."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch_size: int) -> Evaluation:
        """Evaluate `model` on the held-out rows; leaves it in eval mode."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what predicting needs beyond model and processor, as plain values."""

    def save_images(self, folder: Path) -> None:  # noqa: B027
        """Draw what is worth seeing before step 1 into `folder`."""

    def build_model(self, tuner: TunerSettings | None = None, *, saved: bool = False) -> nn.Module:
        """Build the base, lean where asked, with the tuner attached.

        Args:
            tuner: None: the recipe's.
            saved: `tuner.start_from` was made by this very recipe: it has adapted already, unless
                `tuner.adapt` now says otherwise.
        """
        model = self.load_base()
        if self.config.lean:
            model = apply_lean(model, loss=True)
        return self.attach_tuner(model, tuner or self.config.tuner, saved=saved)

    def load_tuned(self, folder: Path | None) -> nn.Module:
        """Load what a run saved in `folder` (its model/ or a checkpoint); None: the base as it is."""
        tuner = self.config.tuner
        if folder is None:
            return self.build_model(Frozen())
        if isinstance(tuner, (Full, Frozen)) or not (folder / "adapter_config.json").is_file():
            return self.load_base(str(folder))
        return self.build_model(dataclasses.replace(tuner, start_from=str(folder)), saved=True)

    def alignment_batches(self) -> dict[str, list[Any]]:
        """Return batches of training rows by task, on which the alignment of gradients is measured.

        Raises: ConfigError: if the objective has no tasks.
        """
        raise ConfigError("Alignment is between tasks, and the run has one.")

    def predict(
        self,
        model: nn.Module,
        inputs: Sequence[str],
        *,
        choices: Sequence[str] = (),
        task: str | None = None,
        batch_size: int = 8,
        **sampling: Any,
    ) -> list[str]:
        """Answer texts. Raises: ConfigError: if the objective is not about text."""
        raise ConfigError("A detector answers no texts. Give images: thawline predict MODEL --source …")


def build_objective(
    config: RunConfig, *, read: ReadRows = "all", described: Mapping[str, Any] | None = None
) -> Objective:
    """Build the objective that a recipe asks for (see `Objective`)."""
    module, name = OBJECTIVES[config.objective.kind].split(":")
    return getattr(importlib.import_module(module), name)(config, read=read, described=described or {})
