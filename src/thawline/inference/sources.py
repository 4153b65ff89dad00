"""Sources of images: files, folders, patterns, and lists of them; `videos.py` opens the moving ones."""

from __future__ import annotations

__all__ = ["RECORD", "is_single", "open_source"]

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thawline.data.detection.formats.places import list_images
from thawline.data.detection.images import IMAGE_SUFFIXES
from thawline.errors import DataError
from thawline.files import read_jsonl
from thawline.inference.frames import Frame, Source
from thawline.inference.images import is_tensor, to_rgb
from thawline.inference.videos import download_image, is_url, is_video, open_video, without_password

logger = logging.getLogger(__name__)

OTHERS = (".txt", ".csv", ".json", ".yaml", ".yml", ".zip", ".tar", ".gz", ".7z", ".rar", ".pdf")
"""Suffixes of files that are given in place of the images that they hold or list."""

RECORD = ".thawline-predict"
"""File that lists the results of `predict` in its folder, by name: they are no images to predict."""


def is_single(source: Any) -> bool:
    """Return True for a single image."""
    if isinstance(source, str | Path):
        return not is_video(source) and not Path(source).is_dir() and not _is_pattern(str(source))
    if isinstance(source, np.ndarray) or is_tensor(source):
        return source.ndim < 4
    return not isinstance(source, int | Sequence)


def open_source(source: Any) -> Source:
    """Open a source of images.

    Args:
        source: path of an image, folder or video; a pattern (`*.jpg`); a camera's number or `/dev/videoN`;
            the address of a stream (`rtsp://`, `http://` …) or of an image; a Pillow image, array or tensor;
            a batch as one tensor (B, 3, H, W) or array (B, H, W, 3); or a sequence of images, folders and
            patterns. A `Source` is returned unchanged.
    Raises: DataError: nothing found, or it cannot be opened.
    """
    if isinstance(source, Source):
        return source
    if is_video(source):
        return open_video(source)
    if isinstance(source, str | Path):
        frames = _files(str(source))
    elif is_single(source):
        frames = [_frame(source, "image")]
    else:
        frames = []
        for index, item in enumerate(source):
            if is_video(item):
                raise DataError(f"'{without_password(item)}' is a video or a camera: give it alone.")
            is_named = isinstance(item, str | Path)
            frames += _files(str(item)) if is_named else [_frame(item, f"image {index}")]
    root = Path(_fixed_part(str(source))) if isinstance(source, str | Path) else _common_folder(frames)
    return Source(frames, len(frames), path=root)


def _files(source: str) -> list[Frame]:
    """Return the images of one file, folder or pattern."""
    if is_url(source):
        return [Frame(without_password(source), lambda: download_image(source))]
    paths = [Path(source)] if is_single(source) else _find(source)
    if is_single(source) and paths[0].is_file() and paths[0].suffix.lower() in OTHERS:
        raise DataError(
            f"'{source}' is no image and no video. Give images, a folder or a pattern; unpack archives."
        )
    return [_frame(path, str(path), path) for path in paths]


def _frame(item: Any, name: str, path: Path | None = None) -> Frame:
    return Frame(name, lambda: to_rgb(item), path)


def _find(source: str) -> list[Path]:
    root = Path(_fixed_part(source))
    if Path(source).is_dir():
        found = list_images(root)
        nothing = f"No images in '{source}': looked for {', '.join(IMAGE_SUFFIXES)}."
    else:
        found = sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())
        nothing = f"Nothing matches '{source}'."
    results = _results_below(root, found)
    paths = [path for path in found if path not in results]
    if len(paths) < len(found):
        left_out = f"{len(found) - len(paths)} results of earlier predictions in '{source}' are left out."
        nothing = f"{nothing} {left_out}"
        logger.info(left_out)
    if not paths:
        raise DataError(nothing)
    return paths


def _results_below(root: Path, paths: Sequence[Path]) -> set[Path]:
    """Return the files that earlier predictions wrote into the folders of these files, down from `root`."""
    folders = {
        folder for path in paths for folder in path.parents if folder == root or root in folder.parents
    }
    records = [folder / RECORD for folder in folders if (folder / RECORD).is_file()]
    return {record.parent / name for record in records for name in read_jsonl(record)}


def _fixed_part(source: str) -> str:
    """Return the folder that holds all files of a source: of a pattern the part before its first sign."""
    if Path(source).is_dir():
        return source
    return os.path.dirname(re.split(r"[*?\[]", source)[0] if _is_pattern(source) else source)


def _common_folder(frames: Sequence[Frame]) -> Path | None:
    folders = {os.path.abspath(frame.path.parent) for frame in frames if frame.path is not None}
    return Path(os.path.commonpath(folders)) if folders else None


def _is_pattern(source: str) -> bool:
    return any(sign in source for sign in "*?[") and not is_url(source) and not Path(source).exists()
