"""Demo of the main jobs, offline, in minutes: `thawline demo`."""

from __future__ import annotations

__all__ = ["PARTS", "run_demo"]

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path

from thawline.errors import ConfigError, did_you_mean
from thawline.files import write_text

logger = logging.getLogger(__name__)

PARTS = {
    "columns": "a frozen language model learns three questions: untouched, with LoRA, with PaCA",
    "skills": "six tasks share skills, two unseen ones recombine them: LoRA, Poly, MHR, MHR-z",
    "shapes": "a detector learns circles, squares and triangles from random weights",
}
"""Module of thawline.demo, whose `run(folder)` returns the text to print → its description."""


def run_demo(folder: Path, parts: Sequence[str] = ()) -> str:
    """Run the parts, each in its own folder below `folder`.

    Args:
        folder: created; if it exists, the next free "folder-2", "folder-3", … instead.
        parts: names among `PARTS`. None: all.
    Returns: results and the commands to try next; also written to demo.txt.
    Raises: ConfigError: for an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"The demo has no part '{part}'. {did_you_mean(part, PARTS)}")
    folder = _free_folder(folder)
    texts = []
    for part in parts or PARTS:
        logger.info("%s: %s", part, PARTS[part])
        texts.append(importlib.import_module(f"thawline.demo.{part}").run(folder / part))
    text = "\n\n\n".join(texts)
    write_text(folder / "demo.txt", f"{text}\n")
    return text


def _free_folder(folder: Path) -> Path:
    """Return `folder`, or the next free name, so that nothing is overwritten."""
    candidate, n = folder, 2
    while candidate.exists():
        candidate, n = folder.with_name(f"{folder.name}-{n}"), n + 1
    return candidate
