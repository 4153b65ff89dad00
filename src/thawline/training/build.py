"""From a recipe to objects: its objective, and its base with the tuner attached; also from a run's folder."""

from __future__ import annotations

__all__ = [
    "build_model",
    "build_objective",
    "build_trainer",
    "load_tuned",
    "n_base_parameters",
    "n_parameters",
]

import dataclasses
import os
import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thawline.errors import CheckpointError, ConfigError, did_you_mean
from thawline.recipe import (
    DetectionBase,
    DetectionData,
    DetectionSettings,
    DetectionTraining,
    Frozen,
    Full,
    MatchSettings,
    Mhr,
    Paca,
    RunConfig,
    TextBase,
    TextData,
    TextSettings,
    Training,
    TunerSettings,
)
from thawline.training.objective import Objective, RowObjective
from thawline.training.trainer import Trainer, choose_precision, newest_checkpoint, training_arguments
from thawline.tuners.build import attach_tuner, calibrate_tuner, routed_tasks
from thawline.tuners.mhr.adapt import parameter_groups, uniform_annealing

CALIBRATION_BATCHES = 8
"""Training batches that PaCA's `activation` and `gradient` selections look at."""


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
    if isinstance(config.objective, DetectionSettings):
        assert isinstance(config.base, DetectionBase)
        assert isinstance(config.data, DetectionData)
        assert isinstance(config.training, DetectionTraining)
        from thawline.training.detection.objective import DetectionObjective

        return DetectionObjective(
            config.objective,
            config.base,
            config.data,
            config.training,
            seed=config.seed,
            read=read,
            described=described,
        )
    assert isinstance(config.base, TextBase)
    assert isinstance(config.data, TextData)
    of_text: dict[str, Any] = {"dtype": _dtype(config, config.base), "seed": config.seed, "read": read}
    if isinstance(config.objective, TextSettings):
        from thawline.training.text.objective import TextObjective

        labels = (described or {}).get("labels", ())
        return TextObjective(config.objective, config.base, config.data, labels=labels, **of_text)
    if isinstance(config.objective, MatchSettings):
        from thawline.training.text.match import MatchObjective

        return MatchObjective(config.objective, config.base, config.data, **of_text)
    raise AssertionError(config.objective.kind)


def build_model(config: RunConfig, objective: Objective, *, saved: bool = False) -> nn.Module:
    """The base, lean where asked, with the tuner attached: to all of it, or to a detector's backbone.

    Args:
        saved: `tuner.start_from` is what this very recipe made: it has adapted already, unless `tuner.adapt`
            now says otherwise.
    """
    model = objective.load_base()
    if config.lean:
        from thawline.ops.lean import apply_lean

        model = apply_lean(model)
    if isinstance(config.objective, DetectionSettings):
        from thawline.training.detection.backbone import tune_backbone

        detection: Any = objective
        if isinstance(config.tuner, Mhr):
            raise ConfigError(
                f"`tuner: {config.tuner.method}` routes tasks, and a detector has one. Use lora or paca."
            )
        if not isinstance(config.tuner, Full) and detection.start == "scratch":
            raise ConfigError(
                f"`tuner: {config.tuner.method}` would keep a backbone of random weights. Give pretrained "
                "ones as `base.weights`, or `--tuner none` to train all of it."
            )
        return tune_backbone(model, config.tuner)
    rows = cast(RowObjective, objective)
    model = attach_tuner(model, _calibrated(config, model, objective), tasks=rows.tasks, saved=saved)
    rows.route(routed_tasks(model) if isinstance(config.tuner, Mhr) else None)
    return model


def _calibrated(config: RunConfig, model: nn.Module, objective: Objective) -> TunerSettings:
    """PaCA's settings with the columns that training rows choose, where the selection looks at data."""
    tuner = config.tuner
    if not isinstance(tuner, Paca) or tuner.start_from is not None or tuner.indices is not None:
        return tuner
    if tuner.selection not in ("activation", "gradient"):
        return tuner
    rows, size = objective.train_rows, config.training.batch_size or 1
    drawn = random.Random(config.seed).sample(range(len(rows)), min(CALIBRATION_BATCHES * size, len(rows)))
    starts = range(0, len(drawn), size)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    batches = [
        {
            name: value.to(device)
            for name, value in objective.collate([rows[i] for i in drawn[start : start + size]]).items()
        }
        for start in starts
    ]
    return calibrate_tuner(model.to(device), tuner, batches)


