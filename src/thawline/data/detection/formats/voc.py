"""Pascal VOC: an XML file per image.

    Annotations/a.xml  JPEGImages/a.jpg  ImageSets/Main/train.txt   the devkit's layout
    annotations/a.xml  images/a.jpg                                 the same without lists: all is `train`
    train/a.xml        train/a.jpg       valid/…                    Roboflow's layout

The image is the one that is called like the XML file, as in the devkit; else the one that `filename` names,
which many tools leave stale when files are renamed. Without ids in the format, labels follow the sorted class
names. Corners are taken as pixel edges counted from 0, as today's tools write them. The VOC challenges' own
files count pixels from 1 and include the last: where `<source>` names VOC20xx, 1 is taken from xmin and ymin.
Objects marked `difficult` are objects like any other.
"""

from __future__ import annotations

__all__ = ["HINT", "look", "read", "read_voc_xml"]

from pathlib import Path
from xml.etree import ElementTree

from thawline.data.detection.formats.raw import (
    Found,
    RawImage,
    RawSet,
    existing,
    find_image,
    ordered,
    relative_name,
    split_of,
)
from thawline.data.detection.images import is_image

HINT = "XML files in Annotations/ (or annotations/), or beside the images in train/ and valid/"


def look(path: Path) -> list[Found]:
    """The VOC data set at a folder, if there is one."""
    if path.is_file():
        return []
    for folder in existing(path / name for name in ("Annotations", "annotations", "xml", "labels")):
        if _has_voc(folder):
            lists = _split_lists(path)
            splits = lists or {"train": (folder,)}
            return [Found(format="voc", root=path, splits=splits, is_split=bool(lists))]
    by_split: dict[str, tuple[Path, ...]] = {
        split: (folder,)
        for folder in sorted(path.iterdir())
        if folder.is_dir() and (split := split_of(folder.name)) and _has_voc(folder)
    }
    if by_split:
        by_split = {split: by_split[split] for split in ordered(by_split)}
        return [Found(format="voc", root=path, splits=by_split, is_split=True)]
    return (
        [Found(format="voc", root=path, splits={"train": (path,)}, is_split=False)] if _has_voc(path) else []
    )


def read(found: Found, images: Path | None = None) -> RawSet:
    """Read what `look` found; `images` is the folder of the images, where it is not around the XML files."""
    raw = RawSet(format="voc", root=found.root)
    for split, (source,) in found.splits.items():
        folder, files = _xml_files(source, found.root)
        folders = [images] if images is not None else _image_folders(found.root, folder, split)
        by_stem = {path.stem: path for base in reversed(folders) for path in base.iterdir() if is_image(path)}
        raw.looked_in[split] = folders
        raw.splits[split] = [_image(i, file, folders, by_stem, split, raw) for i, file in enumerate(files)]
    used = {str(key) for images_ in raw.splits.values() for image in images_ for key in image.class_ids}
    table: dict[int | str, str] = {name: name for name in sorted(used)}
    raw.classes = dict.fromkeys(raw.splits, table)
    return raw


def read_voc_xml(path: Path, image: RawImage) -> list[str]:
    """Read an XML file's image name, size and boxes into `image`. Returns: what is wrong, a line each."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        image.is_unreadable = True
        return [f"not XML: {error}"]
    image.name = (root.findtext("filename") or "").strip() or image.name
    try:
        width, height = (int(float(root.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
        image.size = (width, height) if width > 0 and height > 0 else None
    except ValueError:
        return [f"size must be numbers, got {[child.text for child in root.iterfind('size/*')]}"]
    source = " ".join(node.text or "" for node in root.iterfind("source/*"))
    first = 1.0 if "VOC20" in source else 0.0
    faults = []
    for number, node in enumerate(root.iterfind("object"), start=1):
        name = (node.findtext("name") or "").strip()
        corners = [node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(corner or "") for corner in corners)
        except ValueError:
            faults.append(f"object {number}: bndbox must be four numbers, got {corners}")
            continue
        if not name:
            faults.append(f"object {number}: no name")
            continue
        image.add((x1 - first, y1 - first, x2, y2), name)
    return faults


def _image(
    i: int, file: Path, folders: list[Path], by_stem: dict[str, Path], split: str, raw: RawSet
) -> RawImage:
    where = relative_name(file, raw.root)
    image = RawImage(image_id=i, name=file.stem, path=by_stem.get(file.stem), where=where)
    if not file.is_file():
        # A name in ImageSets without an XML file: nobody looked at that image, so it is no negative.
        raw.problem("malformed", where, "listed in ImageSets, but there is no such file", split)
        image.is_unreadable = True
        return image
    for fault in read_voc_xml(file, image):
        raw.problem("malformed", where, fault, split)
    if image.path is None:
        image.path = find_image(image.name, folders)
    return image


def _has_voc(folder: Path) -> bool:
    first = next(folder.glob("*.xml"), None)
    return first is not None and b"<annotation" in first.read_bytes()[:2048]


def _split_lists(root: Path) -> dict[str, tuple[Path, ...]]:
    """ImageSets/Main's lists; `trainval` is the training data where `train` and `val` are not told apart."""
    folder = root / "ImageSets" / "Main"
    lists = {name: folder / f"{name}.txt" for name in ("train", "val", "test", "trainval")}
    there = {name: (path,) for name, path in lists.items() if path.is_file()}
    whole = there.pop("trainval", None)
    if whole and not ("train" in there and "val" in there):
        there["train"] = whole
    return {split: there[split] for split in ordered(there)}


def _xml_files(source: Path, root: Path) -> tuple[Path, list[Path]]:
    if source.is_dir():
        return source, sorted(source.glob("*.xml"))
    folder = existing(root / name for name in ("Annotations", "annotations", "xml", "labels"))[0]
    stems = [line.split()[0] for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    return folder, [folder / f"{stem}.xml" for stem in stems]


def _image_folders(root: Path, folder: Path, split: str) -> list[Path]:
    names = ("JPEGImages", "images", split)
    return existing([folder, *(base / name for base in (root, folder.parent) for name in names), root])
