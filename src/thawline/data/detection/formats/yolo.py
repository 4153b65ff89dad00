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
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
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
    subfolders,
)
from thawline.data.detection.formats.raw import ClassId, Found, RawBox, RawImage, RawSet, box_around, listed
from thawline.data.detection.formats.splits import ordered, split_of_folder
from thawline.data.detection.formats.values import to_number, to_text
from thawline.data.detection.images import is_image
from thawline.errors import DataError

HINT = "a YAML file with `names` and `train`"

KEYS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
"""Key of data.yaml → split."""
RELATIVE_MIN, RELATIVE_MAX = -0.5, 1.5
"""Coordinates beyond these are no fractions, which may leave 0–1 where a box leaves its image a little."""
NOT_LABELS = ("classes.txt", "labels.txt", "obj.names", "notes.txt", "README.txt")
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
    return [one for one in found if one.index and one.index.stem == "data"] or found or faulty[:1]


def _found(file: Path, splits: dict[str, tuple[Path, ...]] | None = None, fault: str = "") -> Found:
    return Found(format="yolo", root=file.parent, splits=splits or {}, is_split=True, index=file, fault=fault)


def read(found: Found, images: Path | None = None) -> RawSet:
    """Read what `look` found. Raises: DataError: for `images`, and a class list that cannot be read."""
    if images is not None:
        raise DataError("A YOLO data.yaml names its image folders itself: leave out `images`.")
    file = found.index
    assert file is not None, "set by `look`"
    raw = RawSet(format="yolo", root=found.root, is_relative=True, applies_orientation=True)
    content = _parse_yaml(file, raw.read_text(file))
    table = _class_table(file, content, raw)
    for note in _sources(file, content)[1]:
        raw.add_problem("place-note", file.name, note)
    reader = _LabelReader(raw, _n_keypoint_values(file, content))
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
    if reader.polygons and all(reader.polygons):
        detail = "all label lines look like a box and keypoints: add `kpt_shape: [number, 3]`"
        raw.add_problem("malformed", file.name, detail)
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
    return content if isinstance(content, dict) else {}


def _is_data_yaml(content: dict[str, Any]) -> bool:
    return ("names" in content or "nc" in content) and any(key in content for key in KEYS)


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
    for key, split in KEYS.items():
        value = content.get(key)
        names = [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]
        names = [name for name in names if name not in NOTHING]
        if not names or split in sources:
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


