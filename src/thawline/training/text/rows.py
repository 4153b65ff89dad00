"""The rows of a run of text: read, chosen by task, parted, thinned to shots; and how well they went, by task.

Shared by the objectives whose rows are text.
"""

from __future__ import annotations

__all__ = ["Rows", "TaskRows", "judged", "read_rows", "task_batches"]

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from torch import nn

from thawline.data.text.fewshot import few_shot
from thawline.data.text.multitask import TaskSampler
from thawline.data.text.rows import Example, load_examples, read_manifest, split_examples
from thawline.errors import ConfigError, DataError, RoutingError, did_you_mean
from thawline.recipe import TextData
from thawline.training.objective import Evaluation, RowObjective
from thawline.training.text.shares import gathered, own_share

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Examples to learn from and held-out ones."""

    train: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)

    @property
    def format(self) -> str | None:
        """How the rows were read; None where there are none."""
        return next((example.format for example in (*self.train, *self.held_out)), None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order of their first row: those to learn, or, where none are, the held-out ones."""
        return tuple(dict.fromkeys(example.task for example in self.train or self.held_out))

    def choices(self) -> dict[str, tuple[str, ...]]:
        """The choices of every task whose rows share theirs."""
        found: dict[str, set[tuple[str, ...]]] = {}
        for example in (*self.train, *self.held_out):
            found.setdefault(example.task, set()).add(example.choices)
        return {task: next(iter(sets)) for task, sets in found.items() if len(sets) == 1 and () not in sets}


class TaskRows:
    """The half that objectives on rows of text share: rows by task, ids of tasks, evaluation by task.

    Args:
        data: the rows.
        seed: draws what `data` leaves to it.
        read: which rows to keep; predicting needs none, evaluating the held-out ones.

    Raises: as `read_rows`.
    """

    smaller_is_better: tuple[str, ...] = ("loss", "macro_loss")
    train_rows: list[dict[str, Any]]
    held_out_rows: list[dict[str, Any]]
    metrics: tuple[str, ...]
    """What is evaluated beside the loss."""

    def __init__(
        self, data: TextData, *, seed: int = 0, read: Literal["all", "held-out", "none"] = "all"
    ) -> None:
        self.data, self.seed = data, seed
        rows = read_rows(data, seed=seed, read=read)
        self.format = rows.format or data.format
        self.tasks, self.task_choices = rows.tasks, rows.choices()
        self.task_ids: dict[str, int] | None = None
        self.train_examples, self.held_out_examples = rows.train, rows.held_out

    def route(self, tasks: Sequence[str] | None) -> None:
        """Give batches the ids of their rows' tasks, by a routing table's names; None: no ids any more.

        Raises: RoutingError: naming a task of the rows that the table lacks.
        """
        if tasks is None:
            self.task_ids = None
            return
        table = {name: i for i, name in enumerate(tasks)}
        unknown = sorted({row["task"] for row in (*self.train_rows, *self.held_out_rows)} - set(table))
        if unknown:
            raise RoutingError(
                f"No routing for {_brief(unknown)}: the model was trained on {_brief(list(tasks))}. Leave "
                "it out (`data.exclude_tasks`), adapt to it (`tuner.start_from` and `tuner.adapt`), or use "
                "the average of the skills (`--tuner.adapt mu`)."
            )
        self.task_ids = table

    def train_sampler(self, batch_size: int) -> TaskSampler | None:
        """Which row comes when, where tasks are drawn; None: every row once an epoch, by chance."""
        if self.data.sampling == "each":
            return None
        numbers = {task: i for i, task in enumerate(self.tasks)}
        return TaskSampler(
            [numbers[row["task"]] for row in self.train_rows],
            self.data.sampling,
            temperature=self.data.sampling_temperature,
            cap=self.data.task_cap,
            seed=self.seed,
            same_task=batch_size if self.data.batches == "task" else 1,
        )

    def save_pictures(self, folder: Path) -> None:
        """Text has none."""

    def describe(self) -> dict[str, Any]:
        """How a text becomes a prompt; the tasks, and the choices of those whose rows share them."""
        tasks = {task: list(self.task_choices.get(task, ())) for task in self.tasks}
        return {"format": self.format, "template": self.data.template, "tasks": tasks}

    def evaluate(self, model: nn.Module, batch_size: int) -> Evaluation:
        """Loss and metrics on the held-out rows, over all of them and by task.

        Where several processes train, each judges a share of the rows, and all get the same answer.
        """
        model.eval()
        share = own_share(model)
        found = self.judge(model, self.held_out_examples[share], self.held_out_rows[share], batch_size)
        return judged(gathered(found, share), self.metrics)

    def judge(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        rows: Sequence[Mapping[str, Any]],
        batch_size: int,
    ) -> list[dict[str, Any]]:
        """One judged row an example, as `judged` takes them. `rows`: the examples, encoded."""
        raise NotImplementedError


