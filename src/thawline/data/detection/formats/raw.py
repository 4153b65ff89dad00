"""What the readers of formats give, and how it becomes records.

A reader only finds its files and takes their lines apart (`RawSet`). Everything that all formats share
happens in `assemble`: classes get contiguous labels by *name*, images are probed, boxes come into pixels,
problems are collected.
"""

from __future__ import annotations

__all__ = [
    "Found",
    "RawImage",
    "RawSet",
    "assemble",
    "class_shift",
    "existing",
    "find_image",
    "list_images",
    "ordered",
    "relative_name",
    "split_of",
    "split_of_folder",
]

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np

from thawline.data.detection.images import ImageProbe, is_image, probe_image
from thawline.data.detection.records import (
    DetectionSet,
    ImageRecord,
    Problem,
    box_areas,
    box_array,
    clip_boxes,
)

SPLITS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
"""The name of a split here → the words for it in names of files and folders."""

ClassId = int | str
PROBE_THREADS = 8
OUTSIDE = 1.0
"""Pixels by which a box may leave its image unremarked: rounding, and files that count pixels from 1."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a format's `look` found."""

    format: str
    root: Path
    splits: dict[str, tuple[Path, ...]]
    """Split → what holds it (COCO: a file; YOLO: image folders or lists; VOC: a list or a folder)."""
    is_split: bool
    """Whether the files themselves say which images are for training."""
    index: Path | None = None
    """The one file that names all the others, where the format has one (YOLO's data.yaml)."""

    def __str__(self) -> str:
        parts = ", ".join(
            f"{split}: {' '.join(relative_name(path, self.root) for path in paths)}"
            for split, paths in self.splits.items()
        )
        return f"{self.format} ({parts})"


@dataclass(kw_only=True)
class RawImage:
    """One image and its annotations in the format's own terms."""

    image_id: int | str
    name: str
    """As the annotations call it."""
    path: Path | None
    """None: not found."""
    where: str
    """Start of every message about it."""
    size: tuple[int, int] | None = None
    """(width, height) that the annotations state. None: they state none."""
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    """xyxy, in pixels or, with `RawSet.is_relative`, as fractions of the image."""
    class_ids: list[ClassId] = field(default_factory=list)
    iscrowd: list[bool] = field(default_factory=list)
    areas: list[float | None] = field(default_factory=list)
    is_unreadable: bool = False
    """Nobody can say what is in the image: it is not even a negative. The reader has noted the problem."""

    def add(
        self,
        box_xyxy: tuple[float, float, float, float],
        class_id: ClassId,
        iscrowd: bool = False,
        area: float | None = None,
    ) -> None:
        """Add one annotation."""
        self.boxes.append(box_xyxy)
        self.class_ids.append(class_id)
        self.iscrowd.append(iscrowd)
        self.areas.append(area)


@dataclass(kw_only=True)
class RawSet:
    """A data set in its format's own terms."""

    format: str
    root: Path
    splits: dict[str, list[RawImage]] = field(default_factory=dict)
    classes: dict[str, dict[ClassId, str]] = field(default_factory=dict)
    """Split → id → name, in label order. The first split's list holds; others are joined to it by name."""
    is_relative: bool = False
    """Boxes are fractions of the image."""
    obeys_orientation: bool = False
    """Boxes were drawn on the upright image, whatever the size says (sizeless formats)."""
    looked_in: dict[str, Sequence[Path]] = field(default_factory=dict)
    """Split → folders in which its images were looked for."""
    problems: list[Problem] = field(default_factory=list)

    def problem(self, kind: str, where: str, detail: str = "", split: str = "") -> None:
        """Note a problem."""
        self.problems.append(Problem(kind=kind, where=where, detail=detail, split=split))


def assemble(raw: RawSet, decode: bool = False) -> DetectionSet:
    """Turn a format's terms into records: classes to labels, boxes to pixels, every image looked at.

    Args:
        raw: what the reader gave; its `problems` go first.
        decode: decode every image fully instead of looking at its header and its end.
    """
    problems = list(raw.problems)
    names, ids = _class_list(raw, problems)
    _name_shift(raw, problems)
    label_of_name = {name: label for label, name in enumerate(names)}
    splits = {}
    for split, images in raw.splits.items():
        table = {
            key: label_of_name[name] for key, name in raw.classes[split].items() if name in label_of_name
        }
        assembler = _SplitAssembler(raw, split, table, problems)
        _name_repeated(images, split, problems)
        found = [image.path for image in images if image.path is not None]
        with ThreadPoolExecutor(PROBE_THREADS) as pool:
            probes = dict(
                zip(found, pool.map(partial(probe_image, decode=decode), found, chunksize=64), strict=True)
            )
        records = (
            assembler.record(image, probes.get(image.path) if image.path else None) for image in images
        )
        splits[split] = tuple(record for record in records if record is not None)
    return DetectionSet(
        format=raw.format,
        root=raw.root,
        class_names=names,
        class_ids=ids,
        splits=splits,
        problems=tuple(problems),
    )


