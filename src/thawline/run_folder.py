"""The folder of a run: its files, all with stable names, and what can be read back from them.

config.yaml       the recipe with every value written out; train with it and --resume to continue
env.json          machine and versions; one entry for every start of the run, and what it changed
plan.json         the plan in words; steps, parameter groups, first batch
objective.json    what predicting needs beyond the model: the prompt's template, labels, tasks
sample.txt        one training row as the model sees it; learned tokens stand in ⟦ ⟧
alignment.jsonl   alignment of the tasks' gradients, every `training.align_every` steps
metrics.jsonl     every logged value, one JSON object per line
start.json        metrics before the first step, where the run starts from a trained adapter (zero-shot)
checkpoint-<n>/   model, optimiser, schedule and random state after step n
model/            the trained model: an adapter or a whole model, and its tokenizer
result.json       metrics of the last evaluation, over all held-out rows and by part
predictions.jsonl predictions of the last evaluation
pictures/         detection: training images as the model sees them, the worst images
domains/<name>/   detection: what the run added to its base for a `domain`, or for each of several datasets
best/, last/      detection: ready-to-use detectors of the best and of the latest evaluation
align/            routes and alignment as JSON and charts, by `thawline align`
eval-<data>/      detection: results of `thawline eval`, with a report.html
report.html       all of the above on one page, by `thawline train` and `thawline report`
"""

from __future__ import annotations

__all__ = ["NO_DATA", "RunFolder", "RunResult"]

import dataclasses
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any

import torch
import yaml

import thawline
from thawline.domains import is_shared
from thawline.errors import CheckpointError, ConfigError, did_you_mean
from thawline.files import read_json, write_json, write_jsonl, write_text
from thawline.recipe import Frozen, RunConfig, TextBase, load_recipe
from thawline.report.gallery import save_gallery, save_worst_images
from thawline.report.run_report import PICTURES
from thawline.training.checkpoints import newest_checkpoint
from thawline.training.evaluation import Evaluation
from thawline.training.objective import Objective
from thawline.training.trainer import Trainer

logger = logging.getLogger(__name__)

NO_DATA = "-"
"""`data.path` of a recipe for a model that was not trained by a run."""

BEFORE_A_RUN = ("plan.json", "env.json", "objective.json", "sample.txt", PICTURES)
"""Files that a plan, or a run that was stopped before it began, leaves: cheap to make again."""

LENGTH = ("training.epochs", "training.max_steps", "training.patience")
"""Settings of a run's length, which a resumed run may change: a new stage begins there."""

