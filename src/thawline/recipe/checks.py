"""What the values of a recipe are held to, in one wording."""

from __future__ import annotations

__all__ = [
    "all_at_least",
    "at_least",
    "fraction",
    "one_of",
    "require",
]

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from thawline.errors import ConfigError


def require(value: object, message: str) -> None:
    """`message` unless there is a value. Raises: ConfigError."""
    if not value:
        raise ConfigError(message)


def at_least(name: str, value: float, least: float) -> None:
    """A number of at least `least`; True is none. Raises: ConfigError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
        raise ConfigError(f"`{name}` must be a number of at least {least}, got {value!r}.")


def all_at_least(section: Any, prefix: str, least: float, *names: str) -> None:
    """Check that fields of a section are numbers of at least `least`. Raises: ConfigError.

    None and text ("epoch", "end") are accepted by fields with such a default.
    """
    for field in fields(section):
        if field.name in names:
            value = getattr(section, field.name)
            if not (isinstance(value, (str, type(None))) and isinstance(value, type(field.default))):
                at_least(f"{prefix}.{field.name}", value, least)


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """One of two or more choices. Raises: ConfigError."""
    if value not in choices:
        raise ConfigError(f"`{name}` must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}.")


def fraction(name: str, value: float) -> None:
    """A number from 0 to below 1. Raises: ConfigError."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"`{name}` must be in [0, 1), got {value!r}.")
