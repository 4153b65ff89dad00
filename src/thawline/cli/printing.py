"""Results on stdout: tables, YAML and JSON."""

from __future__ import annotations

__all__ = ["choice_lines", "evaluation_table", "recipe_yaml", "show", "show_json", "show_yaml"]

import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from thawline.files import to_json
from thawline.recipe import RunConfig
from thawline.tables import aligned, evaluation_rows


def show(text: str) -> int:
    """Write to stdout and flush; returns 0, the exit status of a command that ends with it."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()
    return 0


def show_json(value: Any) -> int:
    """Write JSON to stdout; what JSON does not know is written as text."""
    return show(to_json(value, indent=2))


def show_yaml(config: RunConfig) -> int:
    """Write a recipe as YAML that `--config` reads back."""
    return show(recipe_yaml(config))


def recipe_yaml(config: RunConfig) -> str:
    """Return a recipe as YAML that `--config` reads back."""
    text: str = yaml.safe_dump(config.to_mapping(), sort_keys=False, allow_unicode=True)
    return text


def evaluation_table(
    metrics: Mapping[str, float],
    parts: Mapping[str, Mapping[str, float]],
    start: Mapping[str, Any] | None = None,
) -> str:
    """Return the table of an evaluation (`evaluation_rows`) as text."""
    if not metrics:
        return "Nothing was evaluated: no held-out rows, or no box in held-out images."
    return aligned([[_cell(value) for value in row] for row in evaluation_rows(metrics, parts, start)])


def domain_table(domains: Mapping[str, Any]) -> str:
    """Return the table of a shared folder's domains; one that cannot be read says why.

    Args:
        domains: by name: a `Domain`, or why it cannot be read.
    """
    rows = [["domain", "classes", "tuner", "kB", "threshold", "AP when trained"]]
    for name, one in domains.items():
        if isinstance(one, str):
            rows.append([name, one])
        else:
            size, score = f"{4 * one.parameters / 1000:,.0f}", _cell(one.metrics.get("AP"))
            rows.append([name, str(len(one.class_names)), one.tuner, size, f"{one.threshold:g}", score])
    return aligned(rows)


def domain_scores(found: Mapping[str, Any]) -> str:
    """Return the table of an evaluation of domains: metrics by name, or why a domain has none."""
    names = ("AP", "AP50", "AP75", "AR100")
    rows = [["domain", "images", *names]]
    for name, one in found.items():
        is_broken = isinstance(one, str)
        values = [one] if is_broken else [str(len(one.rows)), *(_cell(one.metrics.get(key)) for key in names)]
        rows.append([name, *values])
    return aligned(rows)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def choice_lines(table: Mapping[str, str]) -> list[str]:
    """Return one line per choice; more than two choices with the same text stand together above it."""
    names_of: dict[str, list[str]] = {}
    for name, text in table.items():
        names_of.setdefault(text, []).append(name)
    width = max(len(names[0]) for names in names_of.values())
    lines = []
    for text, names in names_of.items():
        if len(names) > 2:
            lines += textwrap.wrap(", ".join(names), 100, initial_indent="  ", subsequent_indent="  ")
            names = [""]
        lines += [f"  {name:{width}}  {text}" for name in names]
    return lines
