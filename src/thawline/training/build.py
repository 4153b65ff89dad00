"""From a recipe to objects: its objective, and its base with the tuner attached; also from a run's folder."""

from __future__ import annotations

__all__ = ["build_model", "build_objective", "load_tuned", "n_parameters"]

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from thawline.errors import CheckpointError, ConfigError
from thawline.recipe import Frozen, Full, RunConfig
from thawline.training.objective import Objective
from thawline.training.trainer import choose_precision, newest_checkpoint
from thawline.tuners.build import attach_tuner


def build_objective(
    config: RunConfig,
    *,
    read: Literal["all", "held-out", "none"] = "all",
    described: Mapping[str, Any] | None = None,
) -> Objective:
    """The objective a recipe asks for.

    Args:
        config: the recipe.
        read: which rows to read.
        described: what the objective said of itself when the run was trained (`Objective.describe`).
    """
    if config.objective.kind == "text":
        from thawline.training.text import TextObjective

        return TextObjective(
            config.objective,
            config.base,
            config.data,
            dtype=_dtype(config),
            seed=config.seed,
            read=read,
            labels=(described or {}).get("labels", ()),
        )
    raise AssertionError(config.objective.kind)


def build_model(config: RunConfig, objective: Objective) -> nn.Module:
    """The base, lean where asked, with the tuner attached."""
    model = objective.load_base()
    if config.lean:
        from thawline.ops.lean import apply_lean

        model = apply_lean(model)
    return attach_tuner(model, config.tuner)


def load_tuned(config: RunConfig, objective: Objective, folder: Path | None) -> nn.Module:
    """The base with what a run saved in `folder` (its model/ or a checkpoint); None: the base as it is."""
    if folder is None or isinstance(config.tuner, Frozen):
        return build_model(dataclasses.replace(config, tuner=Frozen()), objective)
    if isinstance(config.tuner, Full):
        return objective.load_base(str(folder))
    tuner = dataclasses.replace(config.tuner, start_from=str(folder))
    return build_model(dataclasses.replace(config, tuner=tuner), objective)


def saved_model_folder(run_folder: Path) -> Path:
    """Where a run keeps what it trained: model/, or its newest checkpoint where it has not finished.

    Raises: CheckpointError: if it holds neither.
    """
    if (run_folder / "model").is_dir():
        return run_folder / "model"
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint is None:
        raise CheckpointError(
            f"'{run_folder}' holds neither model/ nor a checkpoint: nothing was trained yet."
        )
    return checkpoint


def n_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def _dtype(config: RunConfig) -> torch.dtype:
    wanted = config.base.dtype
    if wanted == "auto":
        trains_base = isinstance(config.tuner, Full)
        is_bf16 = choose_precision(config.training.precision) == "bf16"
        return torch.bfloat16 if is_bf16 and not trains_base else torch.float32
    dtype: Any = getattr(torch, wanted)
    if isinstance(config.tuner, Full) and dtype == torch.float16:
        raise ConfigError("`base.dtype: float16` cannot be fine-tuned whole. Use float32, or an adapter.")
    return dtype
