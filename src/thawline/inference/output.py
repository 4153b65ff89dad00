"""Files that detections are written to.

Nothing is lost: no file is a source, none is written twice, and none replaces a file that no earlier
prediction wrote, as its record beside the results says. All of that is checked before the first image.
"""

from __future__ import annotations

__all__ = ["RESULTS", "Output"]

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from thawline.data.detection.drawing import save_image
from thawline.data.detection.images import is_image, opencv
from thawline.errors import ConfigError, DataError
from thawline.files import read_jsonl, to_json, write_json
from thawline.inference.frames import Frame, Source
from thawline.inference.sources import RECORD

RESULTS = "predictions.json"
"""COCO results, beside the images."""


class Output:
    """Files for the annotated images, or the annotated video, of a source, and for its results.

    Args:
        out: folder for annotated images, each at its place below the folder that they have in common; or a
            file, for a single image or a video.
        source: what is predicted.
        with_results: COCO results are written too.
    Raises: ConfigError: a file would be a source, be written twice, or replace what is no earlier result.
    """

    def __init__(self, out: Path, source: Source, *, with_results: bool = False) -> None:
        self._rate = source.rate
        frames = [] if source.rate is not None else list(source.frames)
        is_file = not out.is_dir() and (is_image(out) if source.rate is None else out.suffix != "")
        if is_file and len(frames) > 1:
            raise ConfigError(f"`out`: '{out}' names one image, but there are {len(frames)}. Give a folder.")
        self.folder = out.parent if is_file else out
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"`out`: '{self.folder}' is a file. Give a folder.")
        record = self.folder / RECORD
        self._written = set(read_jsonl(record)) if record.is_file() else set()
        self._results = self.folder / RESULTS
        # The file that is read, a name of it, and the file that is written.
        plan = [
            (frame.path, frame.name, out if is_file else out / _place(frame, source.path)) for frame in frames
        ]
        if source.rate is not None:
            # A video keeps its suffix in front of the one that can be written: clip.avi is not clip.mov.
            name = source.name if source.name.lower().endswith(".mp4") else f"{source.name}.mp4"
            plan = [(source.path, source.name, out if is_file else _free(out / name, source))]
        self._files = [file for _, _, file in plan]
        if with_results:
            plan.append((None, "the results", self._results))
        self._check(plan)

    @contextmanager
    def writer(self) -> Iterator[Callable[[int, np.ndarray], object]]:
        """Yield a function that writes annotated image number n, RGB."""
        if self._rate is None:
            yield lambda index, image: save_image(self._claim(self._files[index]), image)
            return
        with _video(self._claim(self._files[0]), self._rate) as append:
            yield lambda _, image: append(image)

    def write_results(self, results: list[dict[str, Any]]) -> None:
        """Write a COCO results file."""
        write_json(self._claim(self._results), results, indent=None)

    def _check(self, plan: list[tuple[Path | None, str, Path]]) -> None:
        sources = {_identity(path) for path, _, _ in plan if path is not None}
        first: dict[str, int] = {}
        for index, (_, name, file) in enumerate(plan):
            before = first.setdefault(os.path.normcase(os.path.abspath(file)), index)
            if before != index:
                raise ConfigError(
                    f"`out`: '{plan[before][1]}' and '{name}' would both be written to '{file}'. Predict one "
                    "of them alone, or give images in one folder."
                )
            if (identity := _identity(file)) is None:
                continue
            if identity in sources:
                raise ConfigError(
                    f"`out`: '{file}' is a source, which is never replaced. Give another folder."
                )
            if self._name_of(file) not in self._written:
                raise ConfigError(
                    f"`out`: '{file}' exists, and is no earlier result. Move it, or give another folder."
                )

    def _claim(self, file: Path) -> Path:
        """Record a file as ours before it is written; remove the earlier one, or a link in its place."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if (name := self._name_of(file)) not in self._written:
            self._written.add(name)
            with (self.folder / RECORD).open("a", encoding="utf-8") as record:
                record.write(to_json(name) + "\n")
        file.unlink(missing_ok=True)
        return file

    def _name_of(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def _place(frame: Frame, root: Path | None) -> str:
    """Return the path of an annotated image below `out`, with a suffix that OpenCV can write."""
    if frame.path is None or root is None:
        return re.sub(r"[^\w. -]", "_", Path(frame.name).name) + ".png"
    place = os.path.relpath(frame.path, root)
    return place if opencv().haveImageWriter(place) else f"{place}.png"


def _free(file: Path, source: Source) -> Path:
    """Return the file, or for a camera or stream, which cannot be predicted again, the next free name."""
    names = (file.with_stem(f"{file.stem}-{number}") for number in count(2))
    return file if source.path is not None else next(f for f in chain([file], names) if _identity(f) is None)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what all names, links and spellings of one file share; None where there is no file."""
    if not os.path.lexists(path):
        return None
    status = path.stat() if path.exists() else path.lstat()
    return status.st_dev, status.st_ino


@contextmanager
def _video(path: Path, rate: float) -> Iterator[Callable[[np.ndarray], object]]:
    """Yield a function that appends a frame to a video; the first frame determines its size.

    Raises: DataError: if the video cannot be written, or not whole, of which OpenCV says nothing.
    """
    cv2, video, size = opencv(), None, (0, 0)

    def append(image: np.ndarray) -> None:
        nonlocal video, size
        if video is None:
            size = (image.shape[1], image.shape[0])
            video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
            if not video.isOpened():
                raise DataError(f"Cannot write a video to '{path}'. Use a file name that ends in .mp4.")
        if (image.shape[1], image.shape[0]) != size:  # OpenCV would leave it out
            image = cv2.resize(image, size)
        video.write(np.ascontiguousarray(image[..., ::-1]))

    try:
        yield append
    finally:
        if video is not None:
            video.release()
    if video is not None and path.suffix.lower() in (".mp4", ".mov", ".m4v") and not _has_index(path):
        raise DataError(f"'{path}' was not written whole: is the disk full?")


def _has_index(path: Path) -> bool:
    """Return whether an MP4 file ends with its index, the box `moov`, without which no frame can be read."""
    with path.open("rb") as file:
        while len(head := file.read(8)) == 8:
            size, start = int.from_bytes(head[:4], "big"), file.tell() - 8
            if size == 1:
                size = int.from_bytes(file.read(8), "big")
            if head[4:] == b"moov":
                return start + size <= path.stat().st_size
            if size < 8:
                return False
            file.seek(start + size)
    return False
