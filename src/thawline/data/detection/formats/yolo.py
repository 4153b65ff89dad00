"""YOLO: a data.yaml, image folders or lists, and a text file of fractions per image.

    data.yaml    path: .            (optional root)      images/train/a.jpg  ↔  labels/train/a.txt
                 train: images/train                     train/images/a.jpg  ↔  train/labels/a.txt
                 val: val.txt       (a list of images)   anywhere/a.jpg      ↔  anywhere/a.txt
                 names: {0: car, 3: bus}  or  [car, bus]

Paths are relative to the yaml (Roboflow writes `../train/images` for a folder beside it; that is understood
too). A label line is `class cx cy w h`; polygons, `class x1 y1 x2 y2 …`, give the box around them. An image
without a label file is a negative. Differs from Ultralytics' reader: nothing is skipped silently, and ids
may have gaps.
"""

from __future__ import annotations

__all__ = ["HINT", "look", "read", "read_label_lines"]

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from thawline.data.detection.formats.raw import Found, RawImage, RawSet, list_images, ordered, relative_name
from thawline.data.detection.images import is_image
from thawline.errors import DataError

HINT = "a YAML file with `names` and `train`"

KEYS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
"""Key of data.yaml → split."""
RELATIVE_MAX = 2.0
"""A coordinate above this is in pixels, not a fraction of an image that a box leaves a little."""
NOT_LABELS = ("classes.txt", "labels.txt", "obj.names", "notes.txt", "README.txt")


def look(path: Path) -> list[Found]:
    """The YOLO data sets at a path: a yaml, or a folder that has some."""
    files = [path] if path.is_file() else sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    candidates = [file for file in files if _is_data_yaml(file)]
    # The name everyone uses goes before a recipe's or an exporter's own copy.
    named = [file for file in candidates if file.stem == "data"]
    return [
        Found(format="yolo", root=file.parent, splits=_sources(file), is_split=True, index=file)
        for file in named or candidates
    ]


def read(found: Found, images: Path | None = None) -> RawSet:
    """Read what `look` found. Raises: DataError: if a folder or list is missing, or no label file is."""
    if images is not None:
        raise DataError("A YOLO data.yaml names its image folders itself: leave `images` out.")
    file = found.index
    assert file is not None, "made by `look`"
    raw = RawSet(format="yolo", root=found.root, is_relative=True, obeys_orientation=True)
    table = _class_table(file, raw)
    for split in ordered(found.splits):
        paths = [image for source in found.splits[split] for image in _listed(source, found.root)]
        raw.classes[split] = table
        raw.looked_in[split] = found.splits[split]
        raw.splits[split] = [_image(i, path, found.root, split, raw) for i, path in enumerate(paths)]
        if paths and not any(label_file(path).is_file() for path in paths):
            raise DataError(
                f"'{file}': none of the {len(paths)} images of '{split}' has a label file; looked for "
                f"'{label_file(paths[0])}' and its like. Labels lie in labels/ where images lie in images/, "
                "else beside the images."
            )
        _name_orphans(paths, split, raw)
    return raw


