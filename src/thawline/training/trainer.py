"""The engine of every run: transformers' Trainer, extended through its public seams only.

What is added: evaluation is the objective's; every logged value goes to metrics.jsonl, which after a resume
reads as if nothing had happened; Ctrl-C and SIGTERM end the run after the current step, with a checkpoint;
the progress bar carries the loss instead of printing a dictionary a line.
"""

from __future__ import annotations

__all__ = ["StopOnSignal", "Trainer", "newest_checkpoint", "training_arguments", "usual_learning_rate"]

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import EvalLoopOutput

from thawline.errors import ConfigError, did_you_mean
from thawline.recipe import Training, TunerSettings
from thawline.training.objective import Evaluation, Objective

logger = logging.getLogger(__name__)


class Trainer(transformers.Trainer):
    """Trainer whose evaluation is the objective's.

    Args:
        model: base with its tuner attached.
        args: transformers' own; see `training_arguments`.
        objective: what is asked; gives rows, batches and evaluation.
        callbacks: further ones, transformers' own kind.
        sampler: which row comes when, with a `set_epoch`. None: every row once an epoch, by chance.
        loss: `loss(model, batch)`, a mean over rows. None: the model's own.
        parameter_groups: what trains of a model, in groups for an optimiser. None: transformers' choice.
    """

    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
        callbacks: list[TrainerCallback] | None = None,
        *,
        sampler: Sampler[int] | None = None,
        loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
        parameter_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
    ) -> None:
        self.objective = objective
        self.row_sampler, self.loss, self.parameter_groups = sampler, loss, parameter_groups
        self.last_evaluation: Evaluation | None = None
        self.last_evaluated_step = -1
        super().__init__(
            model=model,
            args=args,
            data_collator=objective.collate,
            train_dataset=objective.train_rows,
            eval_dataset=objective.held_out_rows or None,
            processing_class=objective.processor,
            callbacks=[MetricsFile(Path(args.output_dir) / "metrics.jsonl"), *(callbacks or [])],
        )
        if loss is not None:
            # It is a mean over a batch's rows: of accumulated batches the mean is to be taken, not the sum.
            self.model_accepts_loss_kwargs = False
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        self.remove_callback(PrinterCallback)

    @property
    def evaluated_model(self) -> nn.Module:
        """What the objective judges."""
        return self.model

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As of transformers' Trainer, which would take one step more when it resumes after the last one."""
        args = self.args
        length = args.max_steps, args.num_train_epochs
        if isinstance(resume_from_checkpoint, str) and 0 < args.max_steps <= _step_of(resume_from_checkpoint):
            args.max_steps, args.num_train_epochs = -1, 0
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            args.max_steps, args.num_train_epochs = length

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the sampler's order, where there is one."""
        if self.row_sampler is None:
            return super().get_train_dataloader()
        return self.accelerator.prepare(
            DataLoader(
                self.objective.train_rows,
                batch_size=self.args.train_batch_size,
                sampler=self.row_sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                drop_last=self.args.dataloader_drop_last,
            )
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of the recipe, on the groups asked for."""
        if self.parameter_groups is None or self.optimizer is not None:
            return super().create_optimizer(model)
        trained = self.model if model is None else model
        make, fields = self.get_optimizer_cls_and_kwargs(self.args, trained)
        self.optimizer = make(self.parameter_groups(trained), **fields)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss, where it has one, else the model's."""
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.loss(model, inputs)
        return (loss, None) if return_outputs else loss

    def plan(self) -> dict[str, Any]:
        """What is about to happen: steps, parameter groups, the first batch; as plain values."""
        rows, args = self.objective.train_rows, self.args
        rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        n_rows = len(rows) if self.row_sampler is None else len(self.row_sampler)
        steps = round(-(-n_rows // rows_a_step) * args.num_train_epochs)
        steps = args.max_steps if args.max_steps > 0 else steps
        batch = self.objective.collate(rows[: args.train_batch_size])
        return {
            "steps": steps,
            "rows_a_step": rows_a_step,
            "warmup_steps": args.get_warmup_steps(steps),
            "schedule": str(args.lr_scheduler_type.value),
            "parameter_groups": [
                {
                    "lr": group["lr"],
                    "weight_decay": group["weight_decay"],
                    "tensors": len(group["params"]),
                    "parameters": sum(p.numel() for p in group["params"]),
                }
                for group in self.create_optimizer().param_groups
                if group["params"]
            ],
            "first_batch": {name: _summary(value) for name, value in batch.items()},
        }

    def plan_lines(self, plan: Mapping[str, Any]) -> list[str]:
        """The plan in a few lines, for a person to read before step 1."""
        rates = dict.fromkeys(f"{group['lr']:.2g}" for group in plan["parameter_groups"])
        return [f"rate     {' and '.join(rates)}, {plan['schedule']}"]

    def starting_evaluation(self) -> Evaluation:
        """Of the model before its first step."""
        self.evaluate()
        assert self.last_evaluation is not None
        return self.last_evaluation

    def final_evaluation(self) -> Evaluation:
        """Of the model that the run ends with: the one after the last step, if that is the model."""
        if not self.objective.held_out_rows:
            return Evaluation(metrics={})
        is_last = self.last_evaluated_step == self.state.global_step and not self.args.load_best_model_at_end
        if self.last_evaluation is None or not is_last:
            self.evaluate()
        assert self.last_evaluation is not None
        return self.last_evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The objective's evaluation in place of a loss over batches."""
        was_training = self.model.training
        with torch.no_grad(), self.compute_loss_context_manager():
            evaluation = self.objective.evaluate(self.evaluated_model, self.args.per_device_eval_batch_size)
        self.model.train(was_training)
        self.last_evaluation = evaluation
        self.last_evaluated_step = self.state.global_step
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluation.metrics.items()}
        n = len(self.objective.held_out_rows)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=n)


def training_arguments(
    settings: Training,
    *,
    folder: Path,
    tuner: TunerSettings,
    seed: int,
    smaller_is_better: tuple[str, ...] = ("loss",),
) -> TrainingArguments:
    """TrainingArguments of a recipe's training section.

    Raises: ConfigError: for an unknown or doubled name in `args`, and whatever transformers refuses.
    """
    precision = choose_precision(settings.precision)
    keeps_best = settings.best_metric is not None
    if keeps_best and (settings.eval_every == "end" or settings.eval_every != settings.save_every):
        raise ConfigError(
            "`training.best_metric` chooses among evaluated checkpoints: give `eval_every` and `save_every` "
            f"the same steps, or 'epoch' (got {settings.eval_every!r} and {settings.save_every!r})."
        )
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.eval_batch_size or settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": usual_learning_rate(tuner) if settings.lr is None else settings.lr,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optimizer,
        "bf16": precision == "bf16",
        **({"use_cpu": True} if _must_say_cpu(precision) else {}),
        "fp16": precision == "fp16",
        "logging_steps": settings.log_every,
        "save_total_limit": settings.keep_checkpoints,
        "load_best_model_at_end": keeps_best,
        "metric_for_best_model": settings.best_metric,
        "greater_is_better": settings.best_metric not in smaller_is_better if keeps_best else None,
        "report_to": settings.report_to,
        "dataloader_num_workers": settings.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
        # Rows may carry more than the model's forward takes; the collator decides what goes in.
        "remove_unused_columns": False,
        **_every("eval", settings.eval_every),
        **_every("save", settings.save_every),
    }
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # transformers renamed the field in 5.20 or thereabouts and keeps the old name as an alias.
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    if settings.gradient_checkpointing:
        fields |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    for key in settings.args:
        if key not in known:
            raise ConfigError(
                f"Unknown key 'training.args.{key}' of TrainingArguments. {did_you_mean(key, known)}"
            )
        if key in fields:
            raise ConfigError(f"'training.args.{key}' has a field of its own in `training`; set it there.")
    try:
        arguments = TrainingArguments(**fields, **settings.args)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"TrainingArguments: {error}") from error
    _check_trackers(arguments)
    return arguments


