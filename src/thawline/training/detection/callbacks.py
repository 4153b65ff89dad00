"""Trainer callbacks: functions called at training events, and a report of the speed."""

from __future__ import annotations

__all__ = ["Speed", "TrainingEvents"]

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

TIMED_STEPS, UNTIMED_STEPS = 20, 3
"""Steps after which the speed is reported; the first few are not timed."""


class TrainingEvents(TrainerCallback):
    """Calls a function when training begins, when an epoch begins and after each optimiser step."""

    def __init__(
        self,
        *,
        train_begin: Callable[[], None],
        epoch_begin: Callable[[], None],
        step_end: Callable[[], None],
    ) -> None:
        self.train_begin, self.epoch_begin, self.step_end = train_begin, epoch_begin, step_end

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Call `train_begin`."""
        self.train_begin()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Call `epoch_begin`."""
        self.epoch_begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Call `step_end`."""
        self.step_end()


class Speed(TrainerCallback):
    """Logs, after the first steps, the speed of the model and the share of time spent waiting for data.

    Args:
        images_per_step: per device.
    """

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.n_steps = 0
        self.working = self.waiting = self.last = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Count the time since the last step as waiting: the batch is now there."""
        if self.n_steps < TIMED_STEPS:
            self.waiting += self._lap()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count the time since the step began as work; report after the last timed step."""
        if self.n_steps >= TIMED_STEPS:
            return
        self.working += self._lap()
        self.n_steps += 1
        if self.n_steps == TIMED_STEPS:
            logger.info(
                "speed    model %.1f images/s and device; waiting for data %.0f %% of the time",
                (TIMED_STEPS - UNTIMED_STEPS - 1) * self.images_per_step / self.working,
                100 * self.waiting / (self.waiting + self.working),
            )

    def _lap(self) -> float:
        """Return the seconds since the last call; 0 in the untimed steps."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        last, self.last = self.last, time.perf_counter()
        return self.last - last if self.n_steps > UNTIMED_STEPS else 0.0
