"""COCO JSON, in COCO's and in Roboflow's layout.

Found: `*.json` in the folder, in its `annotations/`, or one folder down (Roboflow:
`train/_annotations.coco.json`). The split is in the file's or its folder's name; a single file without a
split is training data. If there are `instances_*` files, others (captions, keypoints) are ignored. Ids may
be any numbers, sparse, from 0 or 1: labels follow the sorted category ids of the file.
"""

from __future__ import annotations

__all__ = ["HINT", "look", "read"]

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from thawline.data.detection.formats.raw import (
    Box,
    Found,
    RawBox,
    RawImage,
    RawSet,
    existing,
    find_image,
    ordered,
    split_of,
    split_of_folder,
)
from thawline.errors import DataError

HINT = "JSON with `images`, `annotations` and `categories`, in the folder, annotations/ or a split's folder"


def look(path: Path) -> list[Found]:
    """Return the COCO datasets at a path: a JSON file, or a folder."""
    candidates = [path] if path.is_file() else [*path.glob("*.json"), *path.glob("*/*.json")]
    files = sorted(file for file in candidates if _is_coco(file))
    instances = [file for file in files if file.name.startswith("instances")]
    root = path.parent if path.is_file() else path
    by_split: defaultdict[str, list[Path]] = defaultdict(list)
    for file in instances or files:
        folder = None if file.parent == path else split_of_folder(file.parent.name)
        by_split[split_of(file.stem) or folder or ""].append(file)
    rest = by_split.pop("", [])
    # A file without a split among files with one ("all.json") would have its images counted twice.
    splits = by_split or ({"train": rest} if rest else {})
    if not splits:
        return []
    sorted_splits = {split: tuple(splits[split]) for split in ordered(splits)}
    return [Found(format="coco", root=root, splits=sorted_splits, is_split=bool(by_split) or path.is_file())]


def read(found: Found, images: Path | None = None) -> RawSet:
    """Read what `look` found.

    Args:
        found: files by split.
        images: the folder that `file_name` is relative to. None: searched around the annotation file.
    Raises: DataError: if a file is not COCO JSON, or a split has several.
    """
    raw = RawSet(format="coco", root=found.root)
    tables: dict[str, list[dict[str, Any]]] = {}
    for split, files in found.splits.items():
        if len(files) > 1:
            listed = ", ".join(str(file.relative_to(found.root)) for file in files)
            raise DataError(
                f"'{found.root}' has several COCO files for '{split}': {listed}. Give one of them as the "
                "path, or move the others away."
            )
        content = _load(files[0])
        raw.searched[split] = [images] if images else _image_folders(found.root, files[0], split)
        raw.splits[split] = _read_images(content, files[0].name, split, raw)
        tables[split] = content["categories"]
    for split, table in tables.items():
        table = _without_unused_root(table, split, raw)
        table.sort(key=lambda entry: (isinstance(entry["id"], str), entry["id"]))
        raw.classes[split] = {entry["id"]: str(entry["name"]) for entry in table}
        if len(raw.classes[split]) < len(table):
            raw.add_problem("class-list", found.splits[split][0].name, "two categories share an id", split)
    return raw


def _is_coco(path: Path) -> bool:
    text = path.read_bytes()
    return all(key in text for key in (b'"images"', b'"annotations"', b'"categories"'))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"'{path}' is not JSON: {error}.") from error
    needed = {"images": ("id", "file_name"), "annotations": (), "categories": ("id", "name")}
    for key, names in needed.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"'{path}' is not a COCO file: expected a list under '{key}'.")
        for i, entry in enumerate(content[key] if names else ()):
            if not isinstance(entry, dict) or any(name not in entry for name in names):
                raise DataError(
                    f"'{path}': entry {i} of '{key}' must have {' and '.join(names)}, got {entry}."
                )
    return content


def _read_images(content: dict[str, Any], file_name: str, split: str, raw: RawSet) -> list[RawImage]:
    images = []
    by_id: dict[Any, RawImage] = {}
    for entry in content["images"]:
        name, has_size = str(entry["file_name"]), entry.get("width") and entry.get("height")
        image = RawImage(
            image_id=entry["id"],
            name=name,
            path=find_image(name, raw.searched[split]),
            where=f"{file_name}: {name}",
            size=(int(entry["width"]), int(entry["height"])) if has_size else None,
        )
        images.append(image)
        by_id.setdefault(image.image_id, image)
    for i, entry in enumerate(content["annotations"]):
        where = f"{file_name}: annotation {entry.get('id', f'number {i}')}"
        image_id, bbox, area = entry.get("image_id"), entry.get("bbox"), entry.get("area")
        if image_id not in by_id:
            raw.add_problem("unknown-image", where, f"image_id {image_id!r}", split)
        elif (xyxy := _to_xyxy(bbox)) is None:
            raw.add_problem("malformed", where, f"bbox must be [x, y, width, height], got {bbox!r}", split)
        else:
            area = None if area is None else float(area)
            box = RawBox(xyxy, entry.get("category_id"), bool(entry.get("iscrowd", 0)), area)
            by_id[image_id].boxes.append(box)
    return images


def _to_xyxy(bbox: object) -> Box | None:
    try:
        x, y, w, h = map(float, bbox if isinstance(bbox, list) else ())
    except (TypeError, ValueError):
        return None
    return x, y, x + w, y + h


def _image_folders(root: Path, file: Path, split: str) -> list[Path]:
    """List the possible folders of `file_name`: train2017/ for instances_train2017.json, then images/ etc."""
    top = file.parent.parent if file.parent.name == "annotations" else file.parent
    tops = list(dict.fromkeys((file.parent, top, root)))
    words = (file.stem.removeprefix("instances_"), split)
    named = [base / inner / word for base in tops for inner in ("", "images") for word in words]
    return existing([*named, *(base / inner for base in tops for inner in ("images", "data", ""))])


def _without_unused_root(table: list[dict[str, Any]], split: str, raw: RawSet) -> list[dict[str, Any]]:
    """Drop the root that Roboflow puts before the real categories: their supercategory, without boxes."""
    used = {class_id for name in raw.splits for class_id in raw.used_ids(name)}
    parents = {entry.get("supercategory") for entry in table}
    names = Counter(entry["name"] for entry in table)

    def is_unused_root(entry: dict[str, Any]) -> bool:
        is_root = entry.get("supercategory") == "none"
        is_parent = entry["name"] in parents or names[entry["name"]] > 1
        return len(table) > 1 and entry["id"] not in used and is_root and is_parent

    for entry in table:
        if is_unused_root(entry):
            detail = f"'{entry['name']}', the root of the other categories, has no boxes and is not a class"
            raw.add_problem("class-note", split, detail, split)
    return [entry for entry in table if not is_unused_root(entry)]
