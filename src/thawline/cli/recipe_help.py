"""Help on the fields of a recipe, for every objective and tuner: their attribute docstrings, grouped."""

from __future__ import annotations

__all__ = ["recipe_help"]

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, get_origin

from thawline.recipe import LEADING_FIELD, OBJECTIVES, TUNERS, RunConfig, section_types
from thawline.recipe.values import describe_type, field_types

WIDTH, INDENT = 100, 34


def recipe_help() -> str:
    """Return the fields of every section, grouped by the objectives or tuners that have them."""
    short = ", ".join(f"--{section} for --{section}.{field}" for section, field in LEADING_FIELD.items())
    lines = textwrap.wrap(f"Fields of the recipe, which win over those of --config. Short: {short}.", WIDTH)
    for title, prefix, section in _groups():
        lines += ["", f"{title}:"]
        for name, doc in _field_docs(section):
            lines += _field_lines(f"--{prefix}{name}", doc, *_type_and_default(section, name))
    return "\n" + "\n".join(lines) + "\n"


def _groups() -> Iterator[tuple[str, str, type]]:
    """Title, prefix of the options, and dataclass whose own fields are shown."""
    yield "run", "", RunConfig
    for section in ("objective", "base", "data", "training"):
        users: dict[type, list[str]] = {}
        for objective in OBJECTIVES:
            users.setdefault(section_types(objective, "none")[section], []).append(objective)
        for kind, objectives in users.items():
            yield f"{section} ({', '.join(objectives)})", f"{section}.", kind
    # A base that tuners share is shown once.
    bases = dict.fromkeys(base for kind in TUNERS.values() for base in reversed(kind.__mro__[:-1]))
    for base in bases:
        methods = [method for method, kind in TUNERS.items() if issubclass(kind, base)]
        named = ", ".join(methods) if len(methods) < 9 else "PEFT's other methods"
        yield f"tuner: {named}", "tuner.", base


def _field_docs(section: type) -> list[tuple[str, str]]:
    """Name and attribute docstring of the fields a dataclass declares itself, from its source."""
    tree = ast.parse(inspect.getsource(sys.modules[section.__module__]))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == section.__name__)
    return [
        (field.target.id, inspect.cleandoc(str(doc.value.value)).replace("\n", " "))
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    ]


def _type_and_default(section: type, name: str) -> tuple[Any, Any]:
    default = next(field.default for field in dataclasses.fields(section) if field.name == name)
    return field_types(section)[name], None if default is dataclasses.MISSING else default


def _field_lines(option: str, doc: str, wanted: Any, default: Any) -> list[str]:
    """One option as argparse shows its own: the help starts beside it, or below where the name is long."""
    kind = ("one of " if get_origin(wanted) is Literal else "") + describe_type(wanted)
    if default not in (None, ""):
        kind += f"; default {default!r}"
    wrapped = textwrap.wrap(f"{doc} ({kind})", WIDTH - INDENT)
    head = f"  {option}"
    first = [f"{head:{INDENT}}{wrapped.pop(0)}"] if len(head) < INDENT - 1 else [head]
    return first + [" " * INDENT + line for line in wrapped]
