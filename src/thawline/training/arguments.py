"""TrainingArguments from a recipe's training section."""

from __future__ import annotations

__all__ = ["choose_precision", "training_arguments"]

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from thawline.errors import ConfigError, did_you_mean
from thawline.recipe import Training, TunerSettings


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
        "learning_rate": tuner.usual_lr if settings.lr is None else settings.lr,
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
