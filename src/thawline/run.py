"""Runs: train by a recipe; evaluate, predict and measure alignment from a run's folder (`run_folder`)."""

from __future__ import annotations

__all__ = [
    "RunResult",
    "evaluate",
    "evaluate_domain",
    "load_tuned",
    "measure_alignment",
    "predict",
    "run",
    "save_evaluation",
    "saved_config",
]

import dataclasses
import gc
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import set_seed

from thawline.analysis.gradients import check_alignable, plain_batch
from thawline.analysis.recorder import ALIGNMENT, AlignmentRecorder
from thawline.domains.domain import load_domain, read_domain
from thawline.errors import CheckpointError, ConfigError
from thawline.files import is_write_failure, write_jsonl
from thawline.models.deimv2 import DEIMv2
from thawline.planning.devices import available_bytes
from thawline.planning.plan import Planner
from thawline.planning.tables import short_plan
from thawline.recipe import RunConfig, build_config
from thawline.run_folder import NO_DATA, RunFolder, RunResult
from thawline.tables import labelled
from thawline.training.callbacks import Patience, StopOnSignal
from thawline.training.checkpoints import (
    checkpoint_step,
    find_checkpoints,
    newest_checkpoint,
    remove_half_written,
)
from thawline.training.evaluation import Evaluation
from thawline.training.objective import Objective, build_objective
from thawline.training.plan import build_plan
from thawline.training.trainer import Trainer

logger = logging.getLogger(__name__)

LESS_MEMORY = (
    "Lower `training.batch_size` and raise `training.gradient_accumulation`, or set `lean` or "
    "`training.gradient_checkpointing`"
)
USUAL_BATCH = 8
"""Rows evaluated at a time where the recipe does not say."""