MAY_CHANGE = (
    "name", "folder", "training.report_to", "training.workers", "training.keep_checkpoints",
    "training.on_broken_loss",
)  # fmt: skip
"""Settings that a resumed run may change: any other would make it another run."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Outcome of a run."""

    folder: Path
    status: str
    """finished, interrupted or planned."""
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation, over all held-out rows."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same metrics by part: task or class."""
    start: dict[str, Any] = field(default_factory=dict)
    """`metrics` and `parts` before the first step, where `training.eval_at_start` asks for them; their `name`
    is zero-shot where the run adapts to new tasks."""
    trainable: int = 0
    """Trainable parameters."""
    seconds: float = 0.0
    """Wall time of training, since it was last resumed."""
    stopped: str = ""
    """Why training ended before its last step (`training.patience`); empty where it did not."""
    ending: str = ""
    """Detection: how the last and the best epoch compare, and which weights were kept."""
    signal: int | None = None
    """Signal that interrupted the run."""


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, or of an adapter or plain model that no run has made.

    Args:
        path: the folder. A plain model may also be named by its Hub id.
    """

    path: Path

    @property
    def is_run(self) -> bool:
        """True once a run was started here."""
        return (self.path / "config.yaml").is_file()

    def check_unused(self) -> None:
        """Check that nothing in the folder could be lost; a plan is cheap to make again.

        Raises: CheckpointError: if it holds a run, or other files.
        """
        path = self.path
        names = {file.name for file in path.iterdir()} if path.exists() else set()
        if not self.is_run and all(name in BEFORE_A_RUN or name.startswith(".") for name in names):
            return
        if (path / "result.json").is_file():
            raise CheckpointError(
                f"{path} holds a finished run. Give this one another name: --name {path.name}-2."
            )
        checkpoint = newest_checkpoint(path)
        state = f"a run that stands at {checkpoint.name}" if checkpoint else "a run without a checkpoint"
        raise CheckpointError(
            f"{path} holds {state}. Add --resume to continue it, or --name {path.name}-2 for a new one."
        )

    def check_resumable(self, config: RunConfig) -> dict[str, list[Any]]:
        """Check that the folder holds the run of `config`, which may be of another length.

        Returns: settings of its length that differ: name → value of the run, value in `config`.
        Raises: CheckpointError: if it holds none. ConfigError: if its run has another recipe.
        """
        if not self.is_run:
            raise CheckpointError(f"Nothing to resume: '{self.path}' holds no run.{self._similar()}")
        before, now = _flat(self.config()), _flat(config)
        changed = {key: [before.get(key), now[key]] for key in now if before.get(key) != now[key]}
        refused = [key for key in changed if key not in MAY_CHANGE + LENGTH]
        if refused:
            key = refused[0]
            others = f" (and {', '.join(refused[1:])})" if refused[1:] else ""
            raise ConfigError(
                f"The run in '{self.path}' has {key}={before.get(key)!r}, not {now[key]!r}{others}: resuming "
                "must not change it. To continue it unchanged: thawline train --config "
                f"{self.path}/config.yaml --resume"
            )
        return {key: values for key, values in changed.items() if key in LENGTH}

    def check_rows(self, plan: Mapping[str, Any]) -> None:
        """Warn if the training rows of a plan are not those of the plan in the folder."""
        try:
            before = read_json(self.path / "plan.json")
        except CheckpointError:
            return  # damaged, and about to be replaced
        if before.get("rows_sha256", plan["rows_sha256"]) != plan["rows_sha256"]:
            logger.warning(
                "The training rows are not those of before (%s then, %s now, or with other contents): from "
                "here on the run trains on these.",
                before["rows"]["train"], plan["rows"]["train"],
            )  # fmt: skip

    def open(self, objective: Objective, stage: Mapping[str, Any]) -> None:
        """Write what identifies the run, or a new stage of it. config.yaml comes last: it makes it a run."""
        config = objective.config
        self.write("env.json", [*read_json(self.path / "env.json"), {**_environment(), **stage}])
        if stage:
            (self.path / "result.json").unlink(missing_ok=True)
        self.write("objective.json", objective.describe())
        write_text(self.path / "sample.txt", objective.preview() + "\n")
        objective.save_images(self.path / PICTURES)
        named = dataclasses.replace(config, name=config.run_name).to_mapping()
        write_text(self.path / "config.yaml", yaml.safe_dump(named, sort_keys=False, allow_unicode=True))

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        write_json(self.path / name, value)

    def save_model(self, trainer: Trainer) -> None:
        """Write model/, which appears complete or not at all; all processes take part."""
        folder, temporary = self.path / "model", self.path / ".model"
        if trainer.is_world_process_zero():
            shutil.rmtree(temporary, ignore_errors=True)
        trainer.save_model(str(temporary))
        if trainer.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)

    def save_evaluation(self, evaluation: Evaluation) -> None:
        """Write predictions and, for a detector, detection_metrics.json and images in pictures/."""
        write_jsonl(self.path / "predictions.jsonl", evaluation.rows)
        if evaluation.detections is not None:
            save_worst_images(self.path / PICTURES / "worst.png", *evaluation.detections)
            save_gallery(self.path / PICTURES, *evaluation.detections)
        for name, one in evaluation.datasets.items():
            if one.detections is not None:
                save_worst_images(self.path / PICTURES / f"worst-{name}.png", *one.detections)
        for name, values in evaluation.files.items():
            self.write(name, values)

    def result(self) -> RunResult | None:
        """Return the outcome of the run; None: it has not finished."""
        values = read_json(self.path / "result.json")
        return RunResult(**{**values, "folder": Path(values["folder"])}) if values else None

    def stage_start(self) -> int:
        """Return the step at which the run's newest stage began; 0 for a run whose length never changed."""
        starts = read_json(self.path / "env.json")
        return next((start["from_step"] for start in reversed(starts) if "from_step" in start), 0)

    def start(self) -> dict[str, Any]:
        """Return the evaluation before the first step; nothing where there was none."""
        return read_json(self.path / "start.json")

    def described(self) -> dict[str, Any]:
        """Return what the objective described when the run was trained; nothing where no run was."""
        return read_json(self.path / "objective.json")

    def config(self) -> RunConfig:
        """Return the run's recipe; for an adapter or a plain model, a recipe that loads it as it is.

        Raises: CheckpointError: if a folder is meant and there is none.
        """
        path = self.path
        if self.is_run:
            config = load_recipe(path / "config.yaml")
            if not isinstance(config.base, TextBase):
                return config
            return dataclasses.replace(
                config, base=dataclasses.replace(config.base, model=self._find_base(config.base.model))
            )
        base, tuner = str(path), {"method": "frozen"}
        if saved := read_json(path / "adapter_config.json"):
            for field in ("peft_type", "base_model_name_or_path"):
                if not saved.get(field):
                    raise CheckpointError(
                        f"'{path}' does not say what it is: its adapter_config.json lacks `{field}`. Write "
                        "it there: PEFT's method, and the folder or Hub id of the base."
                    )
            base = self._find_base(saved["base_model_name_or_path"])
            method = saved["peft_type"].lower().removeprefix("thawline_")
            tuner = {"method": method, "start_from": str(path)}
        elif not path.is_dir() and (path.is_absolute() or path.parts[:1] in ((".",), ("..",), ("runs",))):
            raise CheckpointError(f"No such run or model: '{path}'.{self._similar()}")
        return RunConfig.from_mapping({"base": base, "data": NO_DATA, "tuner": tuner})

    def weights(self) -> Path | None:
        """Return the folder of trained weights; None for a plain model, which is its own base.

        A run keeps them in model/; before it has finished, in a detector's best/ or last/, or in its newest
        checkpoint.

        Raises: CheckpointError: for a run that has saved no weights.
        """
        path = self.path
        if not self.is_run:
            return path if (path / "adapter_config.json").is_file() else None
        saved = [path / name for name in ("model", "best", "last") if (path / name).is_dir()]
        if isinstance(self.config().tuner, Frozen):
            # A frozen language model is its own base; a detector trains around its frozen backbone.
            is_detector = [(folder / "config.json").is_file() or is_shared(folder) for folder in saved]
            return next(compress(saved, is_detector), None)
        folder = saved[0] if saved else newest_checkpoint(path)
        if folder is None:
            raise CheckpointError(f"'{path}' holds neither model/ nor a checkpoint: nothing was trained yet.")
        return folder

    def _find_base(self, base: str) -> str:
        """Return the path of a base that was given relative to the directory of the training.

        Such a path is searched for in this directory, then in those above the run's or adapter's folder.
        """
        if Path(base).is_dir() or Path(base).is_absolute():
            return base
        above = (parent / base for parent in self.path.resolve().parents)
        found = next((path for path in above if (path / "config.json").is_file()), None)
        if found is None:
            return base
        logger.info("The base '%s' is relative; found as '%s'.", base, found)
        return str(found)

    def _similar(self) -> str:
        siblings = self.path.parent.glob("*")
        names = [path.name for path in siblings if (path / "config.yaml").is_file()]
        return f" {did_you_mean(self.path.name, names)}" if names else ""


def _flat(config: RunConfig) -> dict[str, Any]:
    """Return a recipe's values by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in config.to_mapping().items():
        nested = isinstance(value, dict)
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if nested else {name: value}
    return flat


def _environment() -> dict[str, Any]:
    """Return machine, versions and command of this process."""
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
