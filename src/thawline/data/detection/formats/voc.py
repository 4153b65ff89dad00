"""Pascal VOC: an XML file per image.

    Annotations/a.xml  JPEGImages/a.jpg  ImageSets/Main/train.txt   the devkit's layout; or train.txt above
    annotations/a.xml  images/a.jpg                                 without lists: all images are `train`
    train/a.xml        train/a.jpg       valid/…                    Roboflow's layout

The image is the one in `filename` if it has the name of the XML file, else the one with that name, as in the
devkit, else the one in `filename`, which many tools leave unchanged when files are renamed. The format has no
ids, so labels follow the sorted class names. Corners are pixel edges counted from 0, as today's tools write
them. The VOC challenges' own files count pixels from 1 and include the last: if `<source>` names VOC20xx, 1
is subtracted from xmin and ymin. An object without `bndbox` gets the box around its polygon. Objects marked
`difficult` are kept.
"""

from __future__ import annotations

__all__ = ["HINT", "look", "read"]

import re
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from thawline.data.detection.formats.places import (
    Places,
    existing,
    files_in,
    read_text,
    relative_name,
    subfolders,
)
from thawline.data.detection.formats.raw import Found, RawBox, RawImage, RawSet, box_around
from thawline.data.detection.formats.splits import ordered, split_of
from thawline.data.detection.formats.values import to_number, to_size
from thawline.data.detection.images import is_image

HINT = "XML files in Annotations/ (or annotations/), or next to the images in train/ and valid/"

XML_FOLDERS = ("Annotations", "annotations", "xml", "labels")


def look(path: Path) -> list[Found]:
    """Return the VOC dataset in a folder, if there is one."""
    if path.is_file():
        return []
    by_split: dict[str, Path] = {}
    annotations = next((path / name for name in XML_FOLDERS if _has_voc(path / name)), None)
    if annotations is not None:
        by_split = _split_lists(path)
    else:
        for folder in subfolders(path):
            if (split := split_of(folder.name)) and _has_voc(folder):
                by_split[split] = folder
        annotations = path if _has_voc(path) else None
    splits = by_split or ({"train": annotations} if annotations else {})
    if not splits:
        return []
    sources: dict[str, tuple[Path, ...]] = {split: (splits[split],) for split in ordered(splits)}
    return [Found(format="voc", root=path, splits=sources, is_split=bool(by_split))]


def read(found: Found, images: Path | None = None) -> RawSet:
    """Read what `look` found; `images` is the folder of the images, if it is not near the XML files."""
    raw = RawSet(format="voc", root=found.root)
    for split, (source,) in found.splits.items():
        folder = source if source.is_dir() else existing(found.root / name for name in XML_FOLDERS)[0]
        files = files_in(folder, ".xml") if source.is_dir() else _listed(source, folder, split, raw)
        folders = [images] if images is not None else _image_folders(found.root, folder, split)
        places = Places(folders, split if found.is_split and source.is_dir() else None)
        raw.searched[split] = folders
        raw.splits[split] = [_read_image(i, file, places, split, raw) for i, file in enumerate(files)]
    names = sorted(str(name) for name in set().union(*map(raw.used_ids, raw.splits)))
    raw.classes = {split: dict(zip(names, names, strict=True)) for split in raw.splits}
    return raw


def _read_image(i: int, file: Path, places: Places, split: str, raw: RawSet) -> RawImage:
    where = relative_name(file, raw.root)
    image = RawImage(image_id=i, name=file.stem, where=where)
    if file.is_file():
        faults = _read_xml(file, image, raw, split)
    else:
        # Listed in ImageSets without annotations: its content is unknown, so it is not a negative.
        faults = ["listed in ImageSets, but there is no such file"]
        image.is_unusable = True
    for fault in faults:
        raw.add_problem("malformed", where, fault, split)
    has_own_name = PureWindowsPath(image.name).stem == file.stem
    same_stem = places.find(image.name) if has_own_name else []
    raw.locate(image, same_stem or places.find(file.stem) or places.find(image.name), split)
    return image


