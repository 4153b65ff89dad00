"""YOLO: a data.yaml, image folders or lists, and a text file of fractions per image.

    data.yaml    path: .            (optional root)      images/train/a.jpg  ↔  labels/train/a.txt
                 train: images/train                     train/images/a.jpg  ↔  train/labels/a.txt
                 val: val.txt       (a list of images)   anywhere/a.jpg      ↔  anywhere/a.txt
                 names: {0: car, 3: bus}  or  [car, bus]

Paths are relative to the YAML file (Roboflow writes `../train/images` for a folder next to it, which works
too). A label line is `class cx cy w h`; with `kpt_shape` in the YAML file, keypoints follow and are not read;
without it, polygons, `class x1 y1 x2 y2 …`, become the box around them. Labels may also be beside their
images. An image without a label file is a negative. Differs from Ultralytics' reader: nothing is skipped
silently, ids may have gaps, and names such as `on`, `no` and `010` are text.
"""

from __future__ import annotations

__all__ = ["HINT", "look", "read"]

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from thawline.data.detection.formats.places import (
    Places,
    existing,
    files_in,
    find_path,
    is_url,
    list_images,
    plain_parts,
    read_text,
    relative_name,
)
from thawline.data.detection.formats.raw import ClassId, Found, RawImage, RawSet
from thawline.data.detection.formats.splits import SPLITS, ordered, split_of_folder
from thawline.data.detection.formats.values import to_number, to_text
from thawline.data.detection.formats.yolo_labels import LabelReader
from thawline.errors import DataError

HINT = "a YAML file with `names` and `train`"

NOTHING = ("", "~", "null", "Null", "NULL", "None")
"""Values that stand for none in a YAML file."""


def look(path: Path) -> list[Found]:
    """Return the YOLO datasets at a path: a YAML file, or a folder that contains some."""
    files = [path] if path.is_file() else files_in(path, ".yaml", ".yml")
    found, faulty = [], []
    for file in files:
        if file.suffix.lower() in (".yaml", ".yml"):
            text = read_text(file)
            try:
                content = _parse_yaml(file, text)
                if _is_data_yaml(content):
                    found.append(_found(file, splits=_sources(file, content)[0]))
            except DataError as error:
                is_meant = file == path or file.stem == "data" or re.search("(?m)^(names|nc):", text)
                faulty += [_found(file, fault=str(error))] if is_meant else []
    # The usual name wins over a recipe's or an exporter's own copy.
    named = [one for one in found if one.index and one.index.stem == "data"]
    others = tuple(one.index for one in found if one.index and one not in named)
    return [replace(one, left_out=others) for one in named] or found or faulty[:1]


def _found(file: Path, splits: dict[str, tuple[Path, ...]] | None = None, fault: str = "") -> Found:
    return Found(format="yolo", root=file.parent, splits=splits or {}, is_split=True, index=file, fault=fault)


def read(found: Found, images: Path | None = None) -> RawSet:
    """Read what `look` found. Raises: DataError: for `images`, and a class list that cannot be read."""
    if images is not None:
        raise DataError("A YOLO data.yaml names its image folders itself: leave out `images`.")
    file = found.index
    assert file is not None, "set by `look`"
    raw = RawSet(format="yolo", root=found.root, is_relative=True, applies_orientation=True)
    for other in found.left_out:
        raw.add_problem("left-out", other.name, f"'{file.name}' is read")
    content = _parse_yaml(file, raw.read_text(file))
    table = _class_table(file, content, raw)
    for note in _sources(file, content)[1]:
        raw.add_problem("place-note", file.name, note)
    reader = LabelReader(raw, _n_keypoint_values(file, content))
    for split, sources in found.splits.items():
        absent = [source for source in sources if not _is_source(source)]
        detail = f"{split}: '{', '.join(map(str, absent))}' is neither a folder nor a .txt list of images"
        if split == "test" and len(absent) == len(sources):
            raw.add_problem("left-out", file.name, detail, split)
            continue
        if absent:
            raw.add_problem("missing-split", file.name, detail, split)
        raw.classes[split] = table
        raw.searched[split] = sources
        raw.splits[split] = []
        for source in (source for source in sources if _is_source(source)):
            raw.splits[split] += _list_images(source, split, raw, start=len(raw.splits[split]))
        reader.read(split)
    reader.check_keypoints(file.name)
    return raw


