"""One run, from recipe to folder; and what can be done with the folder: evaluate, predict.

A run's folder, every name stable:

    config.yaml       the recipe with every value written out; train with it and --resume to go on
    env.json          machine and versions; one entry for every time the run was started
    plan.json         steps, parameter groups, first batch
    objective.json    what predicting needs beyond the model: the prompt's template, labels, tasks
    sample.txt        one training row as the model sees it; what is learned stands in ⟦ ⟧
    alignment.jsonl   how the tasks' gradients agree, where `training.align_every` asked
    metrics.jsonl     every logged value, one JSON object a line
    start.json        metrics before the first step, where the run starts from a trained adapter (zero-shot)
    checkpoint-<n>/   model, optimiser, schedule and random state after step n
    model/            what the run ends with: an adapter or a whole model, and its tokenizer
    result.json       metrics of the last evaluation, over all held-out rows and by part
    predictions.jsonl what was predicted in it
    pictures/         of a detector: training pictures as it gets them, its worst images
    best/, last/      of a detector: ready to use, at its best and at its latest evaluation
    align/            what `thawline align` wrote: routes and alignment, as JSON and pictures
    eval-<data>/      of a detector: the same of `thawline eval`, with a report.html of its own
    report.html       all of the above on one page, by `thawline train` and `thawline report`
"""

from __future__ import annotations

__all__ = [
    "RunResult",
    "evaluate",
    "measure_alignment",
    "predict",
    "run",
    "save_evaluation",
    "saved_config",
]

import dataclasses
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import set_seed

import thawline
from thawline.analysis.gradients import check_alignable, plain_batch
from thawline.analysis.recorder import ALIGNMENT, AlignmentRecorder
from thawline.errors import CheckpointError, ConfigError, did_you_mean
from thawline.files import write_text
from thawline.recipe import Frozen, RunConfig, load_recipe
from thawline.report.pictures import save_worst_images
from thawline.report.run_report import PICTURES
from thawline.training.callbacks import StopOnSignal
from thawline.training.checkpoints import (
    checkpoint_step,
    find_checkpoints,
    newest_checkpoint,
    remove_incomplete_checkpoints,
)
from thawline.training.evaluation import Evaluation
from thawline.training.objective import Objective, build_objective
from thawline.training.plan import build_plan, n_parameters, plan_rows
from thawline.training.trainer import Trainer

logger = logging.getLogger(__name__)

START = "start.json"

NO_DATA = "-"
"""`data.path` of a recipe made up for a model that no run of ours trained."""

USUAL_BATCH = 8
"""Rows evaluated at a time where the recipe leaves it open."""

MAY_CHANGE = ("folder", "training.report_to", "training.workers", "training.keep_checkpoints")
"""What a resumed run may set anew: everything else would make it another run."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to."""

    folder: Path
    status: str
    """finished, interrupted or planned."""
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation, over all held-out rows."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same by part (task)."""
    start: dict[str, Any] = field(default_factory=dict)
    """`metrics` and `parts` before the first step, where `training.eval_at_start` asked; their `name`,
    zero-shot where the run adapts to new tasks."""
    trainable: int = 0
    """Trainable parameters."""
    seconds: float = 0.0
    """Wall time of training."""
    signal: int | None = None
    """What interrupted it."""


def run(config: RunConfig, *, resume: bool = False, dry_run: bool = False) -> RunResult:
    """Train and evaluate as `config` says, in its folder.

    Args:
        config: the recipe.
        resume: go on from the folder's newest checkpoint; bit for bit as if it had never stopped.
        dry_run: build everything, write plan.json, take no step.

    Raises: CheckpointError: if the folder holds a run and `resume` is False, or none and it is True.
        ConfigError, DataError: for what cannot work, before anything is written.
    """
    folder = config.run_folder
    if resume:
        _check_resumable(config)
        if (folder / "result.json").is_file():
            logger.info("%s has already finished.", folder)
            return _read_result(folder)
    elif _holds_run(folder):
        raise CheckpointError(_in_use(folder))

    set_seed(config.seed)
    objective = build_objective(config)
    model = objective.build_model()
    use_cache = getattr(getattr(model, "config", None), "use_cache", None)
    stop = StopOnSignal()
    trainer = objective.build_trainer(model, [stop, *_recorders(objective, model)])
    plan = build_plan(objective, trainer)
    if not dry_run:
        logger.info(_aligned(plan_rows(plan)))
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "plan.json", _to_json(plan))
        if not dry_run:
            _open_folder(config, objective)
    trainable, _ = n_parameters(model)
    if dry_run:
        return RunResult(folder=folder, status="planned", trainable=trainable)

    start = time.perf_counter()
    if trainable:
        if trainer.is_world_process_zero():
            remove_incomplete_checkpoints(folder)
        checkpoint = newest_checkpoint(folder)
        if resume:
            logger.info("Going on from %s.", checkpoint or "step 0: the run had saved no checkpoint")
        if checkpoint is None and objective.start_name is not None:
            found = trainer.starting_evaluation()
            if trainer.is_world_process_zero():
                start_as = {"name": objective.start_name, "metrics": found.metrics, "parts": found.parts}
                write_text(folder / START, _to_json(start_as))
        with stop.listen():
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"{str(error).split('. ')[0]}. Lower `training.batch_size` and raise "
                    "`training.gradient_accumulation`, or set `lean` or `training.gradient_checkpointing`."
                ) from error
    seconds = time.perf_counter() - start
    steps = trainer.state.global_step
    if stop.signal is not None:
        return RunResult(
            folder=folder, status="interrupted", steps=steps, trainable=trainable, signal=stop.signal
        )
    if use_cache is not None:
        model.config.use_cache = use_cache
    if trainable:
        _save_model(trainer, folder / "model")
    evaluation = trainer.final_evaluation()
    result = RunResult(
        folder=folder, status="finished", steps=steps, trainable=trainable, seconds=round(seconds, 3),
        metrics=evaluation.metrics, parts=evaluation.parts, start=_read_json(folder / START),
    )  # fmt: skip
    if trainer.is_world_process_zero():
        save_evaluation(folder, evaluation)
        write_text(folder / "result.json", _to_json(dataclasses.asdict(result)))
    return result


