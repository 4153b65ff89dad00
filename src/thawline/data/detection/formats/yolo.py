"""YOLO: a data.yaml, image folders or lists, and a text file of fractions per image.

    data.yaml    path: .            (optional root)      images/train/a.jpg  ↔  labels/train/a.txt
                 train: images/train                     train/images/a.jpg  ↔  train/labels/a.txt
                 val: val.txt       (a list of images)   anywhere/a.jpg      ↔  anywhere/a.txt
                 names: {0: car, 3: bus}  or  [car, bus]

Paths are relative to the YAML file (Roboflow writes `../train/images` for a folder next to it, which works
too). A label line is `class cx cy w h`; polygons, `class x1 y1 x2 y2 …`, become the box around them. An image
without a label file is a negative. Differs from Ultralytics' reader: nothing is skipped silently, and ids
may have gaps.
"""

from __future__ import annotations

__all__ = ["HINT", "look", "read"]

import re
from pathlib import Path
from typing import Any

import yaml

from thawline.data.detection.formats.raw import (
    ClassId,
    Found,
    RawBox,
    RawImage,
    RawSet,
    list_images,
    ordered,
    relative_name,
)
from thawline.data.detection.images import is_image
from thawline.errors import DataError

HINT = "a YAML file with `names` and `train`"

KEYS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
"""Key of data.yaml → split."""
RELATIVE_MAX = 2.0
"""Coordinates above this are pixels; fractions may exceed 1 where a box leaves its image a little."""
NOT_LABELS = ("classes.txt", "labels.txt", "obj.names", "notes.txt", "README.txt")


def look(path: Path) -> list[Found]:
    """Return the YOLO datasets at a path: a YAML file, or a folder that contains some."""
    files = [path] if path.is_file() else sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    contents = {file: _load(file) for file in files if file.suffix in (".yaml", ".yml")}
    candidates = [file for file, content in contents.items() if _is_data_yaml(content)]
    # The usual name wins over a recipe's or an exporter's own copy.
    named = [file for file in candidates if file.stem == "data"]
    return [
        Found(format="yolo", root=file.parent, splits=splits, is_split=True, index=file)
        for file, splits in ((file, _sources(file, contents[file])) for file in named or candidates)
    ]


def read(found: Found, images: Path | None = None) -> RawSet:
    """Read what `look` found. Raises: DataError: if a folder or list is missing, or no label file exists."""
    if images is not None:
        raise DataError("A YOLO data.yaml names its image folders itself: leave out `images`.")
    file = found.index
    assert file is not None, "set by `look`"
    raw = RawSet(format="yolo", root=found.root, is_relative=True, applies_orientation=True)
    table = _class_table(file, raw)
    for split, sources in found.splits.items():
        paths = [image for source in sources for image in _list_source(source, found.root)]
        raw.classes[split] = table
        raw.searched[split] = sources
        raw.splits[split] = [_read_image(i, path, split, raw) for i, path in enumerate(paths)]
        if paths and not any(label_file(path).is_file() for path in paths):
            raise DataError(
                f"'{file}': none of the {len(paths)} images of '{split}' has a label file; expected e.g. "
                f"'{label_file(paths[0])}'. Put labels in labels/ where images are in images/, else next to "
                "the images."
            )
        _report_orphans(paths, split, raw)
    return raw


def label_file(image: Path) -> Path:
    """Return the path of an image's labels: its last folder named images becomes labels, if there is one."""
    *parts, name = image.parts
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, name).with_suffix(".txt")