def label_file(image: Path) -> Path:
    """Where an image's labels are: the last folder called images becomes labels; else beside the image."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def read_label_lines(text: str) -> Iterator[tuple[int, tuple[int, tuple[float, float, float, float]] | str]]:
    """Take a label file apart.

    Yields: (line number, (class id, xyxy as fractions)), or (line number, what is wrong with the line).
    """
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            values = [float(word) for word in words]
        except ValueError:
            yield number, f"expected numbers, got '{line.strip()}'"
            continue
        class_id, coordinates = values[0], values[1:]
        is_polygon = len(coordinates) >= 6 and len(coordinates) % 2 == 0
        if len(coordinates) != 4 and not is_polygon:
            yield number, f"expected `class cx cy w h` or a polygon, got {len(values)} numbers"
        elif not class_id.is_integer():
            yield number, f"the class must be a whole number, got {words[0]}"
        elif max(coordinates, default=0) > RELATIVE_MAX:
            yield number, f"expected fractions of the image, got pixels ('{line.strip()}')"
        elif is_polygon:
            xs, ys = coordinates[::2], coordinates[1::2]
            yield number, (int(class_id), (min(xs), min(ys), max(xs), max(ys)))
        else:
            cx, cy, w, h = coordinates
            yield number, (int(class_id), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))


def _load(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"'{file}' is not YAML: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _is_data_yaml(file: Path) -> bool:
    if file.suffix not in (".yaml", ".yml"):
        return False
    content = _load(file)
    return ("names" in content or "nc" in content) and any(key in content for key in KEYS)


def _sources(file: Path) -> dict[str, tuple[Path, ...]]:
    """Split → its image folders and lists, resolved."""
    content = _load(file)
    root = file.parent / str(content.get("path") or ".")
    # Ultralytics takes `path` from its own datasets folder; elsewhere only the yaml's place is known.
    roots = [root, file.parent] if root.is_dir() else [file.parent]
    sources = {}
    for key, split in KEYS.items():
        value = content.get(key)
        if value and split not in sources:
            values = value if isinstance(value, list) else [value]
            sources[split] = tuple(_resolve(str(item), roots) for item in values)
    return {split: sources[split] for split in ordered(sources)}


def _resolve(name: str, roots: list[Path]) -> Path:
    beside = name
    while beside.startswith("../"):
        beside = beside.removeprefix("../")
    for candidate in dict.fromkeys((name, beside)):
        for root in roots:
            if (root / candidate).exists():
                return root / candidate
    return roots[0] / name


def _class_table(file: Path, raw: RawSet) -> dict[int | str, str]:
    content = _load(file)
    names, n_classes = content.get("names"), content.get("nc")
    if names is None and isinstance(n_classes, int):
        raw.problem("class-note", file.name, f"no names: classes are called 0 … {n_classes - 1}")
        names = [str(i) for i in range(n_classes)]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(f"'{file}': `names` must be a list or a mapping of id to name, got {names!r}.")
    try:
        table: dict[int | str, str] = {int(key): str(names[key]) for key in sorted(names, key=int)}
    except ValueError as error:
        raise DataError(f"'{file}': the keys of `names` must be whole numbers: {error}.") from error
    if isinstance(n_classes, int) and n_classes != len(table):
        raw.problem("class-list", file.name, f"nc is {n_classes}, but there are {len(table)} names")
    return table


def _listed(source: Path, root: Path) -> list[Path]:
    """The images of a folder, or those a text file lists."""
    if source.is_dir():
        return list_images(source)
    if source.suffix != ".txt" or not source.is_file():
        raise DataError(
            f"'{source}' is neither a folder nor a .txt list of images. Correct the path in the yaml."
        )
    lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    return [_listed_image(line, (source.parent, root)) for line in lines if line]


def _listed_image(line: str, folders: tuple[Path, ...]) -> Path:
    for folder in folders:
        if (folder / line).is_file():
            return folder / line
    return folders[0] / line


def _image(i: int, path: Path, root: Path, split: str, raw: RawSet) -> RawImage:
    name = relative_name(path, root)
    image = RawImage(image_id=i, name=name, path=path if path.is_file() else None, where=name)
    labels = label_file(path)
    if labels.is_file():
        image.where = relative_name(labels, root)
        for number, row in read_label_lines(labels.read_text(encoding="utf-8-sig", errors="replace")):
            if isinstance(row, str):
                raw.problem("malformed", f"{image.where}:{number}", row, split)
            else:
                image.add(row[1], row[0])
    return image


def _name_orphans(images: list[Path], split: str, raw: RawSet) -> None:
    """Name label files without an image. One whose image a list leaves out on purpose is no orphan."""
    for folder in sorted({label_file(image).parent for image in images}):
        known = {label_file(image) for image in images}
        siblings = {image.parent for image in images if label_file(image).parent == folder}
        stems = {path.stem for sibling in siblings for path in sibling.iterdir() if is_image(path)}
        for path in sorted(folder.glob("*.txt")) if folder.is_dir() else []:
            if path not in known and path.stem not in stems and path.name not in NOT_LABELS:
                raw.problem("unknown-image", path.name, f"no image '{path.stem}.*'", split)
