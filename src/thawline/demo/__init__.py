"""`thawline demo`: the main jobs, offline, in minutes, one part after the other."""

from __future__ import annotations

__all__ = ["PARTS", "run_demo"]

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path

from thawline.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

PARTS = {
    "columns": "a frozen language model learns three questions: untouched, with LoRA, with PaCA",
    "skills": "six tasks share skills, two unseen ones recombine them: LoRA, Poly, MHR, MHR-z",
    "shapes": "a detector learns circles, squares and triangles from random weights",
}
"""Module of thawline.demo, whose `run(folder)` returns what to print → what it shows."""


def run_demo(folder: Path, parts: Sequence[str] = ()) -> str:
    """Run the parts, each in a folder of its own below `folder`.

    Args:
        folder: made; where it is taken, the next free "folder-2", "folder-3", … is.
        parts: names among `PARTS`; none: all of them.
    Returns: what they found and what to type next, also in demo.txt there.
    Raises: ConfigError: for an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"The demo has no part '{part}'. {did_you_mean(part, PARTS)}")
    folder = _free(folder)
    found = []
    for part in parts or PARTS:
        logger.info("%s: %s", part, PARTS[part])
        found.append(importlib.import_module(f"thawline.demo.{part}").run(folder / part))
    text = "\n\n\n".join(found)
    (folder / "demo.txt").write_text(f"{text}\n", encoding="utf-8")
    return text


def _free(folder: Path) -> Path:
    """`folder`, or the next name that is not taken: nothing is overwritten."""
    candidate, n = folder, 2
    while candidate.exists():
        candidate, n = folder.with_name(f"{folder.name}-{n}"), n + 1
    return candidate