def _check_trackers(arguments: TrainingArguments) -> None:
    """Raises: ConfigError: for a tracker that transformers does not know or whose library is missing."""
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"`training.report_to`: {error}") from error


def usual_learning_rate(tuner: TunerSettings) -> float:
    """The learning rate a recipe without `training.lr` gets."""
    return tuner.usual_lr


def choose_precision(wanted: str) -> str:
    """`auto` as fp32 or bf16, by the device. Raises: ConfigError: for a precision the device lacks."""
    bf16_works = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if bf16_works else "fp32"
    if wanted == "bf16" and torch.cuda.is_available() and not bf16_works:
        raise ConfigError("`training.precision: bf16` needs a GPU of capability 8.0. Use fp16 or fp32.")
    if wanted == "fp16" and not torch.cuda.is_available():
        raise ConfigError("`training.precision: fp16` needs a GPU. Use fp32, or bf16.")
    return wanted


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None.

    A kill while saving leaves a torn one. Trainer writes trainer_state.json last, so a checkpoint is whole
    exactly if that file can be read; torn ones are passed over (`remove_torn_checkpoints` takes them away).
    """
    return next((path for path in _checkpoints(folder) if _is_whole(path)), None)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of a run's whole checkpoints, oldest first."""
    whole = [path for path in _checkpoints(folder) if _is_whole(path)]
    return [(_step_of(path), path) for path in reversed(whole)]


