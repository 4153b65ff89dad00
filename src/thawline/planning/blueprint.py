"""Build what a recipe trains, without its weights: the model, a full batch, the loss, the optimiser."""

from __future__ import annotations

__all__ = ["Blueprint", "draw_blueprint"]

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from thawline.domains import BASE, shared_path
from thawline.domains.attach import attach_domain
from thawline.domains.classes import group_classes, train_last_group
from thawline.errors import ConfigError
from thawline.models.deimv2.checkpoints.read import config_of, read_checkpoint
from thawline.models.deimv2.loss.matcher import Matches
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.variants import get_variant
from thawline.ops.lean import apply_lean, is_lean
from thawline.ops.lean_head import LeanHeadModel
from thawline.recipe import Mhr, Paca, RunConfig, Training
from thawline.recipe.checks import height_width
from thawline.training.arguments import training_arguments
from thawline.training.detection.backbone import tune_backbone
from thawline.training.detection.detectors import Detectors
from thawline.training.detection.learner import HostTargets, Learner
from thawline.training.objective import Objective, build_objective
from thawline.training.text.rows import read_rows
from thawline.training.trainer import smoothed_loss

LAUNCHED_WITH = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
"""Variables of `accelerate launch` from which TrainingArguments make plugins."""
BOXES = 8
"""Boxes assumed per image, about COCO's mean; their number hardly changes a detector's memory."""
DETECTION_BATCH = 32
"""Images per step where neither recipe nor data say: that of the published sizes from N on."""


MakeBatch = Callable[[int, int | None], tuple[Any, str]]
"""Rows, and tokens of a row (None: as many as the recipe has), → a full batch, and the batch in words."""


@dataclass(kw_only=True)
class Blueprint:
    """Everything that the cost of a training step follows from."""

    model: nn.Module
    """On the meta device."""
    make_batch: MakeBatch
    loss: Callable[[nn.Module, Any], Any]
    arguments: Any
    """TrainingArguments of the run."""
    rows: int
    """Rows or images in a forward pass, by the recipe."""
    accumulation: int
    epochs: float
    n_rows: int | None
    """Training rows. None: they could not be read."""
    averaged: bool = False
    """True if a moving average of the weights is kept."""
    uses_liger: bool = False
    """True if the run replaces modules by Liger's, which are not planned."""

    @property
    def autocast(self) -> torch.dtype | None:
        """Type of mixed precision. None: off."""
        return torch.bfloat16 if self.arguments.bf16 else torch.float16 if self.arguments.fp16 else None


def draw_blueprint(config: RunConfig, objective: Objective | None = None) -> Blueprint:
    """Build the model of a recipe on the meta device, and what makes full batches for it.

    Args:
        objective: the recipe's, with its rows. None: they are read, where they are there.
    Raises: ConfigError: if the base has no readable config, or the recipe cannot work. DataError: for
        `objective: match` without readable rows, since its batches follow from them.
    """
    config = _without_reading(config)
    if config.objective.kind == "detection":
        return _detector(config, objective)
    if config.objective.kind == "match":
        return _matcher(config, objective or build_objective(config))
    return _language_model(config, objective)


def _without_reading(config: RunConfig) -> RunConfig:
    """Replace what would read weights or batches by choices of the same cost."""
    tuner: Any = config.tuner
    changed: dict[str, Any] = {}
    if isinstance(tuner, Paca) and tuner.selection != "explicit":
        changed["selection"] = "random"
    if getattr(tuner, "start_from", None) is not None:
        changed |= {"start_from": None, **({"adapt": "none"} if isinstance(tuner, Mhr) else {})}
    return dataclasses.replace(config, tuner=dataclasses.replace(tuner, **changed)) if changed else config


def _language_model(config: RunConfig, known: Any) -> Blueprint:
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
    n_rows = None if examples is None else len(examples)
    if known is not None:
        n_rows = len(known.train_rows)
    elif data.packing:
        n_rows = None  # only a tokenizer could tell how many packs there are
    is_packed = data.packing is True if known is None else bool(known.unpacked_rows)
    has_masks = is_packed and "flash" not in (base.attn_implementation or "")

    def make_batch(rows: int, length: int | None) -> tuple[Any, str]:
        length = length or data.max_length
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        labels = ids[:, 0] if objective.head == "classifier" else torch.zeros_like(ids)
        batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if has_masks:
            batch |= {"position_ids": torch.zeros_like(ids), "use_cache": False}
        if objective.task_ids:
            names = objective.tasks  # all in turn: the most mixtures a batch can hold
            batch |= objective.ids_of([names[i % len(names)] for i in range(rows)])
        return batch, f"{rows} × {length} tokens"

    smoothing = config.training.args.get("label_smoothing_factor")
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_shifted = objective.head == "causal-lm"

    def loss(model: nn.Module, batch: dict[str, Any]) -> Any:
        if smoothing and not isinstance(base_model, LeanHeadModel):
            return smoothed_loss(model, batch, smoothing, shifted=is_shifted)
        return model(**batch)

    return _text(config, model, make_batch, loss, n_rows)


