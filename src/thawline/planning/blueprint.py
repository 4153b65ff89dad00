"""Build what a recipe trains, without its weights: the model, a full batch, the loss, the optimiser."""

from __future__ import annotations

__all__ = ["Blueprint", "draw_blueprint"]

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from thawline.errors import ConfigError
from thawline.models.deimv2.loss.matcher import Matches
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.variants import get_variant
from thawline.ops.lean import apply_lean
from thawline.recipe import Mhr, Paca, RunConfig, Training
from thawline.recipe.checks import height_width
from thawline.training.arguments import training_arguments
from thawline.training.detection.backbone import tune_backbone
from thawline.training.detection.learner import HostTargets, Learner
from thawline.training.objective import Objective, build_objective
from thawline.training.text.rows import read_rows
from thawline.training.trainer import Trainer

BOXES = 8
"""Boxes assumed per image, about COCO's mean; their number hardly changes a detector's memory."""
DETECTION_BATCH = 32
"""Images per step where neither recipe nor data say: that of the published sizes from N on."""


@dataclass(kw_only=True)
class Blueprint:
    """Everything that the cost of a training step follows from."""

    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Any]
    autocast: torch.dtype | None
    optimizer: type[torch.optim.Optimizer]
    optimizer_fields: Mapping[str, Any]
    rows: int
    """Rows or images in a forward pass."""
    shape: str
    """The batch in words."""
    accumulation: int
    max_steps: int | None
    epochs: float
    n_rows: int | None
    """Training rows. None: they could not be read."""
    averaged: bool = False
    """True if a moving average of the weights is kept."""


def draw_blueprint(
    config: RunConfig, *, length: int | None = None, objective: Objective | None = None
) -> Blueprint:
    """Build the model of a recipe on the meta device, and a full batch for it.

    Args:
        length: tokens of a row. None: `data.max_length`.
        objective: the recipe's, with its rows. None: they are read, where they are there.
    Raises: ConfigError: if the base has no readable config, or the recipe cannot work. DataError: for
        `objective: match` without readable rows, since its batches follow from them.
    """
    config = _without_reading(config)
    if config.objective.kind == "detection":
        return _detector(config, objective)
    if config.objective.kind == "match":
        return _matcher(config, objective or build_objective(config))
    return _language_model(config, length, objective)


def _without_reading(config: RunConfig) -> RunConfig:
    """Replace what would read weights or batches by choices of the same cost."""
    tuner: Any = config.tuner
    changed: dict[str, Any] = {}
    if isinstance(tuner, Paca) and tuner.selection != "explicit":
        changed["selection"] = "random"
    if getattr(tuner, "start_from", None) is not None:
        changed |= {"start_from": None, **({"adapt": "none"} if isinstance(tuner, Mhr) else {})}
    return dataclasses.replace(config, tuner=dataclasses.replace(tuner, **changed)) if changed else config


def _language_model(config: RunConfig, length: int | None, known: Any) -> Blueprint:
    base: Any = config.base
    data: Any = config.data
    examples = _examples(config) if known is None else known.train_examples
    tasks = list(dict.fromkeys(example.task for example in examples or ()))
    labels = sorted({label for one in examples or () for label in one.choices or [one.completion]})
    described = {"tasks": tasks, "labels": labels if base.head == "classifier" else []}
    objective: Any = build_objective(config, read="config", described=described)
    if objective.head == "classifier" and not objective.labels:
        objective.labels = tuple(labels)
    model = objective.build_model()
    if objective.training.gradient_checkpointing:
        model.config.use_cache = False  # as the model does then, which says so
    length, rows = length or data.max_length, objective.training.batch_size
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "labels": torch.zeros_like(ids)}
    n_rows = None if examples is None else len(examples)
    if known is not None:
        n_rows = len(known.train_rows)
    elif data.packing:
        n_rows = None  # only a tokenizer could tell how many packs there are
    if data.packing is True if known is None else known.unpacked_rows:
        batch |= {"position_ids": torch.zeros_like(ids), "use_cache": False}
    if objective.head == "classifier":
        batch["labels"] = torch.zeros(rows, dtype=torch.long)
    extras = objective.ids_of(_spread(objective.tasks, rows)) if objective.task_ids else {}
    return _text(
        config,
        model,
        batch,
        lambda model, batch: model(**batch, **extras),
        f"{rows} × {length} tokens",
        n_rows,
    )


def _matcher(config: RunConfig, known: Any) -> Blueprint:
    objective = copy.copy(known)
    objective.has_weights = False
    model = objective.build_model()
    in_order = sorted(objective.train_rows, key=lambda row: len(row["input_ids"]))
    longest = in_order[-(config.training.batch_size or 1) :]
    found = objective.collate(longest)
    ids = {name: found.pop(name) for name in ("task_ids", "choice_task_ids") if name in found}
    shape = "{} × {} tokens, {} choices".format(*found["input_ids"].shape, len(found["choice_ids"]))
    return _text(
        config,
        model,
        found,
        lambda model, batch: objective.loss(model, {**batch, **ids}),
        shape,
        len(objective.train_rows),
    )


