"""Where pictures come from: files, folders, patterns, lists, videos, cameras."""

from __future__ import annotations

__all__ = ["VIDEO_SUFFIXES", "Frame", "is_single", "is_video", "open_source", "video_rate"]

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thawline.data.images import IMAGE_SUFFIXES, is_image, opencv
from thawline.errors import DataError
from thawline.inference.images import to_rgb

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Frame:
    """A picture not yet decoded."""

    name: str
    """Its path, or what it is of its source."""
    load: Callable[[], np.ndarray]
    """Gives RGB, (H, W, 3) uint8, or raises DataError."""


def is_video(source: Any) -> bool:
    """Whether the source is a film or a camera, whose pictures come one after the other."""
    if isinstance(source, str | Path):
        return Path(source).suffix.lower() in VIDEO_SUFFIXES
    return isinstance(source, int) and not isinstance(source, bool)


def is_single(source: Any) -> bool:
    """Whether the source is one picture."""
    if isinstance(source, str | Path):
        return not is_video(source) and not Path(source).is_dir() and not _is_pattern(str(source))
    if isinstance(source, torch.Tensor | np.ndarray):
        return source.ndim < 4
    return not isinstance(source, int | Sequence)


def open_source(source: Any) -> tuple[Iterator[Frame], int | None]:
    """The pictures of a source, and how many there are where that is known.

    Args:
        source: path of a picture, folder or film; a pattern (`*.jpg`); the number of a camera; a Pillow
            image, array or tensor; a batch as one tensor (B, 3, H, W) or array (B, H, W, 3); or a sequence.
    Raises: DataError: nothing there.
    """
    if is_video(source):
        return _video_frames(source)
    if isinstance(source, str | Path) and not is_single(source):
        paths = _find(str(source))
        return iter([_frame(path, str(path)) for path in paths]), len(paths)
    if is_single(source):
        name = str(source) if isinstance(source, str | Path) else "image"
        return iter([_frame(source, name)]), 1
    frames = [
        _frame(item, str(item) if isinstance(item, str | Path) else f"image {i}")
        for i, item in enumerate(source)
    ]
    return iter(frames), len(frames)


def video_rate(source: Any) -> float:
    """Pictures a second of a film or camera; 25 where it does not say."""
    capture = opencv().VideoCapture(source if isinstance(source, int) else str(source))
    rate = capture.get(opencv().CAP_PROP_FPS)
    capture.release()
    return rate if 0 < rate < 1000 else 25.0


def _frame(item: Any, name: str) -> Frame:
    return Frame(name, lambda: to_rgb(item))


def _find(source: str) -> list[Path]:
    if Path(source).is_dir():
        paths = sorted(path for path in Path(source).rglob("*") if path.is_file() and is_image(path))
        if not paths:
            raise DataError(f"No pictures in '{source}': looked for {', '.join(IMAGE_SUFFIXES)}.")
        return paths
    paths = sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"Nothing matches '{source}'.")
    return paths


def _is_pattern(source: str) -> bool:
    return any(sign in source for sign in "*?[") and not Path(source).exists()


def _video_frames(source: Any) -> tuple[Iterator[Frame], int | None]:
    cv2 = opencv()
    if not isinstance(source, int) and not Path(source).is_file():
        raise DataError(f"No video '{source}'.")
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if not capture.isOpened():
        raise DataError(f"{'Camera' if isinstance(source, int) else 'Video'} '{source}' cannot be opened.")
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def frames() -> Iterator[Frame]:
        index = 0
        try:
            while (read := capture.read())[0]:
                picture = cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
                yield _frame(picture, f"frame {index}")
                index += 1
        finally:
            capture.release()

    return frames(), count if count > 0 and not isinstance(source, int) else None
