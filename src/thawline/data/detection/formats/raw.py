"""Raw annotations: what the reader of a format returns, and helpers that the readers share.

A reader only finds its files and parses their lines into a `RawSet`. Everything that all formats have in
common (labels, image sizes, pixels, problems) happens in `assemble.py`.
"""

from __future__ import annotations

__all__ = ["Box", "ClassId", "Found", "RawBox", "RawImage", "RawSet", "box_around", "listed"]

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from thawline.data.detection.formats.places import decode_text, relative_name
from thawline.data.detection.records import Problem

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
    left_out: tuple[Path, ...] = ()
    """Files of the format that belong to no split."""
    fault: str = ""
    """Reason why its files cannot be read; empty if they can."""

    def __str__(self) -> str:
        parts = ", ".join(
            f"{split}: {' '.join(relative_name(path, self.root) for path in paths)}"
            for split, paths in self.splits.items()
        )
        return f"{self.format} ({self.fault or parts})"


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
    where: str
    """Start of every message about it."""
    path: Path | None = None
    """None: not found."""
    size: tuple[int, int] | None = None
    """(width, height) stated by the annotations, if any."""
    boxes: list[RawBox] = field(default_factory=list)
    is_unusable: bool = False
    """True if its file or its annotations are unknown, so that it is not even a negative; the reader reports
    why."""


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

    def locate(self, image: RawImage, files: Sequence[Path], split: str) -> None:
        """Give an image its file, or report that several files could be it."""
        if len(files) > 1:
            names = ", ".join(relative_name(file, self.root) for file in files)
            self.add_problem("ambiguous-image", image.where, f"'{image.name}' may be {names}", split)
            image.is_unusable = True
        image.path = files[0] if len(files) == 1 else None

    def read_text(self, file: Path, split: str = "") -> str:
        """Read a text file, and report one whose encoding is a guess."""
        text, is_certain = decode_text(file.read_bytes())
        if not is_certain:
            self.add_problem("encoding", relative_name(file, self.root), "read as Windows-1252", split)
        return text

    def used_ids(self, split: str) -> set[ClassId]:
        """Return the class ids of a split's boxes."""
        return {box.class_id for image in self.splits[split] for box in image.boxes}


def listed(names: Sequence[str], shown: int = 3) -> str:
    """Return the first of some names, comma-separated."""
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


def box_around(xs: Sequence[float], ys: Sequence[float]) -> Box:
    """Return the box around the corners of a polygon. Raises: ValueError: if there are fewer than three."""
    if len(xs) != len(ys) or len(xs) < 3:
        raise ValueError(f"a polygon must have three corners or more, got {len(xs)} x and {len(ys)} y")
    return min(xs), min(ys), max(xs), max(ys)