def _text(
    config: RunConfig, model: nn.Module, batch: Any, loss: Any, shape: str, n_rows: int | None
) -> Blueprint:
    training: Any = config.training
    plain = dataclasses.replace(
        training, eval_every="end", save_every="end", best_metric=None, report_to="none"
    )
    arguments = _arguments(config, plain)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer, fields = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return Blueprint(
        model=model.train(),
        batch=batch,
        loss=loss,
        autocast=_autocast(arguments),
        optimizer=optimizer,
        optimizer_fields=fields,
        rows=training.batch_size,
        shape=shape,
        accumulation=training.gradient_accumulation,
        max_steps=training.max_steps,
        epochs=training.epochs,
        n_rows=n_rows,
    )


def _detector(config: RunConfig, objective: Any) -> Blueprint:
    base: Any = config.base
    settings: Any = config.objective
    training: Any = config.training
    if isinstance(config.tuner, Mhr):
        raise ConfigError(f"`tuner: {config.tuner.method}` routes tasks, and a detector has one.")
    size = height_width("base.size", base.size or get_variant(base.variant).config.image_size)
    fields: dict[str, Any] = {**base.overrides, "image_size": size}
    rows, n_rows, epochs = (
        (training.batch_size or DETECTION_BATCH) // training.gradient_accumulation,
        None,
        72,
    )
    if objective is None and Path(config.data.path).exists():  # type: ignore[arg-type]
        objective = build_objective(config)
    if objective is not None:  # else the data are elsewhere, and the detector has COCO's classes
        fields["class_names"] = objective.class_names
        rows, n_rows = objective.device_batch_size, len(objective.records)
        epochs = objective.schedule.epochs
    detector = DEIMv2.from_variant(base.variant, **fields, class_loss=settings.class_loss)
    if config.lean:
        apply_lean(detector)
    detector.to("meta")
    learner = Learner(tune_backbone(detector, config.tuner)).train()
    learner.criterion.match = _spread_matches
    boxes = torch.zeros(BOXES, 4, device="meta")
    targets = [
        # On meta: labels on the processor would be checked, and these have no values.
        {"labels": torch.zeros(BOXES, dtype=torch.long, device="meta"), "boxes": boxes}
        for _ in range(rows)
    ]
    plain = Training(precision=training.precision)
    arguments = _arguments(config, plain)
    return Blueprint(
        model=learner,
        batch=torch.zeros(rows, 3, *size, dtype=torch.uint8, device="meta"),
        loss=lambda model, pixels: _sum(model(pixels, HostTargets(targets), epoch=0)),  # type: ignore[arg-type]
        autocast=_autocast(arguments),
        optimizer=torch.optim.AdamW,
        optimizer_fields={},
        rows=rows,
        shape=f"{rows} images of {size[0]} × {size[1]}",
        accumulation=training.gradient_accumulation,
        max_steps=training.max_steps,
        epochs=training.epochs or epochs,
        n_rows=n_rows,
        averaged=settings.ema,
    )


def _examples(config: RunConfig) -> Sequence[Any] | None:
    data: Any = config.data
    paths = [data.path] if isinstance(data.path, str) else data.path
    if not all(str(path).startswith("hf://") or Path(path).exists() for path in paths):
        return None
    return read_rows(data, seed=config.seed).train


def _arguments(config: RunConfig, training: Training) -> Any:
    """Return TrainingArguments without their effect: they reset what a trainer in this process relies on."""
    before = dict(AcceleratorState._shared_state)
    try:
        return training_arguments(training, folder=config.run_folder, tuner=config.tuner, seed=config.seed)
    finally:
        AcceleratorState._shared_state.update(before)


def _autocast(arguments: Any) -> torch.dtype | None:
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def _spread(names: Sequence[str], n: int) -> list[str]:
    """Return `n` names, all of `names` in turn: the most mixtures a batch can hold."""
    return [names[i % len(names)] for i in range(n)]


def _sum(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def _spread_matches(cost: Tensor, counts: tuple[int, ...]) -> tuple[Matches, Matches]:
    """Match boxes with queries that differ between stages, as those of a detector in training mostly do."""
    stages, _, n_queries, _ = cost.shape
    pairs = [min(n_queries, count) for count in counts]
    image = np.repeat(np.arange(len(counts)), pairs)
    target = np.concatenate([np.arange(n) for n in pairs])
    query = np.stack([(target + stage * max(pairs)) % n_queries for stage in range(stages)])
    own = Matches(image, query, np.tile(target, (stages, 1)))
    slots, first = np.unique(image * n_queries + query, return_index=True)
    return own, Matches(slots // n_queries, slots[None] % n_queries, own.target.reshape(1, -1)[:, first])
