"""Detection datasets in memory, whatever their format: images, boxes in pixels, labels from 0, problems.

    DetectionSet ── splits["train"] ──► ImageRecord, ImageRecord, …
                 ── class_names     ──► name of label 0, 1, …
                 ── problems        ──► each with its place; `PROBLEM_KINDS` says what to do about it

Boxes are kept as annotated, even outside the image, because evaluation must see the same numbers as COCO's
own tools. `DetectionDataset` clips them for training.
"""

from __future__ import annotations

__all__ = [
    "ERRORS",
    "PROBLEM_KINDS",
    "DetectionSet",
    "ImageRecord",
    "Problem",
    "ProblemKind",
    "box_areas",
    "box_array",
    "clip_boxes",
    "describe",
    "has_area",
    "learnable",
    "n_learnable",
]

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from thawline.errors import DataError, did_you_mean

SHOWN = 5
"""Maximum number of places listed per kind of problem in an error message; the rest are counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRecord:
    """One image and its boxes."""

    image_id: int | str
    """Id in the annotation file; formats without ids count from 0 within the split."""
    path: Path
    width: int
    """Pixels, in the orientation that the boxes refer to."""
    height: int
    boxes_xyxy: np.ndarray
    """(N, 4) float64, pixels, as annotated: neither clipped nor filtered."""
    labels: np.ndarray
    """(N,) int64, contiguous from 0: indices into `DetectionSet.class_names`."""
    iscrowd: np.ndarray
    """(N,) bool: a box around many objects, ignored by training and evaluation."""
    area: np.ndarray
    """(N,) float64, pixels²: as annotated (of a mask, in COCO), else width × height of the box."""
    oriented: bool = False
    """True if the image has an EXIF orientation and its boxes fit the image after that is applied."""


class ProblemKind(NamedTuple):
    """One way in which a dataset can be wrong."""

    title: str
    remedy: str
    """Advice to the dataset's owner."""
    fix: str = ""
    """Action of `thawline data check --fix` in the repaired copy. Empty: none."""


ERRORS: dict[str, ProblemKind] = {
    "missing-image": ProblemKind(
        "annotated images are missing", "add the files, or remove the entries", "leaves the images out"
    ),
    "ambiguous-image": ProblemKind(
        "annotations fit several images equally well",
        "rename or move all but one, or write the whole name with its folder",
        "leaves the images out",
    ),
    "corrupt-image": ProblemKind(
        "images cannot be decoded", "replace the files, or remove the entries", "leaves the images out"
    ),
    "image-size": ProblemKind(
        "images differ in size from their annotations, so their boxes are in other pixels",
        "replace them with the annotated images, or rescale the boxes",
        "rescales the boxes if the aspect ratio is the same, else leaves the images out",
    ),
    "box-units": ProblemKind(
        "images have boxes in fractions of their size, where pixels are expected",
        "multiply them by the image's width and height",
        "multiplies them",
    ),
    "box-corners": ProblemKind(
        "splits have boxes that look like two corners each, x1 y1 x2 y2",
        "write `[x, y, width, height]` in COCO, `cx cy w h` in YOLO",
    ),
    "unknown-image": ProblemKind(
        "annotations refer to an unknown image", "add the image, or remove them", "leaves them out"
    ),
    "duplicate-image": ProblemKind(
        "images are listed twice in a split",
        "give each image one id and one entry, with all its boxes",
        "merges entries of one file, leaves out files that share an id",
    ),
    "class-shift": ProblemKind(
        "class ids look shifted by one", "make ids and class list start at the same number", "shifts the ids"
    ),
    "class-id": ProblemKind(
        "annotations have a class that is not in the class list",
        "correct the ids, or complete the list",
        "leaves the annotations out, unless a shift by one makes all ids fit the list",
    ),
    "class-list": ProblemKind("the class list is contradictory", "give every class one id and one name"),
    "malformed": ProblemKind(
        "annotations cannot be read",
        "correct or remove them",
        "leaves them out, or the images of whole files",
    ),
    "missing-split": ProblemKind("splits are missing", "correct their paths, or remove them from the file"),
    "missing-labels": ProblemKind(
        "splits have images, but no labels", "put labels/ beside images/, or each label file beside its image"
    ),
    "no-boxes": ProblemKind(
        "training splits have no box to learn from", "annotate objects, or check where the labels are"
    ),
}
"""Problems that training must not start with, in the order in which they are reported."""

