"""COCO JSON, in COCO's and in Roboflow's layout.

Found: `*.json` in the folder, in its `annotations/`, or one folder down (Roboflow:
`train/_annotations.coco.json`). The split is in the file's or its folder's name; a single file without a
split is training data. If there are `instances_*` files, others (captions, keypoints) are ignored; a file
that names a split no other file has, but cannot be read, makes the dataset unreadable. Ids may be any
numbers or text, sparse, from 0 or 1: labels follow the sorted category ids of the file. An annotation without
`bbox` gets the box around its polygons.
"""

from __future__ import annotations

__all__ = ["HINT", "look", "read"]

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from thawline.data.detection.formats.places import (
    Places,
    existing,
    files_in,
    read_text,
    relative_name,
    subfolders,
)
from thawline.data.detection.formats.raw import Box, Found, RawBox, RawImage, RawSet, box_around
from thawline.data.detection.formats.splits import ordered, split_of, split_of_folder
from thawline.data.detection.formats.values import to_flag, to_id, to_number, to_size, to_text
from thawline.errors import DataError

HINT = "JSON with `images`, `annotations` and `categories`, in the folder, annotations/ or a split's folder"

Value = TypeVar("Value")

KEYS = ("images", "annotations", "categories")


def look(path: Path) -> list[Found]:
    """Return the COCO datasets at a path: a JSON file, or a folder."""
    root = path.parent if path.is_file() else path
    if path.is_file():
        files = [path] if path.suffix.lower() == ".json" else []
    else:
        files = [file for folder in (path, *subfolders(path)) for file in files_in(folder, ".json")]
    files = [file for file in files if file.name.startswith("instances")] or files
    n_keys = {file: _count_keys(file) for file in files}
    by_split: defaultdict[str, list[Path]] = defaultdict(list)
    for file in files:
        if n_keys[file] == len(KEYS):
            by_split[_split_named(file, path) or ""].append(file)
    rest = by_split.pop("", [])
    # A file without a split among files with one ("all.json") would have its images counted twice.
    splits = by_split or ({"train": rest} if rest else {})
    fault = ""
    for file in files:
        split = _split_named(file, path)
        is_named = file == path or file.name.startswith(("instances", "_annotations.coco"))
        is_missing = split not in splits if split else not splits
        if n_keys[file] < len(KEYS) and is_missing and (is_named or n_keys[file] > 1 or (split and by_split)):
            fault = fault or _fault(file)
    for file in [] if path.is_file() else _packed(path):
        split = _split_named(file, path)
        if not fault and (split not in splits if split else not splits):
            fault = f"'{file}' is compressed. Unpack it."
    if not splits and not fault:
        return []
    return [
        Found(
            format="coco",
            root=root,
            splits={split: tuple(splits[split]) for split in ordered(splits)},
            is_split=bool(by_split) or path.is_file() or not splits,
            left_out=tuple(rest) if by_split else (),
            fault=fault,
        )
    ]


def read(found: Found, images: Path | None = None) -> RawSet:
    """Read what `look` found.

    Args:
        found: files by split.
        images: the folder that `file_name` is relative to. None: searched around the annotation file.
    Raises: DataError: if a file is not COCO JSON, or a split has several.
    """
    raw = RawSet(format="coco", root=found.root)
    for file in found.left_out:
        raw.add_problem("left-out", relative_name(file, found.root), "names no split, as others do")
    tables: dict[str, list[dict[str, Any]]] = {}
    for split, files in found.splits.items():
        if len(files) > 1:
            listed = ", ".join(str(file.relative_to(found.root)) for file in files)
            raise DataError(
                f"'{found.root}' has several COCO files for '{split}': {listed}. Give one of them as the "
                "path, or move the others away."
            )
        content = _parse(files[0], raw.read_text(files[0], split))
        raw.searched[split] = [images] if images else _image_folders(found.root, files[0], split)
        raw.splits[split] = _read_images(content, files[0], split, raw)
        tables[split] = _categories(content, files[0])
    for split, table in tables.items():
        table = _without_unused_root(table, split, raw)
        table.sort(key=lambda entry: (isinstance(entry["id"], str), entry["id"]))
        raw.classes[split] = {entry["id"]: entry["name"] for entry in table}
        if len(raw.classes[split]) < len(table):
            raw.add_problem("class-list", found.splits[split][0].name, "two categories share an id", split)
    return raw


def _packed(path: Path) -> list[Path]:
    """Return compressed JSON files where `look` looks for JSON."""
    files = [file for folder in (path, *subfolders(path)) for file in files_in(folder, ".gz", ".zip")]
    return [file for file in files if file.stem.lower().endswith(".json")]