@contextmanager
def _hide_deprecations() -> Iterator[None]:
    """Hide what the libraries below say of calls between them, which no user can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")
        yield


@_hide_deprecations()
def run(
    config: RunConfig, *, resume: bool = False, dry_run: bool = False, plan_memory: bool = False
) -> RunResult:
    """Train and evaluate as a recipe says, in its folder.

    Args:
        config: the recipe.
        resume: continue from the newest whole checkpoint; bit for bit as if the run had never stopped. Where
            `training.epochs`, `max_steps` or `patience` differ, a new stage begins there, also after the end.
        dry_run: build everything, write plan.json, take no step.
        plan_memory: say beforehand what the run will need, and warn if that is more than is there.

    Raises: CheckpointError: if the folder holds a run and `resume` is False, or none and it is True; if no
        checkpoint to resume from is whole; if there is no room to write a file. ConfigError, DataError: for
        what cannot work, before anything is written.
    """
    folder = RunFolder(config.run_folder)
    finished, changed = folder.result() if resume else None, {}
    if resume:
        changed = folder.check_resumable(config)
    else:
        folder.check_unused()
    if finished is not None and not changed:
        return _already(finished)
    set_seed(config.seed)
    objective = build_objective(config)
    model = objective.build_model()
    use_cache = getattr(getattr(model, "config", None), "use_cache", None)
    stop, patience = StopOnSignal(), _patience(objective)
    callbacks = [stop, *patience, *_recorders(objective, model)]
    trainer = objective.build_trainer(model, callbacks)
    is_first_process = trainer.is_world_process_zero()
    checkpoint = _agreed_checkpoint(folder, is_first_process) if resume else None
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    stage = {"from_step": step, "changed": changed} if changed else {}
    for callback in patience:
        callback.since = step if stage else folder.stage_start()
    plan = build_plan(objective, trainer)
    if stage and "steps" in plan:
        _check_longer(plan["steps"], step, changed)
        if finished is not None and plan["steps"] == finished.steps:
            return _already(finished)
        was = ", ".join(f"{key} {before!r}" for key, (before, _) in changed.items())
        plan["overview"]["steps"] += f"; a new stage of them from step {step} on (was: {was})"
        plan["stage"] = stage
    if plan_memory and plan["trainable_parameters"]:
        _add_memory(plan, objective, trainer)
    if is_first_process:
        if resume:
            folder.check_rows(plan)
        folder.write("plan.json", plan)
    result = RunResult(folder=folder.path, status="planned", trainable=plan["trainable_parameters"])
    if dry_run:
        return result
    logger.info(labelled(plan["overview"].items()))
    with _room_to_write(folder, trainer):
        if is_first_process:
            folder.open(objective, stage)
        if resume:
            logger.info("Resuming from %s.", checkpoint or "step 0: the run had saved no checkpoint")
        start = time.perf_counter()
        if result.trainable:
            _take_steps(trainer, objective, folder, stop, checkpoint)
        seconds = round(time.perf_counter() - start, 3)
        result = dataclasses.replace(result, steps=trainer.state.global_step)
        if stop.signal is not None:
            return dataclasses.replace(result, status="interrupted", signal=stop.signal)
        if use_cache is not None:
            model.config.use_cache = use_cache
        if result.trainable:
            folder.save_model(trainer)
        evaluation = trainer.final_evaluation()
        result = dataclasses.replace(
            result, status="finished", seconds=seconds,
            metrics=evaluation.metrics, parts=evaluation.parts, start=folder.start(),
            stopped="".join(callback.stopped for callback in patience), ending=trainer.ending,
        )  # fmt: skip
        if is_first_process:
            folder.save_evaluation(evaluation)
            folder.write("result.json", dataclasses.asdict(result))
    return result


@_hide_deprecations()
def evaluate(model: str | Path, *, config: RunConfig | None = None) -> Evaluation:
    """Evaluate on held-out rows.

    Args:
        model: folder of a run or an adapter, or folder or Hub id of a plain model.
        config: recipe to evaluate by. None: the run's (`saved_config`), which a plain model does not have.

    Raises: ConfigError: if there are no held-out rows.
    """
    folder = RunFolder(Path(model))
    config = config or folder.config()
    if config.data.path == NO_DATA:
        raise ConfigError(f"'{model}' does not say what to evaluate on. Give rows: --data FILE.")
    objective = build_objective(config, read="held-out", described=folder.described())
    if not objective.held_out_rows:
        raise ConfigError(
            f"'{config.data.path}' holds no held-out rows. Give `data.eval_path` or `data.eval_fraction`."
        )
    return objective.evaluate(_load_tuned(objective, folder.weights()), _evaluation_batch(config))


def evaluate_domain(
    base: nn.Module, digest: str, folder: str | Path, overrides: Mapping[str, Any]
) -> Evaluation:
    """Evaluate a domain on the held-out images of the data that it was trained on, or of other data.

    Args:
        base: the detector that it was trained on.
        digest: of the base.
        folder: the domain's.
        overrides: values over those of its recipe.
    Raises: CheckpointError: the domain is damaged. ConfigError, DataError: there is nothing to evaluate on.
    """
    about = read_domain(folder)
    if not about.recipe:
        raise CheckpointError(f"'{folder}' does not say on which data it was trained.")
    config = build_config([(str(folder), about.recipe), ("the overrides", overrides)])
    described = {"class_names": about.class_names, "image_size": about.image_size}
    objective = build_objective(config, read="held-out", described=described)
    return objective.evaluate(load_domain(cast(DEIMv2, base), folder, digest), _evaluation_batch(config))


@_hide_deprecations()
def predict(
    model: str | Path,
    texts: Sequence[str],
    *,
    config: RunConfig | None = None,
    choices: Sequence[str] = (),
    task: str | None = None,
    batch_size: int = 8,
    **sampling: Any,
) -> list[str]:
    """Answer texts, each put into the prompt the model was trained with.

    Args:
        model: as for `evaluate`.
        texts: inputs, instructions, users' turns or beginnings of texts, by the format trained on.
        config: as for `evaluate`.
        choices: pick the most likely of these instead of writing freely. None: the task's, where it has some.
        task: the texts' task, among those trained. None: the only one.
        batch_size: texts per forward pass.
        sampling: forwarded to `generate` (do_sample, temperature, top_p, …).
    """
    objective, tuned = load_tuned(model, config)
    return objective.predict(tuned, texts, choices=choices, task=task, batch_size=batch_size, **sampling)


def load_tuned(model: str | Path, config: RunConfig | None = None) -> tuple[Objective, nn.Module]:
    """Load the tuned model of a run's folder, with the objective it was trained for.

    Args:
        config: as for `evaluate`.
    """
    folder = RunFolder(Path(model))
    objective = build_objective(config or folder.config(), read="none", described=folder.described())
    return objective, _load_tuned(objective, folder.weights())


def measure_alignment(folder: str | Path) -> list[dict[str, Any]]:
    """Measure the alignment of the tasks' gradients at every checkpoint of a run, and write alignment.jsonl.

    For runs that did not record it while training (`training.align_every`), which sees more steps than the
    checkpoints that were kept. Batches are the same as there.

    Returns: a row per checkpoint, {"step", …`Alignment.to_dict()`}.
    Raises: CheckpointError: if it is no run's folder, or there are no checkpoints. ConfigError: if there
        already is an alignment.jsonl, the run's rows are of one task, or nothing trains that tasks share.
    """
    run_folder, file = RunFolder(Path(folder)), Path(folder) / ALIGNMENT
    if not run_folder.is_run:
        raise CheckpointError(f"'{folder}' holds no run: alignment is measured on a run's rows.")
    if file.is_file():
        raise ConfigError(f"'{file}' already exists. Move it away to measure again.")
    checkpoints = find_checkpoints(run_folder.path)
    if not checkpoints:
        raise CheckpointError(f"'{folder}' has no checkpoints. Train with `training.align_every`.")
    objective = build_objective(run_folder.config(), described=run_folder.described())
    recorder: AlignmentRecorder | None = None
    for checkpoint in checkpoints:
        model = _load_tuned(objective, checkpoint)
        recorder = recorder or _recorder(objective, model, every=1)
        recorder(model, checkpoint_step(checkpoint), writes=False)
        logger.info("%s measured", checkpoint.name)
    assert recorder is not None
    write_jsonl(file, recorder.rows)
    return recorder.rows


def saved_config(model: str | Path) -> RunConfig:
    """Return the recipe of a run's folder; for an adapter or a plain model, one that loads it as it is.

    Raises: CheckpointError: if a folder is meant and there is none.
    """
    return RunFolder(Path(model)).config()


def save_evaluation(folder: str | Path, evaluation: Evaluation) -> None:
    """Write predictions and, for a detector, detection_metrics.json and pictures/worst.png into `folder`."""
    RunFolder(Path(folder)).save_evaluation(evaluation)


def _evaluation_batch(config: RunConfig) -> int:
    """Return the number of rows that are evaluated at a time."""
    return config.training.eval_batch_size or config.training.batch_size or USUAL_BATCH


def _already(finished: RunResult) -> RunResult:
    logger.info("%s has already finished: %d steps.", finished.folder, finished.steps)
    return finished


def _patience(objective: Objective) -> list[Patience]:
    """Return the callback that ends a run early, if the recipe asks for it. Raises: ConfigError."""
    training = objective.training
    if training.patience is None:
        return []
    if not objective.held_out_rows:
        raise ConfigError("`training.patience` needs held-out rows or images, whose metric it looks at.")
    metric = training.best_metric
    smaller = metric in objective.smaller_is_better
    return [Patience(metric, training.patience, smaller_is_better=smaller)]


def _check_longer(n_steps: int, done: int, changed: Mapping[str, Sequence[Any]]) -> None:
    """Raises: ConfigError: if a run of another length would be over already."""
    if n_steps < done:
        given = ", ".join(f"`{key}: {now}`" for key, (_, now) in changed.items())
        raise ConfigError(
            f"{given} makes {n_steps} steps, and the run has done {done}. Give more, or start another run "
            "with --name."
        )


def _agreed_checkpoint(folder: RunFolder, is_first_process: bool) -> Path | None:
    """Return the checkpoint to resume from, as the first process finds it."""
    found = [newest_checkpoint(folder.path) if is_first_process else None]
    return broadcast_object_list(found)[0]


@contextmanager
def _room_to_write(folder: RunFolder, trainer: Trainer) -> Iterator[None]:
    """Say in one line that a file could not be written, and remove the half-written checkpoint.

    Raises: CheckpointError.
    """
    try:
        yield
    except Exception as error:
        if not is_write_failure(error):
            raise
        if trainer.is_world_process_zero():
            remove_half_written(folder.path)
        earlier = [
            sum(file.stat().st_size for file in path.glob("*")) for path in find_checkpoints(folder.path)
        ]
        needed = max(trainer.checkpoint_bytes(), *earlier, 0)
        again = f"thawline train --config {folder.path}/config.yaml --resume"
        again = again if folder.is_run else "start again"
        raise CheckpointError(
            f"'{getattr(error, 'filename', None) or folder.path}' could not be written: a checkpoint takes "
            f"about {needed:,} bytes, and {shutil.disk_usage(folder.path).free:,} are "
            f"free. Make room, then {again}."
        ) from error


def _take_steps(
    trainer: Trainer, objective: Objective, folder: RunFolder, stop: StopOnSignal, checkpoint: Path | None
) -> None:
    """Train from a checkpoint or from step 0, which may be evaluated first."""
    is_first_process = trainer.is_world_process_zero()
    if is_first_process:
        remove_half_written(folder.path)
    if checkpoint is None and objective.start_name is not None:
        found = trainer.full_evaluation()
        if is_first_process:
            start = {"name": objective.start_name, "metrics": found.metrics, "parts": found.parts}
            folder.write("start.json", start)
    with stop.listen():
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"{str(error).split('. ')[0]}. {LESS_MEMORY}.") from error


def _add_memory(plan: dict[str, Any], objective: Objective, trainer: Trainer) -> None:
    """Add to a run's plan what it needs on each device, and warn if there is less."""
    args, is_text = trainer.args, objective.config.objective.kind != "detection"
    longest = max(len(row["input_ids"]) for row in objective.train_rows) if is_text else None
    try:
        parts = Planner(objective.config, devices=args.world_size, objective=objective).bytes(length=longest)
    except Exception as error:  # a plan must not be what ends a run
        plan["overview"]["memory"] = f"not planned: {str(error).strip().partition(chr(10))[0]}"
        return
    finally:
        gc.collect()  # else the layers of the planned model would be called after optimiser steps
    available = available_bytes(args.device)
    plan["overview"]["memory"] = short_plan(parts, available)
    plan["memory"] = parts
    if parts["total"] > available:
        logger.warning(
            "The run will probably not fit: %s. %s; `thawline plan --compare` shows other tuners.",
            plan["overview"]["memory"],
            LESS_MEMORY,
        )


def _load_tuned(objective: Objective, folder: Path | None) -> nn.Module:
    return objective.load_tuned(folder).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _recorders(objective: Objective, model: nn.Module) -> list[AlignmentRecorder]:
    """Return the alignment recorder that the recipe asks for, if it does."""
    every, file = objective.align_every, objective.config.run_folder / ALIGNMENT
    return [] if every is None else [_recorder(objective, model, every, file)]


def _recorder(
    objective: Objective, model: nn.Module, every: int, file: Path | None = None
) -> AlignmentRecorder:
    batches, own_loss, loss = objective.alignment_batches(), objective.loss, None
    check_alignable(model, batches)
    if own_loss is not None:

        def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            return own_loss(model, plain_batch(model, batch))

    return AlignmentRecorder(batches, loss, every=every, file=file)
