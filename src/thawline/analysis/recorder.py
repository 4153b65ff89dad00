"""Alignment during training: measured every `every` steps, by hand or as a callback of any Trainer."""

from __future__ import annotations

__all__ = ["ALIGNMENT", "AlignmentRecorder", "average", "read_trajectory"]

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thawline.analysis.gradients import Alignment, Batches, Loss, gradient_alignment
from thawline.errors import DataError
from thawline.files import read_jsonl, to_json, write_jsonl

ALIGNMENT = "alignment.jsonl"
"""File name in a run folder."""


class AlignmentRecorder(TrainerCallback):
    """Measure `gradient_alignment` while a model trains, on the same batches each time.

    A callback of transformers' Trainer and its relatives, or called by hand after each step:

        record = AlignmentRecorder(batches, every=40)
        for step in range(1, 601):
            ...
            record(model, step)
        average(record.rows)["skill"]["coherence"]

    A measurement costs a forward and a backward pass per task and leaves the training bit-identical.

    Args:
        batches, loss: see `gradient_alignment`.
        every: steps between measurements; the first is after step `every`.
        file: JSON lines are appended to it; a resumed Trainer drops the lines it is about to repeat.
    """

    def __init__(
        self, batches: Batches, loss: Loss | None = None, *, every: int = 40, file: str | Path | None = None
    ) -> None:
        self.batches, self.loss, self.every = batches, loss, every
        self.file = None if file is None else Path(file)
        self.rows: list[dict[str, Any]] = []
        """{"step", ...`Alignment.to_dict()`}, in the order of steps."""
        self.last: Alignment | None = None
        """The latest measurement, with the cosine of every pair."""

    def __call__(self, model: nn.Module, step: int, *, writes: bool = True) -> Alignment | None:
        """Measure if `step` is due.

        Args:
            writes: whether this process appends to the file.
        """
        if step % self.every:
            return None
        self.last = gradient_alignment(model, self.batches, self.loss)
        self.rows.append({"step": step, **self.last.to_dict()})
        if self.file is not None and writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(to_json(self.rows[-1]) + "\n")
        return self.last

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the measurements up to the step that training resumes from."""
        if self.file is None or not self.file.is_file():
            return
        self.rows = [row for row in read_trajectory(self.file) if row["step"] <= state.global_step]
        if state.is_world_process_zero:
            write_jsonl(self.file, self.rows)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure if the step is due."""
        if (model := kwargs.get("model")) is not None:
            self(model, state.global_step, writes=state.is_world_process_zero)


def average(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean over a trajectory: {"skill" | "effective": {"mean_cosine", "coherence"}}.

    Raises: DataError: if there are no rows.
    """
    found = list(rows)
    if not found:
        raise DataError("No alignment was measured: training was shorter than `every` steps.")
    return {
        space: {name: statistics.mean(row[space][name] for row in found) for name in found[0][space]}
        for space in ("skill", "effective")
    }


def read_trajectory(file: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a recorder's file; an incomplete last line (a killed process) is skipped."""
    return read_jsonl(file)
