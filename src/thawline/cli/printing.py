"""What commands print: results on stdout, as tables, YAML or JSON."""

from __future__ import annotations

__all__ = ["choice_lines", "first_line", "say", "say_evaluation", "to_json", "to_yaml"]

import json
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from thawline.recipe import RunConfig
from thawline.tables import aligned


def say(text: str) -> int:
    """Write to stdout at once; returns the exit status of a command that has nothing more to say."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()
    return 0


def say_evaluation(
    metrics: Mapping[str, float],
    parts: Mapping[str, Mapping[str, float]],
    start: Mapping[str, Any] | None = None,
) -> int:
    """A table of one line a part, with the mean over parts and over everything below it.

    Args:
        start: `metrics` and `parts` before the first step; the last columns.
    """
    if not metrics:
        return say("No held-out rows: nothing was evaluated.")
    part_name, whole = ("class", "classes") if "AP" in metrics else ("task", "tasks")
    # A class of objects may lack a metric that others have: small ones, say.
    names = [name for name in metrics if not parts or any(name in part for part in parts.values())]
    before: Mapping[str, Mapping[str, float]] = (start or {}).get("parts", {})
    columns = [(name, parts, metrics) for name in names]
    columns += [(name, before, start["metrics"]) for name in names if start]
    rows = [
        [name, str(part.get("rows", "")), *(_cell(found.get(name, {}), key) for key, found, _ in columns)]
        for name, part in parts.items()
    ]
    if len(parts) > 1:
        found = [[part[key] for part in of.values() if key in part] for key, of, _ in columns]
        means = [_round(sum(values) / len(values)) if values else "" for values in found]
        rows.append([f"mean over {whole}", "", *means])
        total = sum(int(part.get("rows", 0)) for part in parts.values())
        rows.append(["all rows", str(total), *(_cell(over_all, key) for key, _, over_all in columns)])
    header = [part_name, "rows", *names, *(f"{name} at start" for name in names if start)]
    return say(aligned([header, *rows]))


def _cell(values: Mapping[str, float], key: str) -> str:
    return _round(values[key]) if key in values else ""


def _round(value: float) -> str:
    return f"{value:.4f}"


def choice_lines(table: Mapping[str, str]) -> list[str]:
    """One line a choice; choices that share their text (PEFT's many methods) stand together above it."""
    names_of: dict[str, list[str]] = {}
    for name, text in table.items():
        names_of.setdefault(text, []).append(name)
    width = max(len(names[0]) for names in names_of.values())
    lines = []
    for text, names in names_of.items():
        if len(names) > 2:
            block = textwrap.fill(", ".join(names), 100, initial_indent="  ", subsequent_indent="  ")
            lines += [*block.splitlines(), f"  {'':{width}}  {text}"]
        else:
            lines += [f"  {name:{width}}  {text}" for name in names]
    return lines


def first_line(function: Callable[..., Any]) -> str:
    """The first line of a function's docstring, which is its help."""
    return (function.__doc__ or "").splitlines()[0]


def to_yaml(config: RunConfig) -> str:
    """A recipe as YAML that `--config` reads back."""
    return yaml.safe_dump(config.to_mapping(), sort_keys=False, allow_unicode=True)


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON for people and programs; what JSON has no form for, as text."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)
