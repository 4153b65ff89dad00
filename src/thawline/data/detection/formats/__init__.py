"""Formats of detection datasets, and detecting which one a folder contains.

A format is a file here with `HINT` (how it is recognised), `look(path)` and `read(found, images)`, and an
entry in `FORMATS`.
"""

from __future__ import annotations

__all__ = ["FORMATS", "read_raw"]

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from thawline.data.detection.formats import coco, voc, yolo
from thawline.data.detection.formats.places import is_url, subfolders
from thawline.data.detection.formats.raw import Found, RawSet
from thawline.errors import ConfigError, DataError, did_you_mean

FORMATS: dict[str, ModuleType] = {"coco": coco, "yolo": yolo, "voc": voc}
"""Name of a format → the module that reads it."""

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")

logger = logging.getLogger(__name__)


def read_raw(path: str | Path, format: str | None = None, images: str | Path | None = None) -> RawSet:
    """Detect the format of a dataset and read its annotations, in the format's own terms.

    Raises: DataError: if no or several datasets are found, or files are not of the format. ConfigError: for
        an unknown format.
    """
    found = _find_format(path, format)
    if images is not None and not Path(images).is_dir():
        raise DataError(f"'{images}' is not a folder. `images` is the folder that image names start from.")
    return FORMATS[found.format].read(found, Path(images) if images is not None else None)


def _find_format(path: str | Path, format: str | None = None) -> Found:
    """Find the dataset in a file or folder.

    If there are several, one whose files say which images are for training wins over those that do not (VOC
    files left over next to a split COCO copy); otherwise `format` has to choose.

    Args:
        path: a folder, a COCO JSON or a data.yaml.
        format: a key of `FORMATS`. None or "auto": detected.
    Raises: DataError: naming what was found, if that is nothing or more than one. ConfigError: for an
        unknown format.
    """
    path = Path(path)
    if format in (None, "auto"):
        readers = FORMATS
    elif format in FORMATS:
        readers = {format: FORMATS[format]}
    else:
        raise ConfigError(f"Unknown data format '{format}'. {did_you_mean(str(format), FORMATS)}")
    if is_url(str(path)):
        raise DataError(f"'{path}' is a URL. Download the dataset, and give its folder.")
    if not path.exists():
        raise DataError(
            f"'{path}' does not exist. Give the folder of the dataset, its COCO JSON or its data.yaml."
        )
    found = _look(path, readers)
    split = [one for one in found if one.is_split]
    chosen = split if len(split) == 1 else found
    if len(chosen) == 1:
        if chosen[0].fault:
            raise DataError(chosen[0].fault)
        for other in found:
            if other is not chosen[0]:
                logger.info("'%s' is read as %s; ignored: %s.", path, chosen[0], other)
        return chosen[0]
    if found:
        raise DataError(
            f"'{path}' holds more than one dataset: {'; '.join(map(str, found))}. "
            "Choose one by `format`, or give its own file or folder as the path."
        )
    inside = {folder: _look(folder, readers) for folder in (subfolders(path) if path.is_dir() else ())}
    if listed := [f"'{folder}' ({found[0].format})" for folder, found in inside.items() if found]:
        raise DataError(f"'{path}' is not a dataset itself, but holds {', '.join(listed)}. Give one of them.")
    if path.suffix.lower() in ARCHIVES:
        raise DataError(f"'{path}' is an archive. Unpack it, and give the folder.")
    hints = "; ".join(f"{name}: {reader.HINT}" for name, reader in readers.items())
    there = ", ".join(sorted(child.name for child in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise DataError(f"No dataset found at '{path}' (there: {there or 'nothing'}). Expected {hints}.")


def _look(path: Path, readers: Mapping[str, ModuleType]) -> list[Found]:
    return [found for reader in readers.values() for found in reader.look(path)]