def build_trainer(
    config: RunConfig, model: nn.Module, objective: Objective, callbacks: list[TrainerCallback]
) -> Trainer:
    """The objective's trainer, with the arguments its recipe says."""
    if isinstance(config.training, DetectionTraining):
        from thawline.training.detection.trainer import DetectionTrainer, detection_arguments

        detection: Any = objective
        return DetectionTrainer(
            model,
            detection_arguments(
                config.training, detection, folder=config.run_folder, tuner=config.tuner, seed=config.seed
            ),
            detection,
            config.tuner,
            callbacks,
        )
    settings = _fit_to_rows(config.training, objective)
    arguments = training_arguments(
        settings, folder=config.run_folder, tuner=config.tuner, seed=config.seed,
        smaller_is_better=objective.smaller_is_better,
    )  # fmt: skip
    rows = cast(RowObjective, objective)
    groups = None
    if isinstance(config.tuner, Mhr):
        groups = partial(
            parameter_groups,
            lr=arguments.learning_rate,
            routing_lr=config.tuner.routing_lr,
            weight_decay=arguments.weight_decay,
            routing_weight_decay=config.tuner.routing_weight_decay,
        )
        if config.tuner.anneal:
            callbacks = [*callbacks, Annealing(config.tuner.anneal)]
    return Trainer(
        model,
        arguments,
        objective,
        callbacks,
        sampler=rows.train_sampler(arguments.train_batch_size),
        loss=rows.loss,
        parameter_groups=groups,
    )


def _fit_to_rows(settings: Training, objective: Objective) -> Training:
    """Settings that evaluate only where there are rows to evaluate on.

    Raises: ConfigError: if `best_metric` is none of what evaluation gives.
    """
    rows, wanted = objective.held_out_rows, settings.best_metric
    known = ["loss", *getattr(objective, "metrics", ())] if rows else []
    if len({row["task"] for row in rows}) > 1:
        known += [f"macro_{name}" for name in known]
    if wanted is not None and wanted not in known:
        reason = f"is not evaluated. {did_you_mean(wanted, known)}" if rows else "needs held-out rows."
        raise ConfigError(f"`training.best_metric: {wanted}` {reason}")
    return settings if rows else dataclasses.replace(settings, eval_every="end")


def load_tuned(config: RunConfig, objective: Objective, folder: Path | None) -> nn.Module:
    """The base with what a run saved in `folder` (its model/ or a checkpoint); None: the base as it is."""
    if folder is None:
        return build_model(dataclasses.replace(config, tuner=Frozen()), objective)
    if isinstance(config.tuner, (Full, Frozen)) or not (folder / "adapter_config.json").is_file():
        return objective.load_base(str(folder))
    tuner = dataclasses.replace(config.tuner, start_from=str(folder))
    return build_model(dataclasses.replace(config, tuner=tuner), objective, saved=True)


def saved_model_folder(run_folder: Path) -> Path:
    """Where a run keeps what it trained: model/, or what there is before it has finished.

    That is a detector's best/ or last/, else the newest checkpoint.

    Raises: CheckpointError: if it holds none of them.
    """
    for name in ("model", "best", "last"):
        if (run_folder / name).is_dir():
            return run_folder / name
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


def n_base_parameters(model: nn.Module) -> int:
    """Parameters of the base alone, without those that a tuner has added."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    added: set[int] = set()
    for module in base.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            holder = getattr(module, name)
            added |= {id(p) for p in (holder.parameters() if isinstance(holder, nn.Module) else [holder])}
    return sum(p.numel() for p in base.parameters() if id(p) not in added)


class Annealing(TrainerCallback):
    """Moves the routing to the average of the skills over the last steps (`uniform_annealing`).

    Args:
        share: of the steps.
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
        """Set what this step trains with: the last one, the average alone."""
        n_steps = max(round(self.share * state.max_steps), 1)
        done = state.global_step + 1 - (state.max_steps - n_steps)
        if model is not None and done > 0:
            uniform_annealing(model, done / n_steps)


def _dtype(config: RunConfig, base: TextBase) -> torch.dtype:
    wanted = base.dtype
    if wanted == "auto":
        trains_base = isinstance(config.tuner, Full)
        is_bf16 = choose_precision(config.training.precision) == "bf16"
        return torch.bfloat16 if is_bf16 and not trains_base else torch.float32
    dtype: Any = getattr(torch, wanted)
    if isinstance(config.tuner, Full) and dtype == torch.float16:
        raise ConfigError("`base.dtype: float16` cannot be fine-tuned whole. Use float32, or an adapter.")
    return dtype
