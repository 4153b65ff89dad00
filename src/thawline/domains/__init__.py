"""Domains: what one task adds to a frozen detector that several tasks share.

shared/
  base/             the detector that all domains share
  domains/<name>/   what each of them adds

The model/ of a run on several datasets is such a folder, and the run goes by it.
"""

from __future__ import annotations

__all__ = ["BASE", "DOMAINS", "check_base_options", "is_shared", "shared_path"]

from pathlib import Path

from thawline.errors import ConfigError

BASE, DOMAINS = "base", "domains"
"""Folders of a shared folder."""


def is_shared(path: str | Path) -> bool:
    """Return True for a folder of a base and domains, or a run on several datasets."""
    return shared_path(path) is not None


def shared_path(path: str | Path) -> Path | None:
    """Return the folder of a base and domains that `path` refers to; None: there is none.

    Of a run on several datasets that is its model/, or before its end the best or last one so far.
    """
    places = (Path(path), *(Path(path) / part for part in ("model", "best", "last")))
    return next((place for place in places if (place / BASE / "config.json").is_file()), None)


def check_base_options(path: str | Path, variant: str | None, weights: str) -> None:
    """Refuse options of a plain detector for a shared folder. Raises: ConfigError: one is given."""
    if variant is not None or weights != "pretrained":
        name = "weights" if variant is None else "variant"
        raise ConfigError(f"`{name}`: the base of '{path}' is trained, and has its size. Leave it out.")
