"""What a detection data set is once read, whatever its format was: images, boxes in pixels, labels from 0.

    DetectionSet ── splits["train"] ──► ImageRecord, ImageRecord, …
                 ── class_names     ──► the name of label 0, 1, …
                 ── problems        ──► what is wrong, each with its place; `KINDS` says what to do about it

Boxes are kept as the file has them, also where they leave the image, because an evaluation must see the
same numbers as COCO's own tools. `DetectionDataset` clips them for training.
"""

from __future__ import annotations

__all__ = ["KINDS", "DetectionSet", "ImageRecord", "Kind", "Problem"]

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from thawline.errors import DataError, did_you_mean

SHOWN = 5
"""Places named per kind of problem in an error message; the rest are counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRecord:
    """One image and its boxes."""

    image_id: int | str
    """As the file has it; formats without ids count from 0 within the split."""
    path: Path
    width: int
    """Pixels, of the image as its boxes see it."""
    height: int
    boxes_xyxy: np.ndarray
    """(N, 4) float64, pixels, as annotated: neither clipped nor filtered."""
    labels: np.ndarray
    """(N,) int64, contiguous from 0: places in `DetectionSet.class_names`."""
    iscrowd: np.ndarray
    """(N,) bool: a box around many objects, ignored by training and evaluation."""
    area: np.ndarray
    """(N,) float64, pixels²: the annotation's own (a mask's, in COCO), else width × height of the box."""
    oriented: bool = False
    """True: the boxes fit the image after its camera orientation tag was applied."""


class Kind(NamedTuple):
    """One way in which a data set can be wrong."""

    is_error: bool
    """True: training on it would be training on a guess."""
    title: str
    remedy: str
    """What its owner can do."""
    mending: str
    """What `thawline data check --fix` does in the mended copy. Empty: nothing."""


KINDS: dict[str, Kind] = {
    "missing-image": Kind(
        True,
        "annotated images are missing",
        "put the files there, or take the images out of the annotations",
        "leaves the images out",
    ),
    "corrupt-image": Kind(
        True,
        "image files cannot be decoded",
        "replace the files, or take the images out of the annotations",
        "leaves the images out",
    ),
    "image-size": Kind(
        True,
        "images have another size than their annotations say, so their boxes are in other pixels",
        "put the annotated images there, or rescale the boxes",
        "rescales the boxes where the shape is the same, leaves out the other images",
    ),
    "unknown-image": Kind(
        True,
        "annotations belong to an unknown image",
        "add the image, or remove the annotations",
        "leaves the annotations out",
    ),
    "duplicate-image": Kind(
        True,
        "images appear twice in a split",
        "give each image one id and one entry, with all its boxes",
        "joins entries of one file, leaves out files that share an id",
    ),
    "class-shift": Kind(
        True,
        "class ids look shifted by one against the class list",
        "let ids and list count from the same number",
        "shifts the ids",
    ),
    "class-id": Kind(
        True,
        "annotations have a class that is not in the class list",
        "correct the ids, or complete the list",
        "leaves the annotations out, unless a shift by one brings all ids into the list",
    ),
    "class-list": Kind(True, "the class list is contradictory", "give every class one id and one name", ""),
    "malformed": Kind(
        True,
        "annotations cannot be read",
        "correct or remove them",
        "leaves the annotations out, and images whose whole file cannot be read",
    ),
    "leak": Kind(
        False,
        "images are in two splits, so scores on the held-out one are too good",
        "take them out of one of the splits",
        "leaves them out of the training split",
    ),
    "near-leak": Kind(
        False,
        "images look almost like one of another split (re-encoded, resized, next frame of a film?)",
        "look at the pairs; keep whole scenes or films in one split",
        "",
    ),
    "copies": Kind(False, "images are there twice in a split, as copies", "keep one of each", ""),
    "box-outside": Kind(
        False,
        "boxes leave their image by more than a pixel",
        "training clips them to the image",
        "clips them",
    ),
    "box-degenerate": Kind(
        False,
        "boxes have no area inside their image",
        "training leaves them out",
        "leaves them out",
    ),
    "box-duplicate": Kind(
        False,
        "boxes are there twice in the same image",
        "keep one of each",
        "keeps one of each",
    ),
    "class-unused": Kind(
        False,
        "classes have no box in the training split",
        "remove them from the list, or see whether ids are shifted",
        "",
    ),
    "class-alike": Kind(
        False, "class names differ only in spelling", "join the classes if they are the same", ""
    ),
    "class-note": Kind(
        False, "class lists needed reading with care", "see that the class names are right", ""
    ),
}
"""What can be wrong, in the order it is told. `check.py` finds what reading does not."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where."""

    kind: str
    """A key of `KINDS`."""
    where: str
    """File, and image or line in it."""
    detail: str = ""
    split: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}" if self.detail else self.where


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionSet:
    """A data set as its files say."""

    format: str
    root: Path
    class_names: tuple[str, ...]
    class_ids: tuple[int | str, ...]
    """The ids that the files use for the classes, in label order (names, where the format has no ids)."""
    splits: dict[str, tuple[ImageRecord, ...]]
    problems: tuple[Problem, ...] = ()

    def records(self, split: str) -> tuple[ImageRecord, ...]:
        """The images of a split. Raises: DataError: naming the splits there are."""
        if split not in self.splits:
            raise DataError(f"'{self.root}' has no split '{split}'. {did_you_mean(split, self.splits)}")
        return self.splits[split]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that training must not start with."""
        return tuple(problem for problem in self.problems if KINDS[problem.kind].is_error)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that training can live with."""
        return tuple(problem for problem in self.problems if not KINDS[problem.kind].is_error)


def describe(problems: Iterable[Problem], shown: int = SHOWN) -> list[str]:
    """Problems by kind, the first few of each by name: lines for an error message or a log."""
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    lines = []
    for kind in sorted(by_kind, key=list(KINDS).index):
        found = by_kind[kind]
        lines.append(f"{len(found)} × {KINDS[kind].title}; {KINDS[kind].remedy}:")
        lines += [f"  - {problem}" for problem in found[:shown]]
        if len(found) > shown:
            lines.append(f"  - … and {len(found) - shown} more")
    return lines


def box_areas(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Width × height, pixels², (N,)."""
    return (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])


def clip_boxes(boxes_xyxy: np.ndarray, width: int, height: int) -> np.ndarray:
    """Boxes cut at the image's border, (N, 4)."""
    return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], boxes_xyxy.dtype))


def box_array(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """(N, 4) float64, also where N is 0."""
    return np.asarray(boxes, np.float64).reshape(-1, 4)
