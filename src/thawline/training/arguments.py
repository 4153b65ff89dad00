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
from transformers.utils import is_liger_kernel_available

from thawline.errors import ConfigError
from thawline.recipe import Training, TunerSettings
from thawline.recipe.checks import check_args
from thawline.recipe.training import TRAINING_ARGUMENTS


def training_arguments(
    settings: Training,
    *,
    folder: Path,
    tuner: TunerSettings,
    seed: int,
    smaller_is_better: tuple[str, ...] = ("loss",),
) -> TrainingArguments:
    """Build TrainingArguments from a recipe's training section.

    Args:
        tuner: gives the learning rate where the section has none.
        smaller_is_better: metrics that are best at their smallest.

    Raises: ConfigError: for an unknown or doubled name in `args`, and whatever transformers refuses.
    """
    precision = choose_precision(settings.precision)
    best = settings.best_metric
    if best is not None and (settings.eval_every == "end" or settings.eval_every != settings.save_every):
        raise ConfigError(
            "`training.best_metric` chooses among evaluated checkpoints: give `eval_every` and `save_every` "
            f"the same steps, or 'epoch' (got {settings.eval_every!r} and {settings.save_every!r})."
        )
    fields = {theirs: getattr(settings, ours) for theirs, ours in TRAINING_ARGUMENTS.items()}
    for name in ("eval_steps", "save_steps", "activation_checkpointing"):
        del fields[name]
    fields |= {
        "output_dir": str(folder),
        "max_steps": settings.max_steps or -1,
        "per_device_eval_batch_size": settings.eval_batch_size or settings.batch_size,
        "learning_rate": tuner.usual_lr if settings.lr is None else settings.lr,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "load_best_model_at_end": best is not None,
        "greater_is_better": None if best is None else best not in smaller_is_better,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
        # Rows may carry more than the model's forward takes; the collator decides what goes in.
        "remove_unused_columns": False,
        **_every("eval", settings.eval_every),
        **_every("save", settings.save_every),
    }
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available() and (precision == "bf16" or n_processes > 1):
        # Otherwise transformers refuses bf16, and lets torchrun's processes train apart.
        fields["use_cpu"] = True
    if settings.gradient_checkpointing:
        # transformers renamed the field in 5.20 or thereabouts and keeps the old name as an alias.
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        fields |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    taken = {*fields, *TRAINING_ARGUMENTS, "gradient_checkpointing"}
    check_args("training", settings.args, TrainingArguments, taken)
    try:
        # A filter would hide losses that are not finite, and read the loss from the device at every step.
        arguments = TrainingArguments(**fields, **{"logging_nan_inf_filter": False, **settings.args})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"TrainingArguments: {error}") from error
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError("`training.args.use_liger_kernel` needs the package: `pip install liger-kernel`.")
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()  # fails where its library is missing
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"`training.report_to`: {error}") from error
    return arguments


def choose_precision(wanted: str) -> str:
    """Return `auto` as fp32 or bf16, by the device. Raises: ConfigError: for a precision the device lacks."""
    bf16_works = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if bf16_works else "fp32"
    if wanted == "bf16" and torch.cuda.is_available() and not bf16_works:
        raise ConfigError("`training.precision: bf16` needs a GPU of capability 8.0. Use fp16 or fp32.")
    if wanted == "fp16" and not torch.cuda.is_available():
        raise ConfigError("`training.precision: fp16` needs a GPU. Use fp32, or bf16.")
    return wanted


def _every(what: str, every: int | str) -> dict[str, Any]:
    """Return TrainingArguments' fields for "every n steps", "epoch" or "end"."""
    if isinstance(every, int):
        return {f"{what}_strategy": "steps", f"{what}_steps": every}
    if every == "epoch":
        return {f"{what}_strategy": "epoch"}
    # "end": a trainer that saves by steps saves after its last one; the run evaluates at the end itself.
    return {"save_strategy": "steps", "save_steps": 10**9} if what == "save" else {"eval_strategy": "no"}