def evaluate(model: str | Path, *, config: RunConfig | None = None) -> Evaluation:
    """Evaluate on held-out rows.

    Args:
        model: a run's folder, an adapter's folder, or folder or Hub id of a plain model.
        config: how; None: as the run was trained (`saved_config`), which a plain model does not tell.

    Raises: ConfigError: if there are no held-out rows.
    """
    config = config or saved_config(model)
    if config.data.path == NO_DATA:
        raise ConfigError(f"'{model}' does not say what to evaluate on. Give rows: --data FILE.")
    objective = build_objective(config, read="held-out", described=_described(Path(model)))
    if not objective.held_out_rows:
        raise ConfigError(
            f"'{config.data.path}' holds no held-out rows. Give `data.eval_path` or `data.eval_fraction`."
        )
    tuned = _to_device(objective.load_tuned(_saved_folder(model)))
    return objective.evaluate(
        tuned, config.training.eval_batch_size or config.training.batch_size or USUAL_BATCH
    )


def save_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write predictions and, of a detector, detection_metrics.json and pictures/worst.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{_to_json(row, None)}\n" for row in evaluation.rows)
    write_text(folder / "predictions.jsonl", rows)
    if evaluation.detections is not None:
        save_worst_images(folder / PICTURES / "worst.png", *evaluation.detections)
    for name, values in evaluation.files.items():
        write_text(folder / name, _to_json(values))


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
        texts: inputs, instructions, users' turns or texts to go on from, by the format trained on.
        config: as for `evaluate`.
        choices: pick the likeliest of these instead of writing freely. None: the task's, where it has some.
        task: which of the tasks trained on the texts are of. None: the only one.
        batch_size: texts a forward.
        sampling: forwarded to `generate` (do_sample, temperature, top_p, …).
    """
    config = config or saved_config(model)
    objective = build_objective(config, read="none", described=_described(Path(model)))
    tuned = _to_device(objective.load_tuned(_saved_folder(model)))
    return objective.predict(tuned, texts, choices=choices, task=task, batch_size=batch_size, **sampling)


def measure_alignment(folder: str | Path) -> list[dict[str, Any]]:
    """Measure how the tasks' gradients agree at every checkpoint of a run, and write alignment.jsonl there.

    For runs that did not record it while training (`training.align_every`), which sees more than the
    checkpoints that were kept. Batches are the same as there.

    Returns: a row per checkpoint, {"step", …`Alignment.to_dict()`}.
    Raises: CheckpointError: if it is no run's folder, or there are no checkpoints. ConfigError: if alignment
        is there already, the run's rows are of one task, or nothing trains that tasks share.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"'{folder}' holds no run: alignment is measured on a run's rows.")
    file = folder / ALIGNMENT
    if file.is_file():
        raise ConfigError(f"'{file}' is there already. Move it away to measure anew.")
    saved = find_checkpoints(folder)
    if not saved:
        raise CheckpointError(f"'{folder}' has no checkpoints. Train with `training.align_every`.")
    config = load_recipe(folder / "config.yaml")
    objective = build_objective(config, described=_described(folder))
    recorder: AlignmentRecorder | None = None
    for checkpoint in saved:
        step = checkpoint_step(checkpoint)
        model = _to_device(objective.load_tuned(checkpoint))
        recorder = recorder or _recorder(objective, model, every=1)
        recorder(model, step, writes=False)
        logger.info("step %d measured", step)
    assert recorder is not None
    write_text(file, "".join(f"{_to_json(row, None)}\n" for row in recorder.rows))
    return recorder.rows


def _recorders(objective: Objective, model: nn.Module) -> list[AlignmentRecorder]:
    """Return the alignment recorder that the recipe asks for, if it does."""
    every = objective.align_every
    return (
        [] if every is None else [_recorder(objective, model, every, objective.config.run_folder / ALIGNMENT)]
    )


