"""Sources of images: files, folders, patterns, lists, videos, cameras."""

from __future__ import annotations

__all__ = ["VIDEO_SUFFIXES", "Frame", "Source", "is_single", "is_video", "open_source"]

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thawline.data.detection.images import IMAGE_SUFFIXES, is_image, opencv
from thawline.errors import DataError
from thawline.inference.images import to_rgb

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Frame:
    """An image not yet decoded."""

    name: str
    """Path, or position in the source."""
    load: Callable[[], np.ndarray]
    """Returns RGB, (H, W, 3) uint8, or raises DataError."""


@dataclass(frozen=True)
class Source:
    """An opened source; a camera can be opened only once."""

    frames: Iterable[Frame]
    """A sequence; an iterator for a video or camera."""
    total: int | None
    """Number of frames, if known."""
    is_camera: bool = False
    """Live frames are predicted one by one: waiting for a batch would add delay."""
    rate: float | None = None
    """Frames per second of a video or camera, 25 if unknown; None for images."""


def is_video(source: Any) -> bool:
    """Return True for a video or a camera."""
    if isinstance(source, str | Path):
        return Path(source).suffix.lower() in VIDEO_SUFFIXES
    return isinstance(source, int) and not isinstance(source, bool)


def is_single(source: Any) -> bool:
    """Return True for a single image."""
    if isinstance(source, str | Path):
        return not is_video(source) and not Path(source).is_dir() and not _is_pattern(str(source))
    if isinstance(source, torch.Tensor | np.ndarray):
        return source.ndim < 4
    return not isinstance(source, int | Sequence)


def open_source(source: Any) -> Source:
    """Open a source of images.

    Args:
        source: path of an image, folder or video; a pattern (`*.jpg`); a camera's number; a Pillow image,
            array or tensor; a batch as one tensor (B, 3, H, W) or array (B, H, W, 3); or a sequence. A
            `Source` is returned unchanged.
    Raises: DataError: nothing found, or it cannot be opened.
    """
    if isinstance(source, Source):
        return source
    if is_video(source):
        return _open_video(source)
    if isinstance(source, str | Path) and not is_single(source):
        frames = [_frame(path, str(path)) for path in _find(str(source))]
    elif is_single(source):
        frames = [_frame(source, str(source) if isinstance(source, str | Path) else "image")]
    else:
        frames = [
            _frame(item, str(item) if isinstance(item, str | Path) else f"image {i}")
            for i, item in enumerate(source)
        ]
    return Source(frames, len(frames))


def _frame(item: Any, name: str) -> Frame:
    return Frame(name, lambda: to_rgb(item))


def _find(source: str) -> list[Path]:
    if Path(source).is_dir():
        paths = sorted(path for path in Path(source).rglob("*") if path.is_file() and is_image(path))
        if not paths:
            raise DataError(f"No images in '{source}': looked for {', '.join(IMAGE_SUFFIXES)}.")
        return paths
    paths = sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"Nothing matches '{source}'.")
    return paths


def _is_pattern(source: str) -> bool:
    return any(sign in source for sign in "*?[") and not Path(source).exists()


def _open_video(source: Any) -> Source:
    cv2 = opencv()
    is_camera = isinstance(source, int)
    if not is_camera and not Path(source).is_file():
        raise DataError(f"No video '{source}'.")
    capture = cv2.VideoCapture(source if is_camera else str(source))
    if not capture.isOpened():
        raise DataError(f"{'Camera' if is_camera else 'Video'} '{source}' cannot be opened.")
    count, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)

    def frames() -> Iterator[Frame]:
        index = 0
        try:
            while (read := capture.read())[0]:
                image = cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
                yield _frame(image, f"frame {index}")
                index += 1
        finally:
            capture.release()

    return Source(
        frames(),
        count if count > 0 and not is_camera else None,
        is_camera=is_camera,
        rate=rate if 0 < rate < 1000 else 25.0,
    )
