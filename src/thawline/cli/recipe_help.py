"""Help on the fields of a recipe, for every objective and tuner: their attribute docstrings, grouped."""

from __future__ import annotations

__all__ = ["recipe_help"]

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Literal, get_origin

from thawline.recipe import LEADING_FIELD, OBJECTIVES, TUNERS, RunConfig, section_types
from thawline.recipe.values import describe_type, field_types

WIDTH, INDENT = 100, 34


def recipe_help() -> str:
    """Return the fields of every section, grouped by the objectives or tuners that have them."""
    short = ", ".join(f"--{section} for --{section}.{field}" for section, field in LEADING_FIELD.items())
    lines = textwrap.wrap(f"Fields of the recipe, which win over those of --config. Short: {short}.", WIDTH)
    run = [name for name in field_types(RunConfig) if name not in (*LEADING_FIELD, "training")]
    lines += ["", "run:", *(line for name in run for line in _field_lines(name, RunConfig, RunConfig, name))]
    for section in ("objective", "base", "data", "training"):
        lines += _section(section, {name: section_types(name, "none")[section] for name in OBJECTIVES})
    return "\n" + "\n".join(lines + _section("tuner", TUNERS)) + "\n"


def _section(section: str, choices: Mapping[str, type]) -> list[str]:
    """Return the fields of a section's dataclasses, those that several choices share in a group of theirs."""
    users: dict[tuple[type, str], list[str]] = {}
    for choice, kind in choices.items():
        for name in field_types(kind):
            owner = next(base for base in kind.__mro__ if name in vars(base).get("__annotations__", ()))
            users.setdefault((owner, name), []).append(choice)
    groups: dict[str, list[str]] = {}
    for (owner, name), names in users.items():
        title = f"{section} ({', '.join(names) if len(names) < 9 else 'other methods of PEFT'})"
        groups.setdefault(title, []).extend(_field_lines(f"{section}.{name}", choices[names[0]], owner, name))
    return [line for title, lines in groups.items() for line in ("", f"{title}:", *lines)]


@cache
def _docs(section: type) -> dict[str, str]:
    """Name → attribute docstring of the fields that a dataclass declares itself, from its source."""
    tree = ast.parse(inspect.getsource(sys.modules[section.__module__]))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == section.__name__)
    return {
        field.target.id: " ".join(str(doc.value.value).split())
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def _field_lines(option: str, kind: type, owner: type, name: str) -> list[str]:
    """Return one option as argparse shows its own: the help beside it, or below where the name is long."""
    wanted = field_types(kind)[name]
    default = next(field.default for field in dataclasses.fields(kind) if field.name == name)
    values = ("one of " if get_origin(wanted) is Literal else "") + describe_type(wanted)
    if default not in (None, "", dataclasses.MISSING):
        values += f"; default {default!r}"
    wrapped = textwrap.wrap(f"{_docs(owner)[name]} ({values})", WIDTH - INDENT)
    head = f"  --{option}"
    first = [f"{head:{INDENT}}{wrapped.pop(0)}"] if len(head) < INDENT - 1 else [head]
    return first + [" " * INDENT + line for line in wrapped]
