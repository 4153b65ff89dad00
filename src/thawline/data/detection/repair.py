"""Write a repaired copy of a detection dataset, as COCO JSON; the original is only read.

    NEW/annotations/instances_SPLIT.json   NEW/images/…   NEW/changes.txt

`records.PROBLEM_KINDS` says what is done about each kind of problem. The copy is read back: it either loads
without an error, or the reason is raised.
"""

from __future__ import annotations

__all__ = ["write_repaired"]

import dataclasses
import shutil
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thawline.data.detection.check import DataCheck, place_of
from thawline.data.detection.dataset import load_detection
from thawline.data.detection.drawing import save_image
from thawline.data.detection.formats.assemble import assemble, class_shift, in_fractions
from thawline.data.detection.formats.raw import RawBox, RawImage, RawSet
from thawline.data.detection.formats.values import to_id
from thawline.data.detection.images import probe_image, read_image
from thawline.data.detection.records import (
    PROBLEM_KINDS,
    DetectionSet,
    ImageRecord,
    clip_boxes,
    describe,
    has_area,
)
from thawline.errors import DataError
from thawline.files import write_json, write_text

SAME_SHAPE = 0.01
"""Maximum relative difference in aspect ratio at which an image counts as a rescaled version."""


def write_repaired(check: DataCheck, folder: str | Path) -> DetectionSet:
    """Write a copy of a dataset without the problems found in it.

    Args:
        check: result of checking the original.
        folder: where the copy goes; must be new or empty, and outside the original.
    Returns: the copy, read back.
    Raises: DataError: if the folder is in use or inside the original, the class list is contradictory, or
        nothing is left.
    """
    folder = Path(folder)
    _check_target(folder, check.data.root)
    if unclear := [problem for problem in check.problems if problem.kind == "class-list"]:
        lines = "\n".join(describe(unclear))
        raise DataError(
            f"'{check.data.root}' cannot be repaired: only its owner knows which class is meant.\n{lines}"
        )
    in_units = {(problem.split, problem.where) for problem in check.problems if problem.kind == "box-units"}
    data = assemble(_repaired_annotations(check.raw, in_units), decode=True)
    if not any(data.splits.values()):
        raise DataError(f"'{check.data.root}' cannot be repaired: no image is left for a copy.")
    leaked = {problem.where for problem in check.problems if problem.kind == "leak"}
    names: Counter[str] = Counter()
    for split, records in data.splits.items():
        kept = [record for record in records if place_of(check.data, split, record) not in leaked]
        content = _coco_content(kept, data, folder / "images", names)
        write_json(folder / "annotations" / f"instances_{split}.json", content, indent=None)
    write_text(folder / "changes.txt", "\n".join(_changes(check)) + "\n")
    return load_detection(folder, format="coco")


def _check_target(folder: Path, original: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"'{folder}' is in use. Give a new or empty folder for the repaired copy.")
    if folder.resolve().is_relative_to(original.resolve()):
        raise DataError(
            f"'{folder}' is inside the dataset '{original}', which is never changed. Give another folder."
        )


def _repaired_annotations(raw: RawSet, in_units: Container[tuple[str, str]]) -> RawSet:
    """Shift class ids, rescale boxes and merge the entries of one file; leave out what cannot be used.

    Boxes that are fractions of the images whose (split, place) is in `in_units` are multiplied by their size.
    """
    shift = class_shift(raw)
    splits = {}
    for split, images in raw.splits.items():
        n_ids = Counter(to_id(image.image_id) for image in images)
        n_paths = Counter(image.path for image in images)
        by_path: dict[Path, RawImage] = {}
        for image in images:
            # The boxes of an id that two files share could belong to either.
            has_own_id = (
                n_ids[to_id(image.image_id)] == 1 or n_paths[image.path] == n_ids[to_id(image.image_id)]
            )
            if image.path is None or image.is_unusable or not has_own_id:
                continue
            boxes = [
                box._replace(class_id=box.class_id + shift) if isinstance(box.class_id, int) else box
                for box in image.boxes
            ]
            if (split, image.where) in in_units:
                boxes = _in_pixels(image.path, dataclasses.replace(image, boxes=boxes))
            if (rescaled := _rescale(image.path, dataclasses.replace(image, boxes=boxes))) is None:
                continue
            first = by_path.setdefault(image.path, rescaled)
            if first is not rescaled:
                first.boxes.extend(rescaled.boxes)
        splits[split] = list(by_path.values())
    return dataclasses.replace(raw, splits=splits, problems=[])


