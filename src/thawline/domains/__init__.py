"""Domains: what one task adds to a frozen detector that several tasks share.

shared/
  base/             the detector that all domains share
  domains/<name>/   what each of them adds
"""

from __future__ import annotations

__all__ = ["BASE", "DOMAINS", "is_shared"]

from pathlib import Path

BASE, DOMAINS = "base", "domains"
"""Folders of a shared folder."""


def is_shared(path: str | Path) -> bool:
    """Return True for a folder of a base and domains."""
    return (Path(path) / BASE / "config.json").is_file()
