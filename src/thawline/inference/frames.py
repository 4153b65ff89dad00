"""Images on their way to a network: `Frame`, the `Source` that they come from, and what `Network` finds."""

from __future__ import annotations

__all__ = ["Found", "Frame", "Network", "Source"]

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

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
    """Live frames are predicted one by one, since waiting for a batch would add delay; those that come
    meanwhile are left out."""
    rate: float | None = None
    """Frames per second of a video, camera or stream, 25 if unknown; None for images."""


class Found(TypedDict):
    """Detections of one image, highest score first, without a threshold."""

    labels: np.ndarray
    """(K,), int."""
    boxes: np.ndarray
    """(K, 4), xyxy in pixels of the image, not clipped."""
    scores: np.ndarray
    """(K,), in 0–1."""


class Network(Protocol):
    """Network of a detector, whatever runs it."""

    class_names: tuple[str, ...]

    def __call__(self, images: Sequence[np.ndarray]) -> list[Found]:
        """Detect in images, each (H, W, 3) uint8, RGB."""
