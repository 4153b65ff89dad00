"""What a run needs to know of what is asked: the contract between an objective and the trainer."""

from __future__ import annotations

__all__ = ["Evaluation", "Objective", "RowObjective"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.utils.data import Sampler


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, float]
    """Over everything, by metric name."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same by part: a task of text, a class of detection."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What was predicted, row by row, as plain values."""
    files: dict[str, Any] = field(default_factory=dict)
    """More of it: plain values by the name of the JSON file they go to in the run's folder."""
    detections: tuple[Any, Any, Any] | None = None
    """Of a detector: images, evaluator and its metrics, from which its worst images are drawn."""


class Objective(Protocol):
    """An objective owns data and base: it loads both, batches the one and evaluates the other."""

    smaller_is_better: tuple[str, ...]
    """Metrics whose smallest value is the best."""
    processor: Any
    """Tokenizer or image processor, saved beside the model. None: there is none."""

    @property
    def train_rows(self) -> Sequence[Any]:
        """Rows to learn from, as `collate` takes them."""

    @property
    def held_out_rows(self) -> Sequence[Any]:
        """Rows to evaluate on."""

    def load_base(self, source: str | None = None) -> nn.Module:
        """The pretrained model on the CPU, or one of its kind saved in `source`."""

    def collate(self, rows: Sequence[Any]) -> Mapping[str, Any]:
        """One batch for the model's forward, which returns its loss first or as "loss"."""

    def preview(self) -> str:
        """One training row as the model sees it, for a person to check before step 1."""

    def save_pictures(self, folder: Path) -> None:
        """Draw into `folder` what is worth seeing before step 1."""

    def evaluate(self, model: nn.Module, batch_size: int) -> Evaluation:
        """Judge `model` on the held-out rows; leaves it in eval mode."""

    def describe(self) -> dict[str, Any]:
        """What predicting needs beyond model and processor, as plain values; kept in the run's folder."""


class RowObjective(Objective, Protocol):
    """An objective on rows of text, which may be of several tasks."""

    loss: ClassVar[Callable[..., Tensor] | None]
    """`loss(self, model, batch)`: what training minimises, a mean over rows. None: the model's own."""

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks to learn or, where none are, to evaluate on."""

    def route(self, tasks: Sequence[str] | None) -> None:
        """Give batches the ids of their rows' tasks, by a routing table's names; None: no ids any more.

        Raises: RoutingError: for rows of a task that the table lacks.
        """

    def train_sampler(self, batch_size: int) -> Sampler[int] | None:
        """Which row comes when, a function of `set_epoch`. None: every row once an epoch, by chance."""