def _matcher(config: RunConfig, known: Any) -> Blueprint:
    objective = copy.copy(known)
    objective.has_weights = False
    model = objective.build_model()
    in_order = sorted(objective.train_rows, key=lambda row: len(row["input_ids"]))

    def make_batch(rows: int, length: int | None) -> tuple[Any, str]:
        batch = objective.collate(in_order[-rows:])
        shape = "{} × {} tokens, {} choices".format(*batch["input_ids"].shape, len(batch["choice_ids"]))
        return batch, shape

    return _text(config, model, make_batch, objective.loss, len(in_order))


def _text(
    config: RunConfig, model: Any, make_batch: MakeBatch, loss: Callable[..., Any], n_rows: int | None
) -> Blueprint:
    training: Any = config.training
    if training.gradient_checkpointing:
        model.config.use_cache = False  # as the model does then, which says so
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Blueprint(
        model=model.train(),
        make_batch=make_batch,
        loss=loss,
        arguments=_arguments(config, training),
        rows=training.batch_size,
        accumulation=training.gradient_accumulation,
        epochs=training.epochs,
        n_rows=n_rows,
        uses_liger=bool(training.args.get("use_liger_kernel")),
    )


def _detector(config: RunConfig, objective: Any) -> Blueprint:
    base: Any = config.base
    data: Any = config.data
    settings: Any = config.objective
    training: Any = config.training
    size = height_width("base.size", base.size or get_variant(base.variant).config.image_size)
    fields: dict[str, Any] = {**base.overrides, "image_size": size}
    rows = (training.batch_size or DETECTION_BATCH) // training.gradient_accumulation
    n_rows, epochs = None, 72
    names = tuple(config.datasets) or (config.domain or "",)
    classes: list[dict[str, Any]] = [{} for _ in names]
    if objective is None and all(Path(path).exists() for path in data.datasets.values()):
        objective = build_objective(config)
    if objective is not None:  # else the data are elsewhere, and the detector has COCO's classes
        fields |= {"image_size": objective.size}
        classes = [{"class_names": dataset.class_names} for dataset in objective.datasets]
        rows, n_rows = objective.device_batch_size, len(objective.records)
        epochs = objective.schedule.epochs
    with torch.device("meta"):
        members = _networks(base, [{**fields, **own, "class_loss": settings.class_loss} for own in classes])
    detector = members[0]
    if config.lean and not is_lean(apply_lean(detector)):
        raise ConfigError(f"`lean`: '{base.variant}' has nothing that can be lean. Leave it out.")
    if n_added := len(config.added_classes):
        train_last_group(group_classes(detector, (detector.config.num_classes - n_added, n_added)))
    elif config.keeps_base:
        attach_domain(detector, config.tuner, names)
    else:
        tune_backbone(detector, config.tuner)
    learner = Learner(Detectors(names, members).share() if len(members) > 1 else detector).train()
    learner.criterion.match = _spread_matches

    def make_batch(rows: int, length: int | None) -> tuple[Any, str]:
        labels = torch.zeros(BOXES, dtype=torch.long, device="meta")  # on the processor they would be checked
        targets = [{"labels": labels, "boxes": torch.zeros(BOXES, 4, device="meta")} for _ in range(rows)]
        height, width = detector.config.image_size
        pixels = torch.zeros(rows, 3, height, width, dtype=torch.uint8, device="meta")
        return (pixels, HostTargets(targets)), f"{rows} images of {height} × {width}"  # type: ignore[arg-type]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return torch.stack(list(model(*batch, epoch=0).values())).sum()

    return Blueprint(
        model=learner,
        make_batch=make_batch,
        loss=loss,
        arguments=_arguments(config, Training(precision=training.precision, max_steps=training.max_steps)),
        rows=rows,
        accumulation=training.gradient_accumulation,
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
    plain = {"eval_every": "end", "save_every": "end", "best_metric": None, "report_to": "none"}
    args = {name: value for name, value in training.args.items() if name != "use_liger_kernel"}
    training = dataclasses.replace(training, args=args, **plain)  # type: ignore[arg-type]
    # In a launched process accelerate's state says how the model is trained: it must survive.
    states = {kind: dict(kind._shared_state) for kind in (PartialState, AcceleratorState)}
    launched = {name: os.environ.pop(name) for name in LAUNCHED_WITH if name in os.environ}
    try:
        return training_arguments(training, folder=config.run_folder, tuner=config.tuner, seed=config.seed)
    finally:
        os.environ |= launched
        for kind, state in states.items():
            kind._shared_state.clear()
            kind._shared_state.update(state)


def _networks(base: Any, overrides: Sequence[dict[str, Any]]) -> list[DEIMv2]:
    """Return detectors of the base's weights, where they are here, else of its size, without weights."""
    if base.weights is None or not Path(base.weights).exists():
        return [DEIMv2.from_variant(base.variant, **own) for own in overrides]
    shared = shared_path(base.weights)
    checkpoint = read_checkpoint(base.weights if shared is None else shared / BASE)
    return [DEIMv2(config_of(checkpoint, base.variant, own)) for own in overrides]


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
