"""Classes given by their users: names, numbers, or texts of several."""

from __future__ import annotations

__all__ = ["class_ids"]

from collections.abc import Iterable, Sequence

from thawline.errors import ConfigError, did_you_mean


def class_ids(classes: Iterable[str | int] | str | int, class_names: Sequence[str]) -> list[int]:
    """Return the numbers of classes.

    A text is the name of a class if there is one of that name, else a number, else several of both,
    comma-separated; of names that hold commas the longest fits, and quotation marks around one are dropped.

    Args:
        classes: names, numbers or texts.        class_names: names of class 0, 1, ….
    Raises: ConfigError: unknown class, or none at all.
    """
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        classes = [classes]
    found = [label for item in classes for label in _of_item(item, class_names)]
    if not found:
        raise ConfigError("`classes` names no class. Leave it out to keep all.")
    return found


def _of_item(item: str | int, class_names: Sequence[str]) -> list[int]:
    if not isinstance(item, str):
        return [_of_number(int(item), class_names)]
    pieces, found = item.split(","), []
    while pieces:
        # Of the names that begin here the one with the most commas.
        for n in range(len(pieces), 0, -1):
            label = _of_name(",".join(pieces[:n]).strip(), class_names)
            if label is not None:
                break
        else:
            name = pieces[0].strip()
            raise ConfigError(f"Unknown class '{name}'. {did_you_mean(name, class_names)}")
        found += label
        pieces = pieces[n:]
    return found


def _of_name(text: str, class_names: Sequence[str]) -> list[int] | None:
    """Return the class of a name or number, none for an empty text, or None if there is no such class."""
    for name in (text, text.strip("\"'")):
        if name in class_names:
            return [class_names.index(name)]
    if text.isdecimal():
        return [_of_number(int(text), class_names)]
    return None if text else []


def _of_number(number: int, class_names: Sequence[str]) -> int:
    if not 0 <= number < len(class_names):
        raise ConfigError(f"Class {number}: the model has classes 0 to {len(class_names) - 1}.")
    return number