class _TextLoader(yaml.BaseLoader):
    """Loader that keeps every value as text and refuses a key that is repeated."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key.value}' is repeated", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _parse_yaml(file: Path, text: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, _TextLoader)  # builds text, lists and mappings only
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise DataError(f"'{file}' is not YAML: {reason}. Repair it, or move it away.") from error
    if not isinstance(content, dict):
        return {}
    lowered = {key.lower(): value for key, value in content.items()}
    if len(lowered) < len(content):
        raise DataError(f"'{file}' has keys that differ in capitals alone: {', '.join(content)}. Keep one.")
    return lowered


def _is_data_yaml(content: dict[str, Any]) -> bool:
    return ("names" in content or "nc" in content) and any(map(split_of_folder, content))


def _sources(file: Path, content: dict[str, Any]) -> tuple[dict[str, tuple[Path, ...]], list[str]]:
    """Resolve the image folders and lists of every split. Returns: them, and what is not as written."""
    notes = []
    path = content.get("path")
    roots = [file.parent]
    if isinstance(path, str) and path not in NOTHING:
        _refuse_url(file, "path", path)
        if (root := find_path(path, [file.parent])) is not None and root.is_dir():
            # Ultralytics resolves `path` from its own datasets folder, which is not known here.
            roots = [root, file.parent]
        else:
            notes.append(f"`path: {path}` is no folder; paths start from '{file.parent}' instead")
    sources: dict[str, tuple[Path, ...]] = {}
    for key in sorted(content, key=lambda key: key not in SPLITS):
        split, value = split_of_folder(key), content[key]
        names = [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]
        names = [name for name in names if name not in NOTHING]
        if split is None or not names:
            continue
        if split in sources:
            notes.append(f"`{key}` is left out: the images of '{split}' are given above it")
            continue
        found = []
        for name in names:
            _refuse_url(file, key, name)
            place = find_path(name, roots)
            found.append(place or roots[0] / name)
            parts = plain_parts(name)
            if place is not None and parts and plain_parts(str(place))[-len(parts) :] != parts:
                notes.append(f"`{key}: {name}` does not exist; read from '{place}' instead")
            elif place is not None and len(roots) > 1 and not _is_in(place, roots[0], name):
                notes.append(f"`{key}: {name}` is not in `path`; read from '{place}' instead")
        sources[split] = tuple(found)
    return {split: sources[split] for split in ordered(sources)}, notes


def _is_in(place: Path, root: Path, name: str) -> bool:
    return Path(name).is_absolute() or place.is_relative_to(root)


def _refuse_url(file: Path, key: str, name: str) -> None:
    if is_url(name):
        raise DataError(f"'{file}': `{key}: {name}` is a URL. Download the images, and give their folder.")


def _class_table(file: Path, content: dict[str, Any], raw: RawSet) -> dict[ClassId, str]:
    names, n_classes = content.get("names"), content.get("nc")
    if names in (None, *NOTHING) and n_classes and re.fullmatch(r"\d+", n_classes):
        raw.add_problem("class-note", file.name, f"no names: classes are called 0 … {int(n_classes) - 1}")
        names = [str(i) for i in range(int(n_classes))]
    if isinstance(names, list):
        names = {str(i): name for i, name in enumerate(names)}
    if not isinstance(names, dict) or not names:
        raise DataError(f"'{file}': `names` must be a list or a mapping of id to name, got {names!r}.")
    if wrong := [key for key in names if not re.fullmatch(r"-?\d+", key)]:
        raise DataError(f"'{file}': the keys of `names` must be integers, got {wrong[0]!r}.")
    try:
        table: dict[ClassId, str] = {int(key): to_text(names[key]) for key in sorted(names, key=int)}
    except ValueError as error:
        raise DataError(f"'{file}': a name in `names` {error}.") from error
    if len(table) < len(names):
        raw.add_problem("class-list", file.name, "two names share an id")
    if n_classes not in (None, *NOTHING) and n_classes != str(len(table)):
        raw.add_problem("class-list", file.name, f"nc is {n_classes}, but there are {len(table)} names")
    return table


def _n_keypoint_values(file: Path, content: dict[str, Any]) -> int:
    """Return the number of values that follow a box in a label line, by `kpt_shape`; 0 without it."""
    shape = content.get("kpt_shape")
    if shape in (None, *NOTHING):
        return 0
    try:
        n_points, n_values = map(int, map(to_number, shape))
    except (TypeError, ValueError):
        n_points, n_values = 0, 0
    if n_points < 1 or n_values not in (2, 3):
        raise DataError(f"'{file}': `kpt_shape` must be [number of keypoints, 2 or 3], got {shape}.")
    return n_points * n_values


def _is_source(source: Path) -> bool:
    return source.is_dir() or (source.suffix.lower() == ".txt" and source.is_file())


def _list_images(source: Path, split: str, raw: RawSet, start: int) -> list[RawImage]:
    """Return the images of a folder, or those listed in a text file, with ids from `start`."""
    if source.is_dir():
        found = [(relative_name(path, raw.root), [path]) for path in list_images(source)]
    else:
        places = Places(existing([source.parent, raw.root, raw.root / "images"]), split)
        lines = map(str.strip, raw.read_text(source, split).splitlines())
        found = [(line, places.find(line)) for line in lines if line]
    images = []
    for i, (name, files) in enumerate(found, start=start):
        where = relative_name(files[0], raw.root) if len(files) == 1 else name
        images.append(RawImage(image_id=i, name=where, where=where))
        raw.locate(images[-1], files, split)
    return images
