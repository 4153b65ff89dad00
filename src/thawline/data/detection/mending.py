"""Write a mended copy of a detection data set, as COCO JSON; the original is only read.

    NEW/annotations/instances_SPLIT.json   NEW/images/…   NEW/changes.txt

What is done to each kind of problem stands in `records.KINDS`. The copy is read back before
it is handed over: it either loads without an error, or the reason is raised.
"""

from __future__ import annotations

__all__ = ["write_mended"]

import copy
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thawline.data.detection.check import DataCheck, place_of
from thawline.data.detection.dataset import load_detection
from thawline.data.detection.drawing import save_picture
from thawline.data.detection.formats.raw import RawImage, RawSet, assemble, class_shift
from thawline.data.detection.images import probe_image, read_image
from thawline.data.detection.records import KINDS, DetectionSet, ImageRecord, clip_boxes, describe
from thawline.errors import DataError

SAME_SHAPE = 0.01
"""Width ÷ height of an image may differ by this much from the annotation's, and count as rescaled."""


def write_mended(check: DataCheck, folder: str | Path) -> DetectionSet:
    """Write the data set without what `check` found wrong with it.

    Args:
        check: of the original.
        folder: where the copy goes; must be new or empty, and outside the original.
    Returns: the copy, read back. Raises: DataError: if the folder is in use or inside the original, the
    class list is contradictory, or nothing
        is left.
    """
    folder = Path(folder)
    _refuse_used(folder, check.data.root)
    if unclear := [problem for problem in check.problems if problem.kind == "class-list"]:
        lines = "\n".join(describe(unclear))
        raise DataError(
            f"'{check.data.root}' cannot be mended: only its owner knows which class is meant.\n{lines}"
        )
    raw = _mended_raw(check.raw)
    mended = assemble(raw, decode=True)
    if not any(mended.splits.values()):
        raise DataError(f"Nothing of '{check.data.root}' can be used: no image is left for a mended copy.")
    leaked = {problem.where for problem in check.problems if problem.kind == "leak"}
    taken: Counter[str] = Counter()
    for split, records in mended.splits.items():
        kept = [record for record in records if place_of(check.data, split, record) not in leaked]
        content = _coco_content(kept, mended, folder / "images", taken)
        target = folder / "annotations" / f"instances_{split}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content), encoding="utf-8")
    (folder / "changes.txt").write_text("\n".join(_changes(check)) + "\n", encoding="utf-8")
    return load_detection(folder, format="coco")


def _refuse_used(folder: Path, original: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"'{folder}' is in use. Give a new or empty folder for the mended copy.")
    if folder.resolve().is_relative_to(original.resolve()):
        raise DataError(
            f"'{folder}' lies inside the data set '{original}', which is not touched. "
            "Give a folder elsewhere."
        )


def _mended_raw(raw: RawSet) -> RawSet:
    """The annotations with ids shifted, boxes rescaled, and entries of one file joined."""
    shift = class_shift(raw)
    splits = {}
    for split, images in raw.splits.items():
        ids = Counter(image.image_id for image in images)
        by_path: dict[Path, RawImage] = {}
        n_paths = Counter(image.path for image in images)
        for original in images:
            # An id of two files: whose boxes are they?
            has_own_id = ids[original.image_id] == 1 or n_paths[original.path] == ids[original.image_id]
            if original.path is None or original.is_unreadable or not has_own_id:
                continue
            image = copy.deepcopy(original)
            image.class_ids = [key + shift if isinstance(key, int) else key for key in image.class_ids]
            if not _rescale(image):
                continue
            first = by_path.setdefault(original.path, image)
            if first is not image:
                for field in ("boxes", "class_ids", "iscrowd", "areas"):
                    getattr(first, field).extend(getattr(image, field))
        splits[split] = list(by_path.values())
    return dataclasses.replace(raw, splits=splits, problems=[])


def _rescale(image: RawImage) -> bool:
    """Bring boxes into the file's pixels. Returns: False where annotation and file are different pictures."""
    assert image.path is not None
    probe = probe_image(image.path)
    stored = (probe.width, probe.height)
    if probe.fault or image.size is None or image.size in (stored, probe.upright_size):
        return True
    for target in (stored, probe.upright_size):
        scale_x, scale_y = target[0] / image.size[0], target[1] / image.size[1]
        if abs(scale_x / scale_y - 1) <= SAME_SHAPE:
            image.boxes = [
                (x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y) for x1, y1, x2, y2 in image.boxes
            ]
            image.areas = [None if area is None else area * scale_x * scale_y for area in image.areas]
            image.size = target
            return True
    return False


def _coco_content(
    records: Sequence[ImageRecord], data: DetectionSet, images: Path, taken: Counter[str]
) -> dict[str, Any]:
    """A split as COCO's JSON holds it; its images are copied on the way."""
    class_ids = list(data.class_ids) if all(isinstance(key, int) for key in data.class_ids) else None
    content: dict[str, Any] = {
        "info": {"description": f"mended copy of {data.root}"},
        "images": [],
        "annotations": [],
        "categories": [
            {"id": class_ids[label] if class_ids else label, "name": name}
            for label, name in enumerate(data.class_names)
        ],
    }
    ids = [record.image_id for record in records]
    keeps_ids = all(isinstance(key, int) for key in ids)
    for i, record in enumerate(records):
        image_id = record.image_id if keeps_ids else i
        content["images"].append(
            {
                "id": image_id,
                "file_name": _copy_image(record, images, taken),
                "width": record.width,
                "height": record.height,
            }
        )
        boxes = clip_boxes(record.boxes_xyxy, record.width, record.height)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        _, first = np.unique(np.column_stack([record.boxes_xyxy, record.labels]), axis=0, return_index=True)
        for j in sorted(set(first.tolist()) & set(np.flatnonzero(has_area).tolist())):
            x1, y1, x2, y2 = boxes[j].tolist()
            is_clipped = not np.array_equal(boxes[j], record.boxes_xyxy[j])
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": content["categories"][record.labels[j]]["id"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1) if is_clipped else float(record.area[j]),
                    "iscrowd": int(record.iscrowd[j]),
                }
            )
    return content


def _copy_image(record: ImageRecord, images: Path, taken: Counter[str]) -> str:
    """Copy an image; names that were in different folders are told apart. Returns: the name of the copy."""
    images.mkdir(parents=True, exist_ok=True)
    name = record.path.name
    taken[name] += 1
    if taken[name] > 1:
        name = f"{record.path.stem}_{taken[name]}{record.path.suffix}"
        taken[name] += 1
    if record.oriented and 2 <= probe_image(record.path).orientation <= 4:
        # In COCO only the size can say that the camera's tag is meant, and these tags leave it as it is.
        name = f"{Path(name).stem}_upright.png"
        save_picture(images / name, read_image(record.path))
    else:
        shutil.copyfile(record.path, images / name)
    return name


def _changes(check: DataCheck) -> list[str]:
    lines = [f"Mended copy of {check.data.root} ({check.data.format}). What was found, and done:"]
    for kind in KINDS:
        found = [problem for problem in check.problems if problem.kind == kind]
        if found:
            done = KINDS[kind].mending or "left as it is"
            lines += ["", *describe(found, shown=len(found)), f"  → {done}"]
    return lines