def _in_pixels(path: Path, image: RawImage) -> list[RawBox]:
    probe = probe_image(path)
    size = image.size or (probe.width, probe.height)
    fractions = in_fractions(image)
    return [_scale_box(box, *size) if box in fractions else box for box in image.boxes]


def _rescale(path: Path, image: RawImage) -> RawImage | None:
    """Scale boxes to the file's pixels; None if file and annotation are different images."""
    probe = probe_image(path)
    sizes = (probe.width, probe.height), probe.upright_size
    if probe.fault or image.size is None or image.size in sizes:
        return image
    for size in sizes:
        scale_x, scale_y = size[0] / image.size[0], size[1] / image.size[1]
        if abs(scale_x / scale_y - 1) <= SAME_SHAPE:
            boxes = [_scale_box(box, scale_x, scale_y) for box in image.boxes]
            return dataclasses.replace(image, boxes=boxes, size=size)
    return None


def _scale_box(box: RawBox, scale_x: float, scale_y: float) -> RawBox:
    x1, y1, x2, y2 = box.xyxy
    area = None if box.area is None else box.area * scale_x * scale_y
    return box._replace(xyxy=(x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y), area=area)


def _coco_content(
    records: Sequence[ImageRecord], data: DetectionSet, images: Path, names: Counter[str]
) -> dict[str, Any]:
    """Return a split as the content of a COCO JSON, and copy its images."""
    has_int_classes = all(isinstance(key, int) for key in data.class_ids)
    class_ids = data.class_ids if has_int_classes else range(len(data.class_names))
    has_int_ids = all(isinstance(record.image_id, int) for record in records)
    image_entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, record in enumerate(records):
        image_id = record.image_id if has_int_ids else i
        name = _copy_image(record, images, names)
        image_entries.append(
            {"id": image_id, "file_name": name, "width": record.width, "height": record.height}
        )
        boxes = clip_boxes(record.boxes_xyxy, record.width, record.height)
        _, first = np.unique(np.column_stack([record.boxes_xyxy, record.labels]), axis=0, return_index=True)
        for j in sorted(set(first.tolist()) & set(np.flatnonzero(has_area(boxes)).tolist())):
            x1, y1, x2, y2 = boxes[j].tolist()
            is_clipped = not np.array_equal(boxes[j], record.boxes_xyxy[j])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": class_ids[record.labels[j]],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1) if is_clipped else float(record.area[j]),
                    "iscrowd": int(record.iscrowd[j]),
                }
            )
    return {
        "info": {"description": f"repaired copy of {data.root}"},
        "images": image_entries,
        "annotations": annotations,
        "categories": [
            {"id": key, "name": name} for key, name in zip(class_ids, data.class_names, strict=True)
        ],
    }


def _copy_image(record: ImageRecord, images: Path, names: Counter[str]) -> str:
    """Copy an image and return its new name; a name that is taken (from another folder) gets a number."""
    images.mkdir(parents=True, exist_ok=True)
    name = record.path.name
    names[name] += 1
    if names[name] > 1:
        name = f"{record.path.stem}_{names[name]}{record.path.suffix}"
        names[name] += 1
    if record.oriented and 2 <= probe_image(record.path).orientation <= 4:
        # In COCO only the size can say that EXIF orientation applies, and these orientations keep the size.
        name = f"{Path(name).stem}_upright.png"
        save_image(images / name, read_image(record.path))
    else:
        shutil.copyfile(record.path, images / name)
    return name


def _changes(check: DataCheck) -> list[str]:
    lines = [f"Repaired copy of {check.data.root} ({check.data.format}). Problems found, and what was done:"]
    for kind in PROBLEM_KINDS:
        if found := [problem for problem in check.problems if problem.kind == kind]:
            lines += ["", *describe(found, shown=len(found)), f"  → {PROBLEM_KINDS[kind].fix or 'unchanged'}"]
    return lines