WARNINGS: dict[str, ProblemKind] = {
    "leak": ProblemKind(
        "images are in two splits, so scores on the held-out split are too high",
        "remove them from one of the splits",
        "leaves them out of the training split",
    ),
    "near-leak": ProblemKind(
        "images look almost the same as one of another split (re-encoded, resized, next frame of a video?)",
        "look at the pairs; keep whole scenes or videos in one split",
    ),
    "copies": ProblemKind("images have exact copies in the same split", "keep one of each"),
    "box-outside": ProblemKind(
        "boxes leave their image by more than a pixel", "training clips them to the image", "clips them"
    ),
    "box-degenerate": ProblemKind(
        "boxes have no area inside their image", "training leaves them out", "leaves them out"
    ),
    "box-duplicate": ProblemKind("boxes are repeated in an image", "keep one of each", "keeps one of each"),
    "class-unused": ProblemKind(
        "classes have no box in the training split", "remove them, or check whether ids are shifted"
    ),
    "class-alike": ProblemKind("class names differ only in spelling", "merge them if they mean the same"),
    "class-note": ProblemKind("class lists were ambiguous", "check that the class names are right"),
    "box-tiny": ProblemKind(
        "images have a box smaller than a pixel in their corner", "check that their boxes are in pixels"
    ),
    "like-keypoints": ProblemKind(
        "sets have polygons that could as well be boxes and keypoints",
        "look at the boxes that `thawline data check` draws",
    ),
    "many-boxes": ProblemKind(
        "splits have images with more boxes than a small detector has queries",
        "set `base.overrides.num_queries`, or choose a larger detector",
    ),
    "low-range": ProblemKind(
        "16-bit images use only the lowest part of their range, so they are read almost black",
        "multiply their values to fill 16 bits, or save them with 8",
    ),
    "frames": ProblemKind(
        "images hold several frames or pages, of which the first is used",
        "save those that are needed as images of their own",
    ),
    "unlabelled": ProblemKind(
        "splits have images without a label file, which count as images without objects",
        "add an empty label file if that is meant, else the missing one",
    ),
    "unused-image": ProblemKind(
        "folders hold images that no annotation names; they are not used", "annotate them if they are needed"
    ),
    "left-out": ProblemKind("files or folders are left out", "move or rename them if they are needed"),
    "place-note": ProblemKind("paths are not as written", "correct them in the file"),
    "encoding": ProblemKind(
        "text files are not UTF-8", "check names with accents, or save the files as UTF-8"
    ),
}
"""Problems that training can start with. `check.py` finds those that reading does not."""

PROBLEM_KINDS = ERRORS | WARNINGS


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where."""

    kind: str
    """A key of `PROBLEM_KINDS`."""
    where: str
    """File, and image or line in it."""
    detail: str = ""
    split: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}" if self.detail else self.where


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionSet:
    """A dataset as read from its files."""

    format: str
    root: Path
    class_names: tuple[str, ...]
    class_ids: tuple[int | str, ...]
    """Ids of the classes in the files, in label order (names, for formats without ids)."""
    splits: dict[str, tuple[ImageRecord, ...]]
    problems: tuple[Problem, ...] = ()

    def records(self, split: str) -> tuple[ImageRecord, ...]:
        """Return the images of a split. Raises: DataError: for an unknown split."""
        if split not in self.splits:
            raise DataError(f"'{self.root}' has no split '{split}'. {did_you_mean(split, self.splits)}")
        return self.splits[split]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems that training must not start with."""
        return tuple(problem for problem in self.problems if problem.kind in ERRORS)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Problems that training can start with."""
        return tuple(problem for problem in self.problems if problem.kind in WARNINGS)


def describe(problems: Iterable[Problem], shown: int = SHOWN) -> list[str]:
    """Return lines for an error message or a log: problems by kind, with the first places of each."""
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    lines = []
    for kind in sorted(by_kind, key=list(PROBLEM_KINDS).index):
        found = by_kind[kind]
        lines.append(f"{len(found)} × {PROBLEM_KINDS[kind].title}; {PROBLEM_KINDS[kind].remedy}:")
        lines += [f"  - {problem}" for problem in found[:shown]]
        if len(found) > shown:
            lines.append(f"  - … and {len(found) - shown} more")
    return lines


def box_array(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Return boxes as an (N, 4) float64 array, also if N is 0."""
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def box_areas(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return width × height, pixels², (N,)."""
    return (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])


def has_area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return True where a box has a positive width and height, (N,)."""
    return (boxes_xyxy[:, 2] > boxes_xyxy[:, 0]) & (boxes_xyxy[:, 3] > boxes_xyxy[:, 1])


def clip_boxes(boxes_xyxy: np.ndarray, width: int, height: int) -> np.ndarray:
    """Clip boxes to the image, (N, 4)."""
    return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], boxes_xyxy.dtype))


def learnable(record: ImageRecord) -> np.ndarray:
    """Return True for the boxes that training uses: with an area inside the image, and no crowds, (N,)."""
    return has_area(clip_boxes(record.boxes_xyxy, record.width, record.height)) & ~record.iscrowd


def n_learnable(record: ImageRecord) -> int:
    """Return the number of boxes that training uses."""
    return int(learnable(record).sum())