class _LabelReader:
    """Reads the label files of the images of a dataset.

    Args:
        raw: gets boxes and problems.
        n_keypoint_values: number of values after a box, which are not read.
    """

    def __init__(self, raw: RawSet, n_keypoint_values: int) -> None:
        self.raw, self.n_keypoint_values = raw, n_keypoint_values
        self.polygons: list[bool] = []
        """For every polygon read: whether its numbers could as well be a box and keypoints."""
        self._labels_in = cache(_labels_in)
        self._label_folder = cache(_label_folder)

    def read(self, split: str) -> None:
        """Read the labels of a split."""
        raw, unlabelled, paths = self.raw, list[RawImage](), list[Path]()
        by_label: defaultdict[Path, list[RawImage]] = defaultdict(list)
        for image in raw.splits[split]:
            if image.path is not None:
                paths.append(image.path)
                label = self._label_of(image.path)
                by_label[label].append(image) if label else unlabelled.append(image)
        for label, owners in by_label.items():
            where = relative_name(label, raw.root)
            if len({image.path for image in owners}) > 1:
                names = ", ".join(image.name for image in owners)
                raw.add_problem("ambiguous-image", where, f"may be the labels of {names}", split)
                for image in owners:
                    image.is_unusable = True
                continue
            boxes = self._read_labels(label, where, split)
            for image in owners:
                image.where, image.boxes = where, list(boxes)
        if paths and not by_label:
            expected = self._label_folder(paths[0].parent) / f"{paths[0].stem}.txt"
            detail = (
                f"none of the {len(paths)} images of '{split}' has a label file; expected e.g. '{expected}'"
            )
            raw.add_problem("missing-labels", split, detail, split)
        elif unlabelled:
            names = listed([image.name for image in unlabelled])
            detail = f"{len(unlabelled)} of {len(paths)} images ({names})"
            raw.add_problem("unlabelled", split, detail, split)
        self._report_orphans(paths, set(by_label), split)

    def _label_of(self, image: Path) -> Path | None:
        for folder in dict.fromkeys((self._label_folder(image.parent), image.parent)):
            labels = self._labels_in(folder)
            if label := labels.get(image.stem) or labels.get(_plain(image.stem)):
                return label
        return None

    def _read_labels(self, file: Path, where: str, split: str) -> list[RawBox]:
        boxes = []
        for number, line in enumerate(self.raw.read_text(file, split).splitlines(), start=1):
            if line.strip():
                try:
                    boxes.append(self._parse_line(line))
                except ValueError as error:
                    self.raw.add_problem("malformed", f"{where}:{number}", str(error), split)
        return boxes

    def _parse_line(self, line: str) -> RawBox:
        """Parse a line of a label file. Raises: ValueError: with what is wrong with it."""
        try:
            class_id, *values = map(float, line.split())
        except ValueError as error:
            raise ValueError(f"expected numbers, got '{line.strip()}'") from error
        if not class_id.is_integer():
            raise ValueError(f"the class must be an integer, got {line.split()[0]}")
        n, n_more = len(values), self.n_keypoint_values
        hint = ". Of a box and keypoints? Then add `kpt_shape` to the YAML file" if _is_pose(values) else ""
        if n_more and n not in (4, 4 + n_more):
            raise ValueError(
                f"expected `class cx cy w h` and {n_more} values of keypoints, got {n + 1} numbers"
            )
        is_polygon = not n_more and n >= 6 and n % 2 == 0
        if not n_more and n != 4 and not is_polygon:
            raise ValueError(f"expected `class cx cy w h` or a polygon, got {n + 1} numbers{hint}")
        values = values if is_polygon else values[:4]
        if min(values) < RELATIVE_MIN or max(values) > RELATIVE_MAX:
            raise ValueError(f"expected fractions of the image, got pixels ('{line.strip()}'){hint}")
        if is_polygon:
            self.polygons.append(_is_pose(values))
            return RawBox(box_around(values[::2], values[1::2]), int(class_id))
        cx, cy, w, h = values
        return RawBox((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), int(class_id))

    def _report_orphans(self, images: Sequence[Path], used: set[Path], split: str) -> None:
        """Report label files without an image, except those whose image a list leaves out on purpose."""
        siblings: defaultdict[Path, set[Path]] = defaultdict(set)
        for folder in {image.parent for image in images}:
            siblings[self._label_folder(folder)].add(folder)
        for folder in {path.parent for path in used}:
            siblings[folder] = siblings[folder] or {folder}
        for folder in sorted(siblings):
            files = [path for sibling in siblings[folder] for path in sibling.iterdir()]
            stems = {_plain(path.stem) for path in files if is_image(path)}
            others = {_plain(path.stem): path.name for path in files if path.suffix.lower() != ".txt"}
            for path in files_in(folder, ".txt"):
                stem = _plain(path.stem)
                is_list = split_of_folder(path.stem) is not None
                if path not in used and stem not in stems and path.name not in NOT_LABELS and not is_list:
                    other = f", and '{others[stem]}' is of no format that is read" if stem in others else ""
                    self.raw.add_problem(
                        "unknown-image", path.name, f"no image '{path.stem}.*'{other}", split
                    )


def _is_pose(values: Sequence[float]) -> bool:
    """Return True if numbers fit a box (cx cy w h) and keypoints (x y visibility) inside of it."""
    rest = values[4:]
    if not rest or len(rest) % 3 or not all(value in (0, 1, 2) for value in rest[2::3]):
        return False
    cx, cy, w, h = values[:4]
    seen = [(x, y) for x, y, visible in zip(rest[::3], rest[1::3], rest[2::3], strict=True) if visible]
    return all(abs(x - cx) <= 0.6 * w and abs(y - cy) <= 0.6 * h for x, y in seen)


def _label_folder(images: Path) -> Path:
    """Return the folder of the labels of a folder of images: images/ becomes labels/, else it is the same."""
    for folder in (images, *images.parents):
        if folder.name.lower() in ("images", "jpegimages"):
            named = [path for path in subfolders(folder.parent) if path.name.lower() == "labels"]
            return (named[0] if named else folder.with_name("labels")) / images.relative_to(folder)
    return images


def _labels_in(folder: Path) -> dict[str, Path]:
    """Return the text files of a folder by stem, and by stem as `_plain` writes it."""
    files = files_in(folder, ".txt")
    return {_plain(file.stem): file for file in files} | {file.stem: file for file in files}


def _plain(name: str) -> str:
    return "/".join(plain_parts(name))
