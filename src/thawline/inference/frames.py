"""Images on their way to a detector: `Frame`, and the `Source` that they come from."""

from __future__ import annotations

__all__ = ["Frame", "Source"]

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Frame:
    """An image not yet decoded."""

    name: str
    """Path, or position in the source."""
    load: Callable[[], np.ndarray]
    """Returns RGB, (H, W, 3) uint8, or raises DataError."""
    path: Path | None = None
    """File that it is read from."""


@dataclass(frozen=True)
class Source:
    """An opened source; a camera or stream can be opened only once."""

    frames: Iterable[Frame]
    """A sequence; an iterator for a video, camera or stream."""
    total: int | None
    """Number of frames, if known."""
    name: str = ""
    """Name of a video, camera or stream, for files made of it."""
    path: Path | None = None
    """File of a video; of images the folder that they have in common."""
    is_live: bool = False
    """Live frames are predicted one by one: waiting for a batch would add delay."""
    rate: float | None = None
    """Frames per second of a video, camera or stream, 25 if unknown; None for images."""