@dataclass
class _SplitAssembler:
    raw: RawSet
    split: str
    label_of: Mapping[ClassId, int]
    problems: list[Problem]

    def record(self, image: RawImage, probe: ImageProbe | None) -> ImageRecord | None:
        """The image's record, or None where there is no image to train on."""
        if image.is_unreadable:
            return None
        if image.path is None or probe is None:
            folders = self.raw.looked_in.get(self.split, ())
            places = ", ".join(relative_name(folder, self.raw.root) for folder in folders)
            self._problem("missing-image", image, f"no file '{image.name}' in {places or 'any folder'}")
            self._remark_annotations(image)
            return None
        if probe.fault:
            self._problem("corrupt-image", image, f"'{image.path}': {probe.fault}")
            self._remark_annotations(image)
            return None
        oriented = self.raw.obeys_orientation
        stored = (probe.width, probe.height)
        if image.size is not None:
            # A tag of 2–4 leaves the size as it is, so the size cannot tell; most tools for these formats
            # ignore it.
            oriented = image.size != stored and image.size == probe.upright_size
            if image.size not in (stored, probe.upright_size):
                self._problem(
                    "image-size",
                    image,
                    f"{image.size[0]}×{image.size[1]} in the annotation, {stored[0]}×{stored[1]} in the file",
                )
        width, height = probe.upright_size if oriented else stored
        boxes = box_array(image.boxes)
        if self.raw.is_relative:
            boxes = boxes * np.array([width, height, width, height])
        keep = self._usable(image, boxes)
        boxes = boxes[keep]
        labels = np.array([self.label_of[image.class_ids[i]] for i in keep], np.int64)
        if image.size in (None, (width, height)):
            self._remark_boxes(image, boxes, labels, width, height)
        areas = [image.areas[i] for i in keep]
        own = box_areas(boxes)
        return ImageRecord(
            image_id=image.image_id,
            path=image.path,
            width=width,
            height=height,
            boxes_xyxy=boxes,
            labels=labels,
            iscrowd=np.array([image.iscrowd[i] for i in keep], bool),
            area=np.array([own[i] if area is None else area for i, area in enumerate(areas)], np.float64),
            oriented=oriented,
        )

    def _remark_annotations(self, image: RawImage) -> None:
        """What is wrong with them too: whoever puts the image back should not meet it then."""
        boxes = box_array(image.boxes)
        if self.raw.is_relative and image.size is not None:
            boxes = boxes * np.array([*image.size, *image.size])
        keep = self._usable(image, boxes)
        if image.size is not None:
            labels = np.array([self.label_of[image.class_ids[i]] for i in keep], np.int64)
            self._remark_boxes(image, boxes[keep], labels, *image.size)

    def _usable(self, image: RawImage, boxes: np.ndarray) -> list[int]:
        keep = []
        for i, class_id in enumerate(image.class_ids):
            if class_id not in self.label_of:
                known = _ranges(self.label_of)
                self._problem("class-id", image, f"class {class_id!r} of box {i + 1}; the list has {known}")
            elif not np.isfinite(boxes[i]).all():
                self._problem("malformed", image, f"box {i + 1} is {image.boxes[i]}")
            else:
                keep.append(i)
        return keep

    def _remark_boxes(
        self, image: RawImage, boxes: np.ndarray, labels: np.ndarray, width: int, height: int
    ) -> None:
        if not len(boxes):
            return
        clipped = clip_boxes(boxes, width, height)
        is_empty = (clipped[:, 2:] <= clipped[:, :2]).any(1)
        leaves = np.abs(boxes - clipped).max(1) > OUTSIDE
        for kind, which in (("box-degenerate", is_empty), ("box-outside", leaves & ~is_empty)):
            for i in np.flatnonzero(which):
                corners = ", ".join(f"{value:g}" for value in boxes[i])
                self._problem(kind, image, f"({corners}) in an image of {width}×{height}")
        n_distinct = len(np.unique(np.column_stack([boxes, labels]), axis=0))
        if n_distinct < len(boxes):
            self._problem("box-duplicate", image, f"{len(boxes) - n_distinct} repeated")

    def _problem(self, kind: str, image: RawImage, detail: str) -> None:
        self.problems.append(Problem(kind=kind, where=image.where, detail=detail, split=self.split))


