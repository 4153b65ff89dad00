"""From raw annotations to records: class ids to labels, boxes to pixels, every image looked at.

The one place where ids are mapped. Classes of different splits are matched by *name*, and everything wrong is
collected instead of raised.
"""

from __future__ import annotations

__all__ = ["assemble", "class_shift", "in_fractions"]

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np

from thawline.data.detection.formats.places import files_in, hidden_images, is_url, relative_name
from thawline.data.detection.formats.raw import ClassId, RawBox, RawImage, RawSet, listed
from thawline.data.detection.formats.values import to_id
from thawline.data.detection.images import IMAGE_SUFFIXES, LOW_RANGE, ImageProbe, probe_image
from thawline.data.detection.records import (
    DetectionSet,
    ImageRecord,
    box_areas,
    box_array,
    clip_boxes,
    has_area,
    n_learnable,
)

PROBE_THREADS = 8
OUTSIDE = 1.0
"""Pixels by which a box may silently leave its image: rounding, and files that count pixels from 1."""


def assemble(raw: RawSet, decode: bool = False) -> DetectionSet:
    """Convert raw annotations to records.

    Args:
        raw: as returned by a reader; its `problems` come first.
        decode: decode every image fully instead of looking at its header and its end.
    """

    def probe(image: RawImage) -> ImageProbe | None:
        return None if image.path is None else probe_image(image.path, decode)

    raw = dataclasses.replace(raw, problems=list(raw.problems))
    names, ids = _class_list(raw)
    _check_shift(raw)
    _check_units(raw)
    _check_corners(raw)
    _check_shared(raw)
    _check_unused(raw)
    splits = {}
    for split, images in raw.splits.items():
        label_of = {key: names.index(name) for key, name in raw.classes[split].items() if name in names}
        _check_repeated(raw, split)
        with ThreadPoolExecutor(PROBE_THREADS) as pool:
            probes = list(pool.map(probe, images))
        records = (_record(raw, split, *pair, label_of) for pair in zip(images, probes, strict=True))
        splits[split] = tuple(record for record in records if record is not None)
        is_usable = splits[split] or not images  # else images are named that cannot be used
        if split == "train" and is_usable and not any(map(n_learnable, splits[split])):
            raw.add_problem("no-boxes", split, f"{len(splits[split])} images", split)
    return DetectionSet(
        format=raw.format,
        root=raw.root,
        class_names=names,
        class_ids=ids,
        splits=splits,
        problems=tuple(raw.problems),
    )


def class_shift(raw: RawSet) -> int:
    """Return the number that makes all class ids fit the class list when added: 1, -1, or 0 if none does."""
    used = {split: raw.used_ids(split) for split in raw.splits}
    known = {split: set(table) for split, table in raw.classes.items()}
    if all(used[split] <= known[split] for split in used):
        return 0
    for shift in (-1, 1):
        # Every split has to fit: one that is right already speaks against a shift.
        moved = {split: {key + shift for key in used[split] if isinstance(key, int)} for split in used}
        if all(len(moved[split]) == len(used[split]) and moved[split] <= known[split] for split in used):
            return shift
    return 0


def _record(
    raw: RawSet, split: str, image: RawImage, probe: ImageProbe | None, label_of: Mapping[ClassId, int]
) -> ImageRecord | None:
    """Convert one image; None if it cannot be used.

    Boxes of unusable images are checked too, so that all faults are reported at once.
    """
    if image.is_unusable:
        return None
    size, oriented = _image_size(raw, split, image, probe)
    boxes = box_array([box.xyxy for box in image.boxes])
    if raw.is_relative and size is not None:
        boxes = boxes * np.array([*size, *size])
    keep = _usable_boxes(raw, split, image, boxes, label_of)
    boxes, kept = boxes[keep], [image.boxes[i] for i in keep]
    labels = np.array([label_of[box.class_id] for box in kept], np.int64)
    if size is not None and image.size in (None, size):
        _check_boxes(raw, split, image.where, boxes, labels, size)
    if size is None or image.path is None or probe is None or probe.fault:
        return None
    areas = [own if box.area is None else box.area for own, box in zip(box_areas(boxes), kept, strict=True)]
    return ImageRecord(
        image_id=image.image_id,
        path=image.path,
        width=size[0],
        height=size[1],
        boxes_xyxy=boxes,
        labels=labels,
        iscrowd=np.array([box.iscrowd for box in kept], bool),
        area=np.array(areas, np.float64),
        oriented=oriented,
    )