def _count_keys(file: Path) -> int:
    text = read_text(file)
    return sum(f'"{key}"' in text for key in KEYS)


def _fault(file: Path) -> str:
    """Return what is wrong with a file that is not COCO JSON; empty for a detector's results."""
    text = read_text(file)
    try:
        _parse(file, text)
    except DataError as error:
        return "" if text.lstrip().startswith("[") and '"score"' in text else str(error)
    return ""


def _split_named(file: Path, path: Path) -> str | None:
    """Return the split that a file's name says, or that of its folder below `path`."""
    return split_of(file.stem) or (None if file.parent == path else split_of_folder(file.parent.name))


def _parse(file: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{file}' is not JSON: {error}. Repair it, or move it away.") from error
    needed = {"images": ("id", "file_name"), "annotations": (), "categories": ("id", "name")}
    for key, names in needed.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"'{file}' is not a COCO file: expected a list under '{key}'.")
        for i, entry in enumerate(content[key]):
            if not isinstance(entry, dict) or any(name not in entry for name in names):
                raise DataError(
                    f"'{file}': entry {i} of '{key}' must have {' and '.join(names) or 'fields'}, "
                    f"got {entry}."
                )
    return content


def _categories(content: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    table = []
    for i, entry in enumerate(content["categories"]):
        try:
            table.append(entry | {"id": to_id(entry["id"]), "name": to_text(entry["name"])})
        except ValueError as error:
            raise DataError(f"'{file}': entry {i} of 'categories': id or name {error}.") from error
    return table


def _read_images(content: dict[str, Any], file: Path, split: str, raw: RawSet) -> list[RawImage]:
    images = []
    by_id: dict[int | str, RawImage] = {}
    named = split_of(file.stem) or split_of_folder(file.parent.name)
    places = Places(raw.searched[split], named)
    for i, entry in enumerate(content["images"]):
        name, size = entry["file_name"], None
        try:
            key = to_id(entry["id"])
        except ValueError as error:
            raise DataError(f"'{file}': entry {i} of 'images': id {error}.") from error
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"'{file}': entry {i} of 'images': file_name must be text, got {name!r}.")
        try:
            size = to_size(entry.get("width"), entry.get("height"))
        except ValueError as error:
            raw.add_problem("malformed", f"{file.name}: {name}", f"width and height {error}", split)
        image = RawImage(image_id=entry["id"], name=name, where=f"{file.name}: {name}", size=size)
        raw.locate(image, places.find(name), split)
        images.append(image)
        by_id.setdefault(key, image)
    for i, entry in enumerate(content["annotations"]):
        where = f"{file.name}: annotation {entry.get('id', f'number {i}')}"
        try:
            image_id, box = _field(entry, "image_id", to_id), _read_box(entry)
        except ValueError as error:
            raw.add_problem("malformed", where, str(error), split)
            continue
        if image_id in by_id:
            by_id[image_id].boxes.append(box)
        else:
            raw.add_problem("unknown-image", where, f"image_id {entry['image_id']!r}", split)
    return images


def _read_box(entry: dict[str, Any]) -> RawBox:
    """Read an annotation. Raises: ValueError: with the field that is wrong."""
    area = entry.get("area")
    return RawBox(
        _to_xyxy(entry),
        _field(entry, "category_id", to_id),
        _field(entry, "iscrowd", to_flag) or _field(entry, "ignore", to_flag),
        None if area in (None, "") else _field(entry, "area", to_number),
    )


def _field(entry: dict[str, Any], name: str, reader: Callable[[object], Value]) -> Value:
    try:
        return reader(entry.get(name))
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


def _to_xyxy(entry: dict[str, Any]) -> Box:
    bbox, polygons = entry.get("bbox"), entry.get("segmentation")
    try:
        if bbox in (None, [], [0, 0, 0, 0]) and isinstance(polygons, list) and polygons:
            polygons = polygons if isinstance(polygons[0], list) else [polygons]
            points = [[*map(to_number, polygon)] for polygon in polygons]
            return box_around([x for p in points for x in p[::2]], [y for p in points for y in p[1::2]])
        x, y, w, h = map(to_number, bbox if isinstance(bbox, list) else ())
    except (TypeError, ValueError) as error:
        mask = " and polygons cannot be read" if polygons else ""
        if isinstance(polygons, dict):
            mask = "; a mask as run lengths has no box of its own: write `bbox`, e.g. pycocotools.mask.toBbox"
        raise ValueError(f"bbox must be [x, y, width, height], got {bbox!r}{mask}") from error
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
