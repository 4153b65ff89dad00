"""COCO JSON, and Roboflow's way of laying it out.

Found: `*.json` in the folder, in its `annotations/`, or one folder down (Roboflow:
`train/_annotations.coco.json`). The split is in the file's or its folder's name; a lone file of no split is
training data. Where the folder has `instances_*` files, captions, keypoints and the like beside them are
not looked at. Ids may be any numbers, sparse, from 0 or 1: labels follow the sorted category ids of the
file.
"""

from __future__ import annotations

__all__ = ["HINT", "look", "read"]

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from thawline.data.detection.formats.raw import (
    Found,
    RawImage,
    RawSet,
    existing,
    find_image,
    ordered,
    split_of,
    split_of_folder,
)
from thawline.data.detection.records import Problem
from thawline.errors import DataError

HINT = "JSON with `images`, `annotations` and `categories`, in the folder, annotations/ or a split's folder"


def look(path: Path) -> list[Found]:
    """The COCO data sets at a path: a JSON file, or a folder."""
    if path.is_file():
        split = split_of(path.stem) or split_of_folder(path.parent.name) or "train"
        return [_found(path.parent, {split: [path]})] if _is_coco(path) else []
    files = [file for file in [*path.glob("*.json"), *path.glob("*/*.json")] if _is_coco(file)]
    instances = [file for file in files if file.name.startswith("instances")]
    by_split: defaultdict[str, list[Path]] = defaultdict(list)
    for file in sorted(instances or files):
        word = split_of(file.stem) or (split_of_folder(file.parent.name) if file.parent != path else None)
        by_split[word or ""].append(file)
    rest = by_split.pop("", [])
    # A file of no split beside files of one ("all.json") would have its images counted twice.
    if by_split:
        return [_found(path, by_split)]
    return [_found(path, {"train": rest}, is_split=False)] if rest else []


def read(found: Found, images: Path | None = None) -> RawSet:
    """Read what `look` found.

    Args:
        found: files by split.
        images: the folder that `file_name` starts from. None: looked for around the annotation file.
    Raises: DataError: if a file is no COCO JSON, or a split has several.
    """
    raw = RawSet(format="coco", root=found.root)
    tables: dict[str, list[dict[str, Any]]] = {}
    for split in ordered(found.splits):
        files = found.splits[split]
        if len(files) > 1:
            listed = ", ".join(str(file.relative_to(found.root)) for file in files)
            raise DataError(
                f"'{found.root}' has several COCO files for '{split}': {listed}. Give one of them as the "
                "path, or move the others away."
            )
        content = _load(files[0])
        folders = [images] if images is not None else _image_folders(found.root, files[0], split)
        raw.looked_in[split] = folders
        raw.splits[split] = _images(content, files[0], split, folders, raw.problems)
        tables[split] = content["categories"]
    for split, table in _without_unused_roots(tables, raw).items():
        raw.classes[split] = {
            entry["id"]: str(entry["name"])
            for entry in sorted(table, key=lambda e: (isinstance(e["id"], str), e["id"]))
        }
        if len(raw.classes[split]) < len(table):
            raw.problem("class-list", found.splits[split][0].name, "two categories share an id", split)
    return raw


def _found(root: Path, files: dict[str, list[Path]], is_split: bool = True) -> Found:
    splits = {split: tuple(files[split]) for split in ordered(files)}
    return Found(format="coco", root=root, splits=splits, is_split=is_split)


def _is_coco(path: Path) -> bool:
    text = path.read_bytes()
    return all(key in text for key in (b'"images"', b'"annotations"', b'"categories"'))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"'{path}' is not JSON: {error}.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"'{path}' is not a COCO file: expected a list under '{key}'.")
    for key, needed in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        for i, entry in enumerate(content[key]):
            if not isinstance(entry, dict) or any(name not in entry for name in needed):
                raise DataError(
                    f"'{path}': entry {i} of '{key}' must have {' and '.join(needed)}, got {entry}."
                )
    return content


def _images(
    content: dict[str, Any], file: Path, split: str, folders: list[Path], problems: list[Problem]
) -> list[RawImage]:
    by_id: dict[Any, RawImage] = {}
    images = []
    for entry in content["images"]:
        has_size = entry.get("width") and entry.get("height")
        image = RawImage(
            image_id=entry["id"],
            name=str(entry["file_name"]),
            path=find_image(str(entry["file_name"]), folders),
            where=f"{file.name}: {entry['file_name']}",
            size=(int(entry["width"]), int(entry["height"])) if has_size else None,
        )
        images.append(image)
        by_id.setdefault(image.image_id, image)
    for i, entry in enumerate(content["annotations"]):
        where = f"{file.name}: annotation {entry.get('id', f'number {i}')}"
        image_id = entry.get("image_id")
        if image_id not in by_id:
            problems.append(
                Problem(kind="unknown-image", where=where, detail=f"image_id {image_id!r}", split=split)
            )
        elif (box := _box(entry.get("bbox"))) is None:
            detail = f"bbox must be [x, y, width, height], got {entry.get('bbox')!r}"
            problems.append(Problem(kind="malformed", where=where, detail=detail, split=split))
        else:
            area = entry.get("area")
            by_id[image_id].add(
                box,
                entry.get("category_id"),
                iscrowd=bool(entry.get("iscrowd", 0)),
                area=None if area is None else float(area),
            )
    return images


def _box(bbox: object) -> tuple[float, float, float, float] | None:
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    try:
        x, y, w, h = map(float, bbox)
    except (TypeError, ValueError):
        return None
    return x, y, x + w, y + h


def _image_folders(root: Path, file: Path, split: str) -> list[Path]:
    """Where `file_name` may start from: train2017/ for instances_train2017.json, then images/ and others."""
    top = file.parent.parent if file.parent.name == "annotations" else file.parent
    tops = list(dict.fromkeys((file.parent, top, root)))
    words = (file.stem.removeprefix("instances_"), split)
    named = [base / inner / word for base in tops for inner in ("", "images") for word in words]
    return existing([*named, *(base / inner for base in tops for inner in ("images", "data", ""))])


def _without_unused_roots(
    tables: dict[str, list[dict[str, Any]]], raw: RawSet
) -> dict[str, list[dict[str, Any]]]:
    """Drop the root that Roboflow puts before the real categories: their supercategory, without boxes."""
    used = {class_id for images in raw.splits.values() for image in images for class_id in image.class_ids}
    kept = {}
    for split, table in tables.items():
        parents = {entry.get("supercategory") for entry in table}
        kept[split] = [
            entry
            for entry in table
            if not (
                len(table) > 1
                and entry["id"] not in used
                and entry.get("supercategory") == "none"
                and (entry["name"] in parents or [e["name"] for e in table].count(entry["name"]) > 1)
            )
        ]
        if len(kept[split]) < len(table):
            gone = next(entry["name"] for entry in table if entry not in kept[split])
            detail = f"'{gone}', the root of the other categories without a box of its own, is not a class"
            raw.problem("class-note", split, detail, split)
    return kept
