"""Splits by the names of files and folders: what is called valid, val2017 or instances_val is `val`."""

from __future__ import annotations

__all__ = ["SPLITS", "ordered", "split_of", "split_of_folder"]

import re
from collections.abc import Iterable

SPLITS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Name of a split → words for it in names of files and folders."""


def split_of(name: str) -> str | None:
    """Return the split named in a file's or folder's name: "instances_val2017" → "val"."""
    for word in re.findall("[a-z]+", name.lower()):
        for split, words in SPLITS.items():
            if word in words:
                return split
    return None


def split_of_folder(name: str) -> str | None:
    """Return the split of a folder named like a split and nothing else: "valid", "train2017"."""
    return split_of(name) if re.fullmatch(r"[a-zA-Z]+[\d_-]*", name) else None


def ordered(splits: Iterable[str]) -> list[str]:
    """Sort splits in their usual order: the class list of the first counts for all."""
    return sorted(splits, key=[*SPLITS].index)