def read_rows(data: TextData, *, seed: int, read: Literal["all", "held-out", "none"] = "all") -> Rows:
    """Read what a recipe's data section asks for.

    Args:
        seed: draws what the section leaves to it.
        read: which rows to keep; predicting needs none, evaluating the held-out ones.

    Raises: DataError: for rows that cannot be read as asked. ConfigError: for a task that is not there.
    """
    if read == "none":
        return Rows()
    examples = _choose(_read(data, data.path), data)
    held_out = None if data.eval_path is None else _choose(_read(data, data.eval_path), data)
    split = split_examples(examples, held_out, fraction=data.eval_fraction, seed=seed)
    kept = _draw(_draw_of_each(split.held_out, data.max_task_eval_rows, seed), data.max_eval_rows, seed)
    if read == "held-out":
        return Rows(held_out=kept)
    train = split.train
    if data.shots is not None:
        shots_seed = seed if data.shots_seed is None else data.shots_seed
        train = few_shot(train, data.shots, per=data.shots_per, seed=shots_seed)
    train = _draw(train, data.max_rows, seed)
    if not train:
        raise DataError(f"'{data.path}' holds no row to train on: every row is marked as held out.")
    return Rows(train=train, held_out=kept)


def task_batches(objective: RowObjective, rows: int, batch_size: int, seed: int) -> dict[str, list[Any]]:
    """Batches of `rows` training rows of every task, fewer where it has fewer, drawn by `seed`.

    All batches of a task have the same size, so that the mean over them is one over rows.
    """
    by_task: dict[str, list[Any]] = {task: [] for task in objective.tasks}
    for row in objective.train_rows:
        by_task[row["task"]].append(row)
    found = {}
    for task, own in by_task.items():
        drawn = random.Random(f"{seed} {task}").sample(own, min(rows, len(own)))
        size = min(batch_size, len(drawn))
        starts = range(0, len(drawn) - size + 1, size)
        found[task] = [objective.collate(drawn[start : start + size]) for start in starts]
    return found


def judged(rows: list[dict[str, Any]], metrics: Sequence[str]) -> Evaluation:
    """The evaluation that judged rows make: over all, and by task. With several tasks also the mean over
    them, `macro_…`.

    Args:
        rows: each with `task`, `log_likelihood`, `n_tokens` and those of `metrics` that apply to it.
        metrics: names to average beside the loss, a mean over tokens.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    parts = {task: {"rows": len(found), **_average(found, metrics)} for task, found in sorted(tasks.items())}
    overall = _average(rows, metrics)
    if len(parts) > 1:
        for name in list(overall):
            of_tasks = [part[name] for part in parts.values() if name in part]
            overall[f"macro_{name}"] = sum(of_tasks) / len(of_tasks)
    return Evaluation(metrics=overall, parts=parts, rows=rows)


def _average(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, float]:
    averages = {
        "loss": -sum(row["log_likelihood"] for row in rows) / max(sum(r["n_tokens"] for r in rows), 1)
    }
    for name in metrics:
        values = [row[name] for row in rows if name in row]
        if values:
            averages[name] = sum(values) / len(values)
    return averages


def _read(data: TextData, path: str | list[str]) -> list[Example]:
    return load_examples(path, format=data.format, template=data.template, columns=data.columns)


def _choose(examples: list[Example], data: TextData) -> list[Example]:
    """The examples of the tasks asked for."""
    known = list(dict.fromkeys(example.task for example in examples))
    wanted = set(known if data.tasks is None else _matching("data.tasks", data.tasks, known))
    wanted -= set(_matching("data.exclude_tasks", data.exclude_tasks, known))
    if data.task_types is not None:
        paths = [data.path] if isinstance(data.path, str) else data.path
        types = {entry["task"]: entry.get("type") for root in paths for entry in read_manifest(root)}
        there = {str(kind) for kind in types.values() if kind}
        for kind in data.task_types:
            if kind not in there:
                raise ConfigError(
                    f"No task of type '{kind}' in `data.task_types`. {did_you_mean(kind, there)}"
                )
        wanted = {task for task in wanted if types.get(task) in data.task_types}
    chosen = [example for example in examples if example.task in wanted]
    if not chosen:
        raise ConfigError(
            f"Nothing is left of the tasks {_brief(known)}: see `data.tasks` and its neighbours."
        )
    return chosen


def _matching(field_name: str, patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        matching = [name for name in known if fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(f"No task '{pattern}' in `{field_name}`. {did_you_mean(pattern, known)}")
        found += matching
    return found


def _draw(examples: list[Example], n: int | None, seed: int) -> list[Example]:
    if n is None or n >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), n))]


def _draw_of_each(examples: list[Example], n: int | None, seed: int) -> list[Example]:
    if n is None:
        return examples
    tasks: dict[str, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    return [example for of_task in tasks.values() for example in _draw(of_task, n, seed)]


def _brief(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:4])
    return (
        f"task {shown}" if len(names) == 1 else f"tasks {shown}" + (f", … ({len(names)})" * (len(names) > 4))
    )