def _image_size(
    raw: RawSet, split: str, image: RawImage, probe: ImageProbe | None
) -> tuple[tuple[int, int] | None, bool]:
    """Return (width, height) that the boxes refer to, and whether EXIF orientation applies.

    Reports missing and corrupt images, for which the annotated size, if any, is all that is known.
    """
    size, oriented = image.size, raw.applies_orientation
    if probe is None:
        folders = ", ".join(relative_name(folder, raw.root) for folder in raw.searched.get(split, ()))
        detail = f"no file '{image.name}' in {folders or 'any folder'}"
        detail += "; download the images first" if is_url(image.name) else ""
        raw.add_problem("missing-image", image.where, detail, split)
    elif probe.fault:
        raw.add_problem("corrupt-image", image.where, f"'{image.path}': {probe.fault}", split)
    else:
        if probe.is_low_range:
            raw.add_problem("low-range", image.where, f"'{image.path}': no value above {LOW_RANGE}", split)
        if probe.has_frames:
            raw.add_problem("frames", image.where, f"'{image.path}'", split)
        stored = (probe.width, probe.height)
        oriented = oriented and probe.orientation != 1
        if size is not None:
            # EXIF orientations 2–4 keep the size, so it cannot tell; most tools of these formats ignore them.
            oriented = size != stored and size == probe.upright_size
            if size not in (stored, probe.upright_size):
                detail = f"{size[0]}×{size[1]} in the annotation, {stored[0]}×{stored[1]} in the file"
                raw.add_problem("image-size", image.where, detail, split)
        size = probe.upright_size if oriented else stored
    return size, oriented


def _usable_boxes(
    raw: RawSet, split: str, image: RawImage, boxes: np.ndarray, label_of: Mapping[ClassId, int]
) -> list[int]:
    """Return the indices of boxes with a known class and finite corners; report the others."""
    keep = []
    for i, box in enumerate(image.boxes):
        if box.class_id not in label_of:
            detail = f"class {box.class_id!r} of box {i + 1}; the list has {_ranges(label_of)}"
            raw.add_problem("class-id", image.where, detail, split)
        elif not np.isfinite(boxes[i]).all():
            raw.add_problem("malformed", image.where, f"box {i + 1} is {box.xyxy}", split)
        else:
            keep.append(i)
    return keep


def _check_boxes(
    raw: RawSet, split: str, where: str, boxes: np.ndarray, labels: np.ndarray, size: tuple[int, int]
) -> None:
    clipped = clip_boxes(boxes, *size)
    is_empty = ~has_area(clipped)
    is_outside = (np.abs(boxes - clipped) > OUTSIDE).any(1) & ~is_empty
    for kind, which in (("box-degenerate", is_empty), ("box-outside", is_outside)):
        for box in boxes[which]:
            corners = ", ".join(f"{value:g}" for value in box)
            raw.add_problem(kind, where, f"({corners}) in an image of {size[0]}×{size[1]}", split)
    if n_repeated := len(boxes) - len(np.unique(np.column_stack([boxes, labels]), axis=0)):
        raw.add_problem("box-duplicate", where, f"{n_repeated} repeated", split)


def _check_repeated(raw: RawSet, split: str) -> None:
    ids = Counter(to_id(image.image_id) for image in raw.splits[split])
    paths = Counter(image.path for image in raw.splits[split])
    for image in raw.splits[split]:
        repeated = [f"id {image.image_id!r}"] if ids[to_id(image.image_id)] > 1 else []
        repeated += [f"file '{image.name}'"] if image.path is not None and paths[image.path] > 1 else []
        if repeated:
            detail = f"{' and '.join(repeated)} more than once"
            raw.add_problem("duplicate-image", image.where, detail, split)


def in_fractions(image: RawImage) -> list[RawBox]:
    """Return the boxes of an image whose corners are all in 0–1, less than a pixel apart."""
    return [
        box
        for box in image.boxes
        if all(0 <= value <= 1 for value in box.xyxy)
        and box.xyxy[0] < box.xyxy[2]
        and box.xyxy[1] < box.xyxy[3]
    ]


def _check_units(raw: RawSet) -> None:
    """Report boxes in fractions of the image in a format of pixels: an error if they are half or more."""
    for split, images in raw.splits.items() if not raw.is_relative else ():
        found = [(image, boxes) for image in images if (boxes := in_fractions(image))]
        is_unit = 2 * sum(len(boxes) for _, boxes in found) >= sum(len(image.boxes) for image in images)
        for image, boxes in found:
            corners = ", ".join(f"{value:g}" for value in boxes[0].xyxy)
            detail = f"{len(boxes)} of {len(image.boxes)} boxes, e.g. ({corners})"
            raw.add_problem("box-units" if is_unit else "box-tiny", image.where, detail, split)


