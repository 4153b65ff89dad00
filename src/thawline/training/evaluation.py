"""Results of an evaluation, and the part of an objective that a trainer uses."""

from __future__ import annotations

__all__ = ["Evaluation", "TrainingData"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics and predictions of a model on the held-out rows."""

    metrics: dict[str, float]
    """Metrics over all rows, by name."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics by part: a task of text, a class of detection."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Predictions, row by row, as plain values."""
    files: dict[str, Any] = field(default_factory=dict)
    """Further results: name of a JSON file in the run's folder → plain values."""
    datasets: dict[str, Evaluation] = field(default_factory=dict)
    """Evaluation on each dataset, by name, where a detection run has several."""
    detections: tuple[Any, Any, Any] | None = None
    """For a detector: images, evaluator and its metrics, from which its worst images are drawn."""


class TrainingData(Protocol):
    """Part of an objective that a trainer uses: rows, batches and evaluation."""

    processor: Any
    """Tokenizer or image processor, saved next to the model. None: there is none."""

    @property
    def train_rows(self) -> Sequence[Any]:
        """Rows to train on, as `collate` takes them."""

    @property
    def held_out_rows(self) -> Sequence[Any]:
        """Rows to evaluate on."""

    @property
    def collate(self) -> Callable[[Sequence[Any]], Mapping[str, Any]]:
        """Build a batch for the model's forward, which returns its loss first or as "loss"."""

    def evaluate(self, model: nn.Module, batch_size: int) -> Evaluation:
        """Evaluate `model` on the held-out rows; leaves it in eval mode."""
