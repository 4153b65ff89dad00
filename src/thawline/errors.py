"""Errors that thawline raises on purpose.

    ThawlineError
    ├── ConfigError         (ValueError)    a setting that cannot work
    ├── RoutingError        (ValueError)    task ids that are missing or unknown to the model
    ├── CheckpointError     (ValueError)    files that do not fit the model, or would be overwritten
    ├── DataError           (ValueError)    a dataset that cannot be read
    ├── BudgetError         (ValueError)    an exported file that differs too much from its model
    └── MissingExtraError   (ImportError)   an optional dependency that is not installed

Each also is the built-in error a caller would expect, so `except ValueError` keeps working.
A message says what was expected, what was given, and what to do. The command line prints it in one line.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MissingExtraError",
    "RoutingError",
    "ThawlineError",
    "all_of",
    "did_you_mean",
    "requires_extra",
]

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

LONGEST_LIST = 60
"""Maximum number of names in an error message; of more, only the nearest are listed."""
SHOWN = 10
"""Maximum number of errors that one message lists."""


class ThawlineError(Exception):
    """Base class of every error raised on purpose."""


class ConfigError(ThawlineError, ValueError):
    """A setting that cannot work, alone or with the model it meets."""


class RoutingError(ThawlineError, ValueError):
    """Task ids that are missing, misshapen, or unknown to the routing table."""


class CheckpointError(ThawlineError, ValueError):
    """Files that do not fit the model they are loaded into, or a run folder that would be overwritten."""


class DataError(ThawlineError, ValueError):
    """A dataset that is missing, corrupt, or not of the format it was read as."""


class BudgetError(ThawlineError, ValueError):
    """An exported file whose detections differ from the model's by more than the budget; none was kept."""


class MissingExtraError(ThawlineError, ImportError):
    """An optional dependency that is not installed.

    Args:
        what: the feature that needs it, as the start of a sentence ("Detection").
        package: the package as its users call it ("OpenCV").
        extra: thawline's extra that installs it ("detect").
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: `pip install 'thawline[{extra}]'`.")


@contextmanager
def requires_extra(what: str, package: str, extra: str) -> Iterator[None]:
    """Turn an ImportError inside the `with` block into a `MissingExtraError` of the same arguments."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(what, package, extra) from error


def all_of(errors: Sequence[DataError], what: str) -> DataError:
    """Return one error that lists several, at most ten, under a line of their number and `what` they are."""
    if len(errors) == 1:
        return errors[0]
    shown = [str(error) for error in errors[:SHOWN]]
    more = [f"… and {len(errors) - SHOWN:,} more"] if len(errors) > SHOWN else []
    return DataError("\n".join([f"{len(errors):,} {what}:", *shown, *more]))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an "unknown name" message: the known names (the nearest of many) and a suggestion.

    Returns: e.g. "Available: atto, femto. Did you mean 'atto'?"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    shown = names
    if len(names) > LONGEST_LIST:
        shown = get_close_matches(name, names, n=8, cutoff=0.0)
    text = f"Available: {', '.join(shown)}" + (f", … ({len(names)})." if len(shown) < len(names) else ".")
    return f"{text} Did you mean '{close[0]}'?" if close else text
