"""Callbacks of every run: stopping on a signal, early or on a broken loss, metrics.jsonl, the progress bar,
resumed rates; and annealed routing.
"""

from __future__ import annotations

__all__ = [
    "Annealing",
    "BrokenLoss",
    "MetricsFile",
    "Patience",
    "Progress",
    "ResumedRates",
    "StopOnSignal",
]

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thawline.errors import ConfigError
from thawline.files import to_json, write_text
from thawline.tuners.mhr.adapt import uniform_annealing

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """End training after the current step, with a checkpoint, on Ctrl-C or SIGTERM; at once on a second one.

    Used as a context around `Trainer.train`, and as one of its callbacks.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle the signals while the context lasts; only Python's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end of training."""
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Skip the evaluation and the second checkpoint of an epoch that was cut short."""
        if self.signal is not None:
            control.should_save = control.should_evaluate = False
        return control

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning("Stopping after this step; a checkpoint follows. Press Ctrl-C again to stop at once.")


class BrokenLoss(TrainerCallback):
    """End training where the loss, or a weight that trains, is no longer finite; or say so and go on.

    A GPU is read only where it is read anyway, so training ends there; the step is the one where it happened.
    """

    def __init__(self, action: Literal["stop", "warn"]) -> None:
        self.action = action
        self.losses: list[tuple[int, Tensor]] = []
        """Step and loss of the forward passes since the last look."""
        self.is_told = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the losses, and at the weights before they are evaluated or saved.

        Raises: ConfigError: naming the step, unless it is only to be said.
        """
        ends = control.should_evaluate or control.should_save or control.should_training_stop
        if not (ends or control.should_log or args.device.type == "cpu"):
            return
        found = None
        if self.losses:
            steps, values = zip(*self.losses, strict=True)
            self.losses.clear()
            pairs = zip(steps, torch.stack(values).float().tolist(), strict=True)
            found = next((f"the loss was {x} at step {i}" for i, x in pairs if not math.isfinite(x)), None)
        if found is None and ends and model is not None:
            broken = next((name for name, p in model.named_parameters() if _is_broken(p)), None)
            found = broken and f"step {state.global_step} made '{broken}' infinite or NaN"
        if found is None or self.is_told:
            return
        self.is_told = True
        text = (
            f"Training broke: {found} (epoch {state.epoch or 0:.2f}). Lower `training.lr` (at most "
            f"{args.learning_rate:.2g} here), or clip gradients by `training.max_grad_norm`"
        )
        if self.action == "stop":
            raise ConfigError(
                f"{text}. Checkpoints are from before; `training.on_broken_loss: warn` goes on."
            )
        logger.warning("%s.", text)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look as after a step, where an epoch ends with an evaluation or a checkpoint."""
        self.on_step_end(args, state, control, **kwargs)


class Patience(TrainerCallback):
    """End training, with a checkpoint, after evaluations that do not improve a metric.

    Everything follows from the log of the evaluations, which is part of each checkpoint; transformers'
    EarlyStoppingCallback counts, and by default a resumed run counts from 0 again.

    Args:
        metric: name of the metric.
        n_evaluations: evaluations without improvement after which training ends.
        smaller_is_better: whether the metric is best at its smallest.
    """

    def __init__(self, metric: str, n_evaluations: int, *, smaller_is_better: bool) -> None:
        self.metric, self.n_evaluations = metric, n_evaluations
        self.sign = -1 if smaller_is_better else 1
        self.since = 0
        """Evaluations up to this step do not count: a new stage of the run began there."""
        self.stopped = ""
        """Why training ended early; empty where it did not."""

    def is_over(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the evaluations in a trainer's log are enough to end training; note why."""
        key, best, best_step, n_worse = f"eval_{self.metric}", -math.inf, 0, 0
        for row in log:
            if key not in row or row["step"] <= self.since:
                continue
            n_worse += 1
            value = -math.inf if row[key] is None else self.sign * row[key]
            if value > best:
                best, best_step, n_worse = value, row["step"], 0
        if n_worse >= self.n_evaluations:
            self.stopped = f"{self.metric} has not improved in {n_worse} evaluations since step {best_step}"
        return n_worse >= self.n_evaluations

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end of training, unless it ends here anyway."""
        if not self.stopped and state.global_step < state.max_steps and self.is_over(state.log_history):
            logger.warning("Stopping at step %d: %s.", state.global_step, self.stopped)
            control.should_save = control.should_training_stop = True
        return control


class ResumedRates(TrainerCallback):
    """Sets the rates of a resumed run to those of its schedule, which may be another than it was saved with.

    A checkpoint holds the rates of its next step. Where the schedule is the same, so are they.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the rate of each parameter group, for a schedule that is a function of the step."""
        lambdas = getattr(lr_scheduler, "lr_lambdas", None)
        if optimizer is None or lr_scheduler is None or lambdas is None or not state.global_step:
            return
        before = [group["lr"] for group in optimizer.param_groups]
        now = [
            base * at(lr_scheduler.last_epoch)
            for base, at in zip(lr_scheduler.base_lrs, lambdas, strict=True)
        ]
        if before != now:
            for group, lr in zip(optimizer.param_groups, now, strict=True):
                group["lr"] = lr
            lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), "_last_lr": now})
            logger.info("The rate goes from %.2g to %.2g here.", max(before), max(now))


class MetricsFile(TrainerCallback):
    """Append every logged value to metrics.jsonl, one JSON object per line.

    When a run resumes at step n, lines of later steps are dropped: they are about to be computed again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what a killed run logged after the checkpoint this one starts from."""
        self.start = time.perf_counter()
        if state.is_world_process_zero and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= state.global_step]
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line. The summary that ends a training goes to result.json instead."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        row = {"step": state.global_step, **{k: v for k, v in logs.items() if not _is_speed(k)}}
        row["seconds"] = round(time.perf_counter() - self.start, 3) if self.start else 0.0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")


class Progress(ProgressCallback):
    """Show loss and learning rate on Trainer's progress bar, and print one line per evaluation."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest loss, or print the metrics of an evaluation."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}", "lr": f"{logs['learning_rate']:.1e}"}
            self.training_bar.set_postfix(shown, refresh=False)
        evaluated = {
            k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_") and not _is_speed(k)
        }
        if evaluated:
            values = "  ".join(f"{name} {value:.4g}" for name, value in evaluated.items())
            self.training_bar.write(f"step {state.global_step}: {values}", file=self.training_bar.fp)


class Annealing(TrainerCallback):
    """Move MHR's routing to the average of the skills over the last steps (`uniform_annealing`).

    Args:
        share: share of the steps, in (0, 1].
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the mixture that this step trains with; the last step trains the average alone."""
        n_steps = max(round(self.share * state.max_steps), 1)
        done = state.global_step + 1 - (state.max_steps - n_steps)
        if model is not None and done > 0:
            uniform_annealing(model, done / n_steps)


def _is_broken(parameter: nn.Parameter) -> bool:
    """Return True for a parameter that trains and is not finite; of one that is sharded, by the own part."""
    if not parameter.requires_grad or parameter.is_meta:
        return False
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return not bool(own.detach().isfinite().all())


def _is_speed(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second", "_preparation_time"))


def _step_of(line: str) -> float:
    """Return the step of a line of metrics.jsonl; infinity for one that is cut off or damaged."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