def _load(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"'{file}' is not YAML: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _is_data_yaml(content: dict[str, Any]) -> bool:
    return ("names" in content or "nc" in content) and any(key in content for key in KEYS)


def _sources(file: Path, content: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    """Resolve the image folders and lists of every split."""
    root = file.parent / str(content.get("path") or ".")
    # Ultralytics resolves `path` from its own datasets folder; elsewhere only the YAML's place is known.
    roots = [root, file.parent] if root.is_dir() else [file.parent]
    sources: dict[str, tuple[Path, ...]] = {}
    for key, split in KEYS.items():
        value = content.get(key)
        if value and split not in sources:
            values = value if isinstance(value, list) else [value]
            sources[split] = tuple(_resolve(str(item), roots) for item in values)
    return {split: sources[split] for split in ordered(sources)}


def _resolve(name: str, roots: list[Path]) -> Path:
    names = dict.fromkeys((name, re.sub(r"^(\.\./)+", "", name)))
    paths = [root / candidate for candidate in names for root in roots]
    return next((path for path in paths if path.exists()), paths[0])


def _class_table(file: Path, raw: RawSet) -> dict[ClassId, str]:
    content = _load(file)
    names, n_classes = content.get("names"), content.get("nc")
    if names is None and isinstance(n_classes, int):
        raw.add_problem("class-note", file.name, f"no names: classes are called 0 … {n_classes - 1}")
        names = [str(i) for i in range(n_classes)]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(f"'{file}': `names` must be a list or a mapping of id to name, got {names!r}.")
    try:
        table: dict[ClassId, str] = {int(key): str(names[key]) for key in sorted(names, key=int)}
    except ValueError as error:
        raise DataError(f"'{file}': the keys of `names` must be integers: {error}.") from error
    if isinstance(n_classes, int) and n_classes != len(table):
        raw.add_problem("class-list", file.name, f"nc is {n_classes}, but there are {len(table)} names")
    return table


def _list_source(source: Path, root: Path) -> list[Path]:
    """Return the images of a folder, or those listed in a text file."""
    if source.is_dir():
        return list_images(source)
    if source.suffix != ".txt" or not source.is_file():
        raise DataError(
            f"'{source}' is neither a folder nor a .txt list of images. Correct the path in the YAML file."
        )
    lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    places = [(source.parent / line, root / line) for line in lines if line]
    return [next((place for place in pair if place.is_file()), pair[0]) for pair in places]


def _read_image(i: int, path: Path, split: str, raw: RawSet) -> RawImage:
    name = relative_name(path, raw.root)
    image = RawImage(image_id=i, name=name, path=path if path.is_file() else None, where=name)
    labels = label_file(path)
    if labels.is_file():
        image.where = relative_name(labels, raw.root)
        text = labels.read_text(encoding="utf-8-sig", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    image.boxes.append(_parse_line(line))
                except ValueError as error:
                    raw.add_problem("malformed", f"{image.where}:{number}", str(error), split)
    return image


def _parse_line(line: str) -> RawBox:
    """Parse a line of a label file. Raises: ValueError: with what is wrong with it."""
    try:
        class_id, *coordinates = map(float, line.split())
    except ValueError as error:
        raise ValueError(f"expected numbers, got '{line.strip()}'") from error
    is_polygon = len(coordinates) >= 6 and len(coordinates) % 2 == 0
    if len(coordinates) != 4 and not is_polygon:
        raise ValueError(f"expected `class cx cy w h` or a polygon, got {len(coordinates) + 1} numbers")
    if not class_id.is_integer():
        raise ValueError(f"the class must be an integer, got {line.split()[0]}")
    if max(coordinates) > RELATIVE_MAX:
        raise ValueError(f"expected fractions of the image, got pixels ('{line.strip()}')")
    if is_polygon:
        xs, ys = coordinates[::2], coordinates[1::2]
        return RawBox((min(xs), min(ys), max(xs), max(ys)), int(class_id))
    cx, cy, w, h = coordinates
    return RawBox((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), int(class_id))


def _report_orphans(images: list[Path], split: str, raw: RawSet) -> None:
    """Report label files without an image, except those whose image a list leaves out on purpose."""
    known = {label_file(image) for image in images}
    for folder in sorted({path.parent for path in known}):
        siblings = {image.parent for image in images if label_file(image).parent == folder}
        stems = {path.stem for sibling in siblings for path in sibling.iterdir() if is_image(path)}
        for path in sorted(folder.glob("*.txt")) if folder.is_dir() else []:
            if path not in known and path.stem not in stems and path.name not in NOT_LABELS:
                raw.add_problem("unknown-image", path.name, f"no image '{path.stem}.*'", split)
