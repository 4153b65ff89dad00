"""Load a text run's rows (task filter, split, few-shot) and score them by task."""

from __future__ import annotations

__all__ = ["evaluation_by_task", "group", "name_some", "read_rows"]

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

from thawline.data.text.fewshot import few_shot
from thawline.data.text.rows import TEMPLATES, Example, Split, load_examples, read_manifest, split_examples
from thawline.errors import ConfigError, DataError, did_you_mean
from thawline.recipe import TextData
from thawline.training.evaluation import Evaluation
from thawline.training.objective import ReadRows

Row = TypeVar("Row")


def read_rows(data: TextData, *, seed: int, read: ReadRows = "all") -> Split:
    """Read the rows that a recipe's data section asks for.

    Args:
        seed: seed of every draw that has none of its own in the section.
        read: rows to keep.

    Raises: DataError: for rows that cannot be read as asked. ConfigError: for a task that does not exist.
    """
    if read in ("none", "config"):
        return Split([], [])
    examples = _choose_tasks(_read(data, data.path), data)
    held_out = None if data.eval_path is None else _choose_tasks(_read(data, data.eval_path), data)
    train, held_out = split_examples(examples, held_out, fraction=data.eval_fraction, seed=seed)
    if data.max_task_eval_rows is not None:
        tasks = group(held_out, attrgetter("task")).values()
        held_out = [one for rows in tasks for one in _draw(rows, data.max_task_eval_rows, seed)]
    held_out = _draw(held_out, data.max_eval_rows, seed)
    if read == "held-out":
        return Split([], held_out)
    if data.shots is not None:
        shots_seed = seed if data.shots_seed is None else data.shots_seed
        train = few_shot(train, data.shots, per=data.shots_per, seed=shots_seed)
    train = _draw(train, data.max_rows, seed)
    if not train:
        raise DataError(f"'{data.path}' holds no row to train on: every row is marked as held out.")
    _check_read(data, [*train, *held_out])
    return Split(train, held_out)


def evaluation_by_task(rows: list[dict[str, Any]], metrics: Sequence[str]) -> Evaluation:
    """Average judged rows: over all, and by task. With several tasks also the mean over tasks, `macro_…`.

    Args:
        rows: each with `task`, `log_likelihood`, `n_tokens` and those of `metrics` that apply to it.
        metrics: names to average in addition to the loss, a mean over tokens.
    """
    tasks = sorted(group(rows, itemgetter("task")).items())
    parts = {task: {"rows": len(found), **_average(found, metrics)} for task, found in tasks}
    overall = _average(rows, metrics)
    if len(parts) > 1:
        for name in list(overall):
            values = [part[name] for part in parts.values() if name in part]
            overall[f"macro_{name}"] = sum(values) / len(values)
    return Evaluation(metrics=overall, parts=parts, rows=rows)


def group(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Group rows by a key, keys in the order of their first row."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def name_some(tasks: Sequence[str]) -> str:
    """Name up to four tasks for a message."""
    shown = ", ".join(f"'{name}'" for name in tasks[:4])
    more = f", … ({len(tasks)})" if len(tasks) > 4 else ""
    return f"task {shown}" if len(tasks) == 1 else f"tasks {shown}{more}"


def _average(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, float]:
    n_tokens = sum(row["n_tokens"] for row in rows)
    averages = {"loss": -sum(row["log_likelihood"] for row in rows) / max(n_tokens, 1)}
    for name in metrics:
        values = [row[name] for row in rows if name in row]
        if values:
            averages[name] = sum(values) / len(values)
    return averages


def _read(data: TextData, path: str | list[str]) -> list[Example]:
    return load_examples(path, format=data.format, template=data.template, columns=data.columns)


def _check_read(data: TextData, examples: Sequence[Example]) -> None:
    """Check that some row reads the settings of prompts. Raises: ConfigError: naming one that none reads."""
    kinds = {
        "template": ("rows with a prompt", lambda row: row.format in TEMPLATES),
        "chat_template": ("chats", lambda row: row.messages),
        "chat_options": ("chats", lambda row: row.messages),
    }
    for name, (kind, reads) in kinds.items():
        if getattr(data, name) and not any(map(reads, examples)):
            raise ConfigError(
                f"`data.{name}` is for {kind}, and the rows are of format '{examples[0].format}'. "
                "Leave it out."
            )


def _choose_tasks(examples: list[Example], data: TextData) -> list[Example]:
    known = list(dict.fromkeys(example.task for example in examples))
    wanted = set(known if data.tasks is None else _matching("data.tasks", data.tasks, known))
    wanted -= set(_matching("data.exclude_tasks", data.exclude_tasks, known))
    if data.task_types is not None:
        paths = [data.path] if isinstance(data.path, str) else data.path
        types = {entry["task"]: entry.get("type") for root in paths for entry in read_manifest(root)}
        known_types = {str(kind) for kind in types.values() if kind}
        for kind in data.task_types:
            if kind not in known_types:
                raise ConfigError(
                    f"No task of type '{kind}' in `data.task_types`. {did_you_mean(kind, known_types)}"
                )
        wanted = {task for task in wanted if types.get(task) in data.task_types}
    chosen = [example for example in examples if example.task in wanted]
    if not chosen:
        raise ConfigError(
            f"None of the {name_some(known)} is left. Check `data.tasks`, `data.exclude_tasks` and "
            "`data.task_types`."
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