def _recorder(
    objective: Objective, model: nn.Module, every: int, file: Path | None = None
) -> AlignmentRecorder:
    batches, own_loss, loss = objective.alignment_batches(), objective.loss, None
    check_alignable(model, batches)
    if own_loss is not None:

        def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            return own_loss(model, plain_batch(model, batch))

    return AlignmentRecorder(batches, loss, every=every, file=file)


def saved_config(model: str | Path) -> RunConfig:
    """The recipe of a run's folder; for an adapter or a plain model, one that loads it as it is.

    Raises: CheckpointError: if a folder is meant and there is none.
    """
    path = Path(model)
    if (path / "config.yaml").is_file():
        return load_recipe(path / "config.yaml")
    if (path / "adapter_config.json").is_file():
        saved = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        tuner = {"method": saved["peft_type"].lower().removeprefix("thawline_"), "start_from": str(path)}
        return RunConfig.from_mapping(
            {"base": saved["base_model_name_or_path"], "data": NO_DATA, "tuner": tuner}
        )
    if not path.is_dir() and (path.is_absolute() or path.parts[:1] in ((".",), ("..",), ("runs",))):
        raise CheckpointError(f"No such run or model: '{model}'.{_similar(path)}")
    return RunConfig.from_mapping({"base": str(model), "data": NO_DATA, "tuner": "frozen"})


def _saved_folder(model: str | Path) -> Path | None:
    """Where trained weights lie: a run's or an adapter's; None for a plain model, which is its own base."""
    path = Path(model)
    if (path / "config.yaml").is_file():
        only_evaluated = isinstance(load_recipe(path / "config.yaml").tuner, Frozen)
        return None if only_evaluated and not _holds_detector(path) else _saved_model_folder(path)
    return path if (path / "adapter_config.json").is_file() else None


def _saved_model_folder(run_folder: Path) -> Path:
    """Return where a run keeps what it trained: model/, or what there is before it has finished.

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


def _holds_detector(folder: Path) -> bool:
    return any((folder / name / "config.json").is_file() for name in ("model", "best", "last"))


def _described(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "objective.json")


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _to_device(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _holds_run(folder: Path) -> bool:
    """Whether anything in the folder could be lost. A plan costs nothing to make again."""
    return folder.exists() and any(path.name != "plan.json" for path in folder.iterdir())


def _in_use(folder: Path) -> str:
    if (folder / "result.json").is_file():
        return f"{folder} holds a finished run. Give this one another name: --name {folder.name}-2."
    checkpoint = newest_checkpoint(folder)
    state = f"a run that stands at {checkpoint.name}" if checkpoint else "a run without a checkpoint"
    return f"{folder} holds {state}. Add --resume to go on with it, or --name {folder.name}-2 for a new one."


def _check_resumable(config: RunConfig) -> None:
    folder = config.run_folder
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"Nothing to resume: '{folder}' holds no run.{_similar(folder)}")
    before, now = (_flat(c.to_mapping()) for c in (load_recipe(folder / "config.yaml"), config))
    changed = [key for key in now if before.get(key) != now[key] and key not in (*MAY_CHANGE, "name")]
    if changed:
        key = changed[0]
        others = f" (and {', '.join(changed[1:])})" if changed[1:] else ""
        raise ConfigError(
            f"The run in '{folder}' has {key}={before.get(key)!r}, not {now[key]!r}{others}: resuming must "
            f"not change it. To go on as it is: thawline train --config {folder}/config.yaml --resume"
        )


def _similar(folder: Path) -> str:
    names = [path.name for path in folder.parent.glob("*") if (path / "config.yaml").is_file()]
    return f" {did_you_mean(folder.name, names)}" if names else ""


def _open_folder(config: RunConfig, objective: Objective) -> None:
    """Write what says which run this is. config.yaml comes last: it is what makes the folder a run."""
    folder = config.run_folder
    env_file = folder / "env.json"
    starts = json.loads(env_file.read_text(encoding="utf-8")) if env_file.is_file() else []
    write_text(env_file, _to_json([*starts, environment()]))
    write_text(folder / "objective.json", _to_json(objective.describe()))
    write_text(folder / "sample.txt", objective.preview() + "\n")
    objective.save_images(folder / PICTURES)
    named = dataclasses.replace(config, name=config.run_name)
    text = yaml.safe_dump(named.to_mapping(), sort_keys=False, allow_unicode=True)
    write_text(folder / "config.yaml", text)


def _save_model(trainer: Trainer, target: Path) -> None:
    """Write model/ whole or not at all."""
    beside = target.with_name(".model")
    if trainer.is_world_process_zero():
        shutil.rmtree(beside, ignore_errors=True)
    trainer.save_model(str(beside))
    if trainer.is_world_process_zero():
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)


def environment() -> dict[str, Any]:
    """Machine, versions and command of this process."""
    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"thawline": thawline.__version__, **{name: version(name) for name in packages}},
    }


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(heading) for heading, _ in rows)
    return "\n".join(f"{heading:{width}}  {words}" for heading, words in rows)


def _read_result(folder: Path) -> RunResult:
    values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return RunResult(**{**values, "folder": Path(values["folder"])})


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        nested = isinstance(value, dict) and not prefix
        flat |= _flat(value, f"{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _to_json(value: Any, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)
