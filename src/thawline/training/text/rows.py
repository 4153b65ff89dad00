"""The rows of a run of text: read, chosen by task, parted, thinned to shots; and how well they went, by task.

Shared by the objectives whose rows are text.
"""

from __future__ import annotations

__all__ = ["Rows", "brief", "judged", "read_rows"]

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from thawline.data.text.fewshot import few_shot
from thawline.data.text.rows import Example, load_examples, read_manifest, split_examples
from thawline.errors import ConfigError, DataError, did_you_mean
from thawline.recipe import TextData
from thawline.training.evaluation import Evaluation

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
            f"Nothing is left of the tasks {brief(known)}: see `data.tasks` and its neighbours."
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


def brief(names: Sequence[str]) -> str:
    """Name a few tasks, for a message."""
    shown = ", ".join(f"'{name}'" for name in names[:4])
    return (
        f"task {shown}" if len(names) == 1 else f"tasks {shown}" + (f", … ({len(names)})" * (len(names) > 4))
    )