def _check_corners(raw: RawSet) -> None:
    """Report splits of COCO or YOLO whose boxes are two corners each, where a corner or center has a size.

    Read as the format says, a quarter of such boxes or more leave their image, and all are boxes as corners.
    """
    for split, images in raw.splits.items() if raw.format != "voc" else ():
        found, sizes = [], []
        for image in images:
            if size := (1, 1) if raw.is_relative else image.size:
                found += [box.xyxy for box in image.boxes]
                sizes += [size * 2] * len(image.boxes)
        boxes, sides = box_array(found), box_array(sizes)
        x1, y1, x2, y2 = boxes.T
        first = ((x1 + x2) / 2, (y1 + y2) / 2) if raw.is_relative else (x1, y1)
        corners = np.column_stack([*first, x2 - x1, y2 - y1])
        are_corners = ((corners >= 0) & (corners <= sides)).all() and has_area(corners).all()
        n_outside = (np.abs(np.clip(boxes, 0, sides) - boxes) > 0.02 * sides).any(1).sum()
        if len(boxes) and are_corners and 4 * n_outside >= len(boxes):
            detail = f"{n_outside} of {len(boxes)} boxes leave their image; as x1 y1 x2 y2 all are inside"
            raw.add_problem("box-corners", split, detail, split)


def _check_shared(raw: RawSet) -> None:
    """Report images that two splits name; the later split is the held-out one."""
    for first, second in combinations(raw.splits, 2):
        held_out = {image.path for image in raw.splits[second] if image.path is not None}
        for image in raw.splits[first]:
            if image.path in held_out and image.path is not None:
                name = relative_name(image.path, raw.root)
                raw.add_problem("leak", f"{first}: {name}", f"{second}: {name}", first)


def _check_unused(raw: RawSet) -> None:
    """Report images that no annotation names, and those in hidden folders, beside the annotated ones."""
    used: defaultdict[Path, set[str]] = defaultdict(set)
    for path in (image.path for images in raw.splits.values() for image in images):
        if path is not None:
            used[path.parent].add(path.name)
    for folder, names in sorted(used.items()):
        unused = [path.name for path in files_in(folder, *IMAGE_SUFFIXES) if path.name not in names]
        hidden = [relative_name(path, folder) for path in hidden_images(folder)]
        for kind, files, what in (("unused-image", unused, "images"), ("left-out", hidden, "hidden images")):
            if files:
                detail = f"{len(files)} {what} ({listed(files)})"
                raw.add_problem(kind, relative_name(folder, raw.root), detail)


def _check_shift(raw: RawSet) -> None:
    if shift := class_shift(raw):
        ids = [key for split in raw.splits for key in raw.used_ids(split) if isinstance(key, int)]
        known = _ranges(next(iter(raw.classes.values())))
        detail = f"boxes have {min(ids)}–{max(ids)}, the class list {known}; all fit when {shift:+d} is added"
        raw.add_problem("class-shift", "class ids", detail)


def _class_list(raw: RawSet) -> tuple[tuple[str, ...], tuple[ClassId, ...]]:
    """Return names and ids in label order: those of the first split, which the others' must be among."""
    if not raw.classes:
        return (), ()
    for split, own in raw.classes.items():
        for name, count in Counter(own.values()).items():
            if count > 1:
                ids = [key for key, value in own.items() if value == name]
                raw.add_problem("class-list", split, f"'{name}' has the ids {ids}", split)
    first, *others = raw.classes
    table = raw.classes[first]
    id_of = {name: key for key, name in reversed(table.items())}
    names = tuple(dict.fromkeys(table.values()))
    for split in others:
        used = raw.used_ids(split)
        for key, name in raw.classes[split].items():
            if name not in names and key in used:
                detail = f"'{name}' is not among the classes of '{first}' ({', '.join(names)})"
                raw.add_problem("class-list", split, detail, split)
        if moved := [name for key, name in raw.classes[split].items() if table.get(key, name) != name]:
            detail = f"ids differ from those of '{first}' ({', '.join(moved)}); classes are matched by name"
            raw.add_problem("class-note", split, detail, split)
    return names, tuple(id_of[name] for name in names)


def _ranges(ids: Iterable[ClassId]) -> str:
    """Write ids briefly: "0–79", or a list of names."""
    known = list(ids)
    numbers = [key for key in known if isinstance(key, int)]
    if len(numbers) == len(known) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, known)) or "none"
