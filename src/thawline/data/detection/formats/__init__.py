"""Formats of detection datasets, and detecting which one a folder contains.

A format is a file here with `HINT` (how it is recognised), `look(path)` and `read(found, images)`, and an
entry in `FORMATS`.
"""

from __future__ import annotations

__all__ = ["FORMATS", "read_raw"]

import logging
from pathlib import Path
from types import ModuleType

from thawline.data.detection.formats import coco, voc, yolo
from thawline.data.detection.formats.raw import Found, RawSet
from thawline.errors import ConfigError, DataError, did_you_mean

FORMATS: dict[str, ModuleType] = {"coco": coco, "yolo": yolo, "voc": voc}
"""Name of a format → the module that reads it."""

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
    if not path.exists():
        raise DataError(
            f"'{path}' does not exist. Give the folder of the dataset, its COCO JSON or its data.yaml."
        )
    found = [one for reader in readers.values() for one in reader.look(path)]
    split = [one for one in found if one.is_split]
    chosen = split if len(split) == 1 else found
    if len(chosen) == 1:
        for other in found:
            if other is not chosen[0]:
                logger.info("'%s' is read as %s; ignored: %s.", path, chosen[0], other)
        return chosen[0]
    if found:
        raise DataError(
            f"'{path}' holds more than one dataset: {'; '.join(map(str, found))}. "
            "Choose one by `format`, or give its own file or folder as the path."
        )
    hints = "; ".join(f"{name}: {reader.HINT}" for name, reader in readers.items())
    there = ", ".join(sorted(child.name for child in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise DataError(f"No dataset found at '{path}' (there: {there or 'nothing'}). Expected {hints}.")
