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
from thawline.tables import aligned, evaluation_rows


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
    """The table of an evaluation (`evaluation_rows`)."""
    if not metrics:
        return say("No held-out rows: nothing was evaluated.")
    return say(aligned([[_cell(value) for value in row] for row in evaluation_rows(metrics, parts, start)]))


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


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
