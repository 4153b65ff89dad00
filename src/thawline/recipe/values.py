"""Values of a recipe: read from YAML, and converted to the type that a field declares.

YAML files, command line and Python calls pass through `convert`, so all three accept and refuse the same.
"""

from __future__ import annotations

__all__ = ["convert", "describe_type", "field_types", "read_yaml"]

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from thawline.errors import ConfigError

UNIONS = (UnionType, Union)
"""`int | None`, and what it becomes beside a `Literal`."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number; YAML 1.1, and so PyYAML, takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_yaml(text: str | bytes) -> Any:
    """Parse YAML, as text or in the bytes of a file. Raises: yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


@cache
def field_types(section: type) -> dict[str, Any]:
    """Name → type annotation of a dataclass's fields."""
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def convert(key: str, value: Any, wanted: Any) -> Any:
    """Return `value` as the type `wanted`.

    Text is read as YAML where the field takes no text: "8" for an int, "[a, b]" for a list, "null" for None.
    A function stands for its import path.

    Args:
        key: dotted name of the field, for the message.
        wanted: type annotation of the field.
    Raises: ConfigError: if the value does not fit.
    """
    if callable(value) and not isinstance(value, type):
        value = _import_path(key, value)
    try:
        return _convert(value, wanted)
    except (ValueError, yaml.YAMLError):
        raise ConfigError(f"'{key}' takes {describe_type(wanted)}, got {value!r}.") from None


def describe_type(wanted: Any) -> str:
    """Name a type annotation: "int or 'epoch', 'end'"."""
    if get_origin(wanted) in UNIONS:
        return " or ".join(describe_type(member) for member in get_args(wanted))
    if get_origin(wanted) is Literal:
        return ", ".join(map(repr, get_args(wanted)))
    if get_origin(wanted) is None and isinstance(wanted, type):
        return "None" if wanted is NoneType else wanted.__name__
    return str(wanted).replace("typing.", "")


def _convert(value: Any, wanted: Any) -> Any:
    kind, arguments = get_origin(wanted) or wanted, get_args(wanted)
    if kind in UNIONS:
        # Text comes last: it would take "null" and "[a, b]" for itself.
        for member in sorted(arguments, key=lambda member: member is str):
            try:
                return _convert(value, member)
            except (ValueError, yaml.YAMLError):
                continue
    elif kind is Any or (kind is Literal and value in arguments):
        return value
    elif kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    elif isinstance(value, str) and kind is not Literal:
        return _convert(_read_text(value), wanted)
    elif kind is list and isinstance(value, (list, tuple)):
        return [_convert(item, *arguments) for item in value]
    elif kind is dict and isinstance(value, Mapping):
        return {str(key): _convert(item, arguments[1]) for key, item in value.items()}
    elif kind is float and type(value) is int:
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(value)


def _import_path(key: str, value: Any) -> str:
    """Return "module:name" of a function. Raises: ConfigError: if another process could not import it."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    found: Any = sys.modules.get(module or "")
    for part in (name or "").split("."):
        found = getattr(found, part, None)
    if found is not value or module == "__main__":
        raise ConfigError(
            f"'{key}': {value!r} has no import path, by which a recipe names it. Put it into a module, and "
            'give "module:name".'
        )
    return f"{module}:{name}"


def _read_text(text: str) -> Any:
    """YAML text as a value that is not text. Raises: ValueError: if it stays text."""
    value = read_yaml(text)
    if isinstance(value, str) or (value is None and text.lower() not in ("null", "~")):
        raise ValueError(text)
    return value