def _read_xml(path: Path, image: RawImage, raw: RawSet, split: str) -> list[str]:
    """Read an XML file's image name, size and boxes into `image`. Returns: what is wrong, one line each."""
    try:
        root = _parse(path, raw, split)
    except (ElementTree.ParseError, LookupError) as error:
        image.is_unusable = True
        return [f"not XML: {error}"]
    image.name = (root.findtext("filename") or "").strip() or image.name
    faults = []
    try:
        image.size = to_size(root.findtext("size/width"), root.findtext("size/height"))
    except ValueError as error:
        faults.append(f"size {error}")
    source = " ".join(node.text or "" for node in root.iterfind("source/*"))
    first = 1.0 if "VOC20" in source else 0.0
    for number, node in enumerate(root.iter("object"), start=1):
        name = (node.findtext("name") or "").strip()
        try:
            x1, y1, x2, y2 = _corners(node)
        except ValueError as error:
            faults.append(f"object {number}: {error}")
            continue
        if name:
            image.boxes.append(RawBox((x1 - first, y1 - first, x2, y2), name))
        else:
            faults.append(f"object {number}: no name")
    return faults


def _parse(path: Path, raw: RawSet, split: str) -> Element:
    """Parse an XML file; one that is not in the encoding that it names is read as text of another.

    Returns: its root, with tags in lower case and without namespaces.
    """
    data = path.read_bytes()
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError):
        named = re.match(rb"""[^>]*encoding=["']([\w-]+)""", data)
        encoding = named[1].decode() if named else "utf-8"
        is_utf = encoding.lower().startswith("utf")
        text = raw.read_text(path, split) if is_utf else data.decode(encoding, errors="replace")
        root = ElementTree.fromstring(text)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2].lower()
    return root


def _corners(node: Element) -> tuple[float, float, float, float]:
    """Return the corners of an object's box, or of the box around its polygon. Raises: ValueError."""
    polygon = node.find("polygon")
    if node.find("bndbox") is None and polygon is not None:
        xs, ys = (
            [to_number(child.text) for child in polygon.iter() if re.fullmatch(rf"{axis}\d*", child.tag)]
            for axis in "xy"
        )
        return box_around(xs, ys)
    corners = [node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x1, y1, x2, y2 = map(to_number, corners)
    except ValueError as error:
        raise ValueError(f"bndbox must be four numbers, got {corners}") from error
    return x1, y1, x2, y2


def _has_voc(folder: Path) -> bool:
    return any("<annotation" in read_text(file)[:2048] for file in files_in(folder, ".xml"))


def _split_lists(root: Path) -> dict[str, Path]:
    """Return the lists of ImageSets/Main, of ImageSets or beside it.

    `trainval` is the training data unless it is split into both.
    """
    lists: dict[str, Path] = {}
    for folder in (root / "ImageSets" / "Main", root / "ImageSets", root):
        paths = {name: folder / f"{name}.txt" for name in ("train", "val", "test", "trainval")}
        lists = lists or {name: path for name, path in paths.items() if path.is_file()}
    both = lists.pop("trainval", None)
    if both and not {"train", "val"} <= lists.keys():
        lists["train"] = both
    return lists


def _listed(source: Path, folder: Path, split: str, raw: RawSet) -> list[Path]:
    """Return the XML files of a list, whose lines are names, with spaces or not, and maybe a number."""
    places = Places([folder], suffixes=(".xml",))
    files = []
    for line in filter(None, map(str.strip, raw.read_text(source, split).splitlines())):
        line = line.removesuffix(".xml")
        names = [line, re.sub(r"\s+-?\d+$", "", line)]
        names += [str(PureWindowsPath(name).with_suffix("")) for name in names if is_image(Path(name))]
        found = next((found for name in names if (found := places.find(f"{name}.xml"))), None)
        files.append(found[0] if found else folder / f"{names[1]}.xml")
    return files


def _image_folders(root: Path, folder: Path, split: str) -> list[Path]:
    names = ("JPEGImages", "images", split)
    return existing([folder, *(base / name for base in (root, folder.parent) for name in names), root])
