"""Raw annotations: what the reader of a format returns, and helpers that the readers share.

A reader only finds its files and parses their lines into a `RawSet`. Everything that all formats have in
common (labels, image sizes, pixels, problems) happens in `assemble.py`.
"""

from __future__ import annotations

__all__ = [
    "Box",
    "ClassId",
    "Found",
    "RawBox",
    "RawImage",
    "RawSet",
    "existing",
    "find_image",
    "list_images",
    "ordered",
    "relative_name",
    "split_of",
    "split_of_folder",
]

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from thawline.data.detection.images import is_image
from thawline.data.detection.records import Problem

SPLITS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Name of a split → words for it in names of files and folders."""

ClassId = int | str
Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A dataset found by the `look` of a format."""

    format: str
    root: Path
    splits: dict[str, tuple[Path, ...]]
    """Split → where it is (COCO: a file; YOLO: image folders or lists; VOC: a list or a folder)."""
    is_split: bool
    """True if the files themselves say which images are for training."""
    index: Path | None = None
    """The one file that names all the others, if the format has one (YOLO's data.yaml)."""

    def __str__(self) -> str:
        parts = ", ".join(
            f"{split}: {' '.join(relative_name(path, self.root) for path in paths)}"
            for split, paths in self.splits.items()
        )
        return f"{self.format} ({parts})"


class RawBox(NamedTuple):
    """One annotated box."""

    xyxy: Box
    """Pixels, or fractions of the image if `RawSet.is_relative`."""
    class_id: ClassId
    iscrowd: bool = False
    area: float | None = None
    """Annotated area. None: that of the box."""


@dataclass(kw_only=True)
class RawImage:
    """One image and its annotations in the format's own terms."""

    image_id: int | str
    name: str
    """Name in the annotations."""
    path: Path | None
    """None: not found."""
    where: str
    """Start of every message about it."""
    size: tuple[int, int] | None = None
    """(width, height) stated by the annotations, if any."""
    boxes: list[RawBox] = field(default_factory=list)
    is_unreadable: bool = False
    """True if its annotations are unknown, so that it is not even a negative; the reader reports why."""


@dataclass(kw_only=True)
class RawSet:
    """A dataset in its format's own terms."""

    format: str
    root: Path
    splits: dict[str, list[RawImage]] = field(default_factory=dict)
    classes: dict[str, dict[ClassId, str]] = field(default_factory=dict)
    """Split → id → name, in label order. The first split's list counts; others are matched to it by name."""
    is_relative: bool = False
    """True if boxes are fractions of the image."""
    applies_orientation: bool = False
    """True if boxes refer to the upright image, whatever the size says (formats without sizes)."""
    searched: dict[str, Sequence[Path]] = field(default_factory=dict)
    """Split → folders in which its images were searched."""
    problems: list[Problem] = field(default_factory=list)

    def add_problem(self, kind: str, where: str, detail: str = "", split: str = "") -> None:
        """Append to `problems`."""
        self.problems.append(Problem(kind=kind, where=where, detail=detail, split=split))

    def used_ids(self, split: str) -> set[ClassId]:
        """Return the class ids of a split's boxes."""
        return {box.class_id for image in self.splits[split] for box in image.boxes}


def split_of(name: str) -> str | None:
    """Return the split named in a file's or folder's name: "instances_val2017" → "val"."""
    for word in re.findall("[a-z]+", name.lower()):
        for split, words in SPLITS.items():
            if word in words:
                return split
    return None


def split_of_folder(name: str) -> str | None:
    """Return the split of a folder named like a split and nothing else: "valid", "train2017"."""
    return split_of(name) if re.fullmatch(r"[a-zA-Z]+[\d_-]*", name) else None


def ordered(splits: Iterable[str]) -> list[str]:
    """Sort splits in their usual order: the class list of the first counts for all."""
    return sorted(splits, key=[*SPLITS].index)


def existing(folders: Iterable[Path]) -> list[Path]:
    """Return the folders that exist, each once."""
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def relative_name(path: Path, root: Path) -> str:
    """Return a path for messages: relative to the dataset's folder if it lies inside."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if is_image(path))


def find_image(name: str, folders: Iterable[Path]) -> Path | None:
    """Return the first file of that name in the folders; full paths also match by their last part."""
    names = dict.fromkeys((name, PureWindowsPath(name).name))
    paths = (folder / candidate for candidate in names for folder in folders)
    return next((path for path in paths if path.is_file()), None)