def remove_torn_checkpoints(folder: Path) -> None:
    """Delete checkpoints that a kill left half-written."""
    for path in _checkpoints(folder):
        if not _is_whole(path):
            logger.warning("%s is half-written (the run was killed while saving): removed.", path)
            shutil.rmtree(path)


class StopOnSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, on Ctrl-C or SIGTERM; at once on a second one.

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
        """Ask for a checkpoint and the end."""
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """No evaluation and no second checkpoint for an epoch that was cut short."""
        if self.signal is not None:
            control.should_save = control.should_evaluate = False
        return control

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning("Stopping after this step; a checkpoint follows. Press Ctrl-C again to stop at once.")


class MetricsFile(TrainerCallback):
    """Appends every logged value to metrics.jsonl, one JSON object a line.

    When a run resumes at step n, lines of later steps go: they are about to be computed again.
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
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (row := _json(line)) and row["step"] <= state.global_step]
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
            file.write(json.dumps(row) + "\n")


class Progress(ProgressCallback):
    """Trainer's progress bar with loss and learning rate behind it, and one line an evaluation."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest loss; write a line for an evaluation."""
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


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a kill leaves the old one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _must_say_cpu(precision: str) -> bool:
    """Whether transformers would, without a GPU, refuse bf16 or let torchrun's processes train apart."""
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    return not torch.cuda.is_available() and (precision == "bf16" or n_processes > 1)


def _every(what: str, every: int | str) -> dict[str, Any]:
    """TrainingArguments' two fields for "every n steps", "epoch" or "end"."""
    if isinstance(every, int):
        return {f"{what}_strategy": "steps", f"{what}_steps": every}
    if every == "epoch":
        return {f"{what}_strategy": "epoch"}
    # "end": a trainer that saves by steps saves after its last one; the run evaluates at the end itself.
    return {"save_strategy": "steps", "save_steps": 10**9} if what == "save" else {"eval_strategy": "no"}


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run folder, newest step first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: str | Path) -> int:
    return int(Path(checkpoint).name.split("-")[1])


def _is_whole(checkpoint: Path) -> bool:
    state = checkpoint / "trainer_state.json"
    return state.is_file() and _json(state.read_text(encoding="utf-8")) is not None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _summary(value: Any) -> dict[str, Any]:
    value = torch.as_tensor(value)
    return {"shape": list(value.shape), "least": value.min().item(), "greatest": value.max().item()}


def _is_speed(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second", "_preparation_time"))
