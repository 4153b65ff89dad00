"""Checks of a recipe's values, with one wording for all sections."""

from __future__ import annotations

__all__ = [
    "all_at_least", "at_least", "check_args", "check_patience", "dataset_names", "domain_name", "fraction",
    "height_width", "one_of", "require",
]  # fmt: skip

from collections.abc import Container, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from thawline.errors import ConfigError, did_you_mean


def require(value: object, message: str) -> None:
    """Raise ConfigError with `message` if there is no value."""
    if not value:
        raise ConfigError(message)


def at_least(name: str, value: float, least: float) -> None:
    """Check that a value is a number, not a bool, of at least `least`. Raises: ConfigError."""
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


def height_width(name: str, size: Any, multiple: int = 1) -> tuple[int, int]:
    """Return an image size as (height, width).

    Args:
        size: side of a square, or height and width, pixels.
        multiple: largest stride of the network.
    Raises: ConfigError: it is neither, or no multiple; the nearest sizes that are.
    """
    sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ConfigError(f"`{name}={size!r}`: expected a side, or [height, width], in whole pixels.")
    if any(side % multiple for side in sides):
        fits = [[max(1, side // multiple) * multiple for side in sides]]
        fits.append([-(-side // multiple) * multiple for side in sides])
        low, high = (fit if isinstance(size, (list, tuple)) else fit[0] for fit in fits)
        nearest = f"{low} or {high}" if low != high else f"{low}"
        raise ConfigError(
            f"`{name}={size!r}`: sides must be multiples of {multiple}, the coarsest stride. "
            f"Nearest: {nearest}."
        )
    return sides[0], sides[1]


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a value is one of two or more choices. Raises: ConfigError."""
    if value not in choices:
        raise ConfigError(f"`{name}` must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}.")


def fraction(name: str, value: float, *, may_be_one: bool = False) -> None:
    """Check that a value is a number from 0 to below 1, or to 1. Raises: ConfigError."""
    if not isinstance(value, (int, float)) or not (0 <= value < 1 or (may_be_one and value == 1)):
        raise ConfigError(f"`{name}` must be in [0, 1{']' if may_be_one else ')'}, got {value!r}.")


def domain_name(name: str) -> str:
    """Return a name that can be a folder's and a domain's. Raises: ConfigError: it cannot."""
    if not name or Path(name).name != name or name.startswith(".") or name == "all":
        raise ConfigError(f"A domain's name must be a plain folder name other than 'all', got {name!r}.")
    return name


def dataset_names(paths: Sequence[str]) -> dict[str, str]:
    """Return the paths of several datasets by name: that of the folder, which may be given by a file in it.

    COCO's files lie in a folder "annotations" of the dataset's folder.

    Raises: ConfigError: two of one name, or a name that no domain can have.
    """
    found: dict[str, str] = {}
    for path in paths:
        place = Path(path).absolute()
        folder = place.parent if place.suffix.lower() in (".json", ".yaml", ".yml") else place
        name = (folder.parent if folder.name == "annotations" else folder).name
        if name in found:
            raise ConfigError(
                f"`data.path`: '{found[name]}' and '{path}' are both called '{name}', and domains are named "
                "after them. Rename one of the folders."
            )
        try:
            found[domain_name(name)] = path
        except ConfigError as error:
            raise ConfigError(f"`data.path`: '{path}' is named after its folder. {error}") from error
    return found


def check_patience(training: Any) -> None:
    """Check that a run that may end early is evaluated, and knows by what. Raises: ConfigError."""
    if training.patience is not None and (training.best_metric is None or training.eval_every == "end"):
        raise ConfigError(
            "`training.patience` counts evaluations without an improvement of `training.best_metric`: give "
            "that, and `training.eval_every` steps or 'epoch'."
        )


def check_args(section: str, args: Iterable[str], config_class: type, taken: Container[str]) -> None:
    """Check a section's `args`, which are passed to another library's dataclass.

    Raises: ConfigError: for a field that the dataclass lacks, or that the section sets by itself (`taken`).
    """
    known = [field.name for field in fields(config_class)]
    for name in args:
        if name not in known:
            raise ConfigError(
                f"Unknown key '{section}.args.{name}' of {config_class.__name__}. {did_you_mean(name, known)}"
            )
        if name in taken:
            raise ConfigError(f"'{section}.args.{name}' has a field of its own in `{section}`; set it there.")