def _class_list(raw: RawSet, problems: list[Problem]) -> tuple[tuple[str, ...], tuple[ClassId, ...]]:
    """Names and ids in label order: those of the first split, among which others must find theirs by name."""
    if not raw.classes:
        return (), ()
    first, *others = raw.classes
    table = raw.classes[first]
    for split, own in raw.classes.items():
        for name, count in Counter(own.values()).items():
            if count > 1:
                ids = [key for key, value in own.items() if value == name]
                problems.append(
                    Problem(kind="class-list", where=split, detail=f"'{name}' has the ids {ids}", split=split)
                )
    names = tuple(dict.fromkeys(table.values()))
    for split in others:
        used = {class_id for image in raw.splits[split] for class_id in image.class_ids}
        for key, name in raw.classes[split].items():
            if name not in names and key in used:
                detail = f"'{name}' is not among the classes of '{first}' ({', '.join(names)})"
                problems.append(Problem(kind="class-list", where=split, detail=detail, split=split))
        if moved := [name for key, name in raw.classes[split].items() if table.get(key, name) != name]:
            detail = f"ids differ from those of '{first}' ({', '.join(moved)}); classes are joined by name"
            problems.append(Problem(kind="class-note", where=split, detail=detail, split=split))
    id_of = {name: key for key, name in reversed(table.items())}
    return names, tuple(id_of[name] for name in names)


def class_shift(raw: RawSet) -> int:
    """What brings all class ids into the class list when added: 1, -1, or 0 where none is needed or helps."""
    used = {split: {key for image in raw.splits[split] for key in image.class_ids} for split in raw.splits}
    known = {split: set(table) for split, table in raw.classes.items()}
    if all(used[split] <= known[split] for split in used):
        return 0
    for shift in (-1, 1):
        # Every split has to fit: one that is right already speaks against a shift.
        moved = {split: {key + shift for key in used[split] if isinstance(key, int)} for split in used}
        if all(len(moved[split]) == len(used[split]) and moved[split] <= known[split] for split in used):
            return shift
    return 0


def _name_shift(raw: RawSet, problems: list[Problem]) -> None:
    if shift := class_shift(raw):
        used = [key for images in raw.splits.values() for image in images for key in image.class_ids]
        ids = [key for key in used if isinstance(key, int)]
        known = _ranges(next(iter(raw.classes.values())))
        detail = f"boxes have {min(ids)}–{max(ids)}, the class list {known}; all fit when {shift:+d} is added"
        problems.append(Problem(kind="class-shift", where="class ids", detail=detail))


def _name_repeated(images: Sequence[RawImage], split: str, problems: list[Problem]) -> None:
    ids = Counter(image.image_id for image in images)
    paths = Counter(image.path for image in images)
    for image in images:
        what = [f"id {image.image_id!r}"] if ids[image.image_id] > 1 else []
        what += [f"file '{image.name}'"] if image.path is not None and paths[image.path] > 1 else []
        if what:
            detail = f"{' and '.join(what)} more than once"
            problems.append(Problem(kind="duplicate-image", where=image.where, detail=detail, split=split))


def split_of(name: str) -> str | None:
    """The split that a file's or folder's name speaks of: "instances_val2017" → "val"."""
    for word in re.findall("[a-z]+", name.lower()):
        for split, words in SPLITS.items():
            if word in words:
                return split
    return None


def split_of_folder(name: str) -> str | None:
    """The split of a folder that is called like one and nothing else: "valid", "train2017"."""
    return split_of(name) if re.fullmatch(r"[a-zA-Z]+[\d_-]*", name) else None


def ordered(splits: Iterable[str]) -> list[str]:
    """Splits in their usual order: the first one's class list holds for all."""
    return sorted(splits, key=[*SPLITS].index)


def existing(folders: Iterable[Path]) -> list[Path]:
    """The folders that are there, each once."""
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def relative_name(path: Path, root: Path) -> str:
    """A path as a reader of messages wants it: from the data set's folder, where it lies in there."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def list_images(folder: Path) -> list[Path]:
    """The image files under a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if is_image(path))


def find_image(name: str, folders: list[Path]) -> Path | None:
    """The first file of that name in the folders; other machines' paths are tried by their last part too."""
    for candidate in dict.fromkeys((name, PureWindowsPath(name).name)):
        for folder in folders:
            path = folder / candidate
            if path.is_file():
                return path
    return None


def _ranges(ids: Iterable[ClassId]) -> str:
    """Ids in a few words: "0–79", or a list of names."""
    known = list(ids)
    numbers = [key for key in known if isinstance(key, int)]
    if len(numbers) == len(known) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, known)) or "none"
