"""Pascal VOC: an XML file per image.

    Annotations/a.xml  JPEGImages/a.jpg  ImageSets/Main/train.txt   the devkit's layout
    annotations/a.xml  images/a.jpg                                 without lists: all images are `train`
    train/a.xml        train/a.jpg       valid/…                    Roboflow's layout

The image is the one with the name of the XML file, as in the devkit; else the one in `filename`, which many
tools leave unchanged when files are renamed. The format has no ids, so labels follow the sorted class names.
Corners are pixel edges counted from 0, as today's tools write them. The VOC challenges' own files count
pixels from 1 and include the last: if `<source>` names VOC20xx, 1 is subtracted from xmin and ymin. Objects
marked `difficult` are kept.
"""

from __future__ import annotations

__all__ = ["HINT", "look", "read"]

from pathlib import Path
from xml.etree import ElementTree

from thawline.data.detection.formats.raw import (
    Found,
    RawBox,
    RawImage,
    RawSet,
    existing,
    find_image,
    ordered,
    relative_name,
    split_of,
)
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
        for folder in sorted(path.iterdir()):
            if folder.is_dir() and (split := split_of(folder.name)) and _has_voc(folder):
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
        folder, files = _xml_files(source, found.root)
        folders = [images] if images is not None else _image_folders(found.root, folder, split)
        by_stem = {path.stem: path for base in reversed(folders) for path in base.iterdir() if is_image(path)}
        raw.searched[split] = folders
        raw.splits[split] = [_read_image(i, file, by_stem, split, raw) for i, file in enumerate(files)]
    names = sorted(str(name) for name in set().union(*map(raw.used_ids, raw.splits)))
    raw.classes = {split: dict(zip(names, names, strict=True)) for split in raw.splits}
    return raw


def _read_image(i: int, file: Path, by_stem: dict[str, Path], split: str, raw: RawSet) -> RawImage:
    where = relative_name(file, raw.root)
    image = RawImage(image_id=i, name=file.stem, path=by_stem.get(file.stem), where=where)
    if file.is_file():
        faults = _read_xml(file, image)
    else:
        # Listed in ImageSets without annotations: its content is unknown, so it is not a negative.
        faults = ["listed in ImageSets, but there is no such file"]
        image.is_unreadable = True
    for fault in faults:
        raw.add_problem("malformed", where, fault, split)
    if image.path is None:
        image.path = find_image(image.name, raw.searched[split])
    return image


def _read_xml(path: Path, image: RawImage) -> list[str]:
    """Read an XML file's image name, size and boxes into `image`. Returns: what is wrong, one line each."""
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
        if name:
            image.boxes.append(RawBox((x1 - first, y1 - first, x2, y2), name))
        else:
            faults.append(f"object {number}: no name")
    return faults


def _has_voc(folder: Path) -> bool:
    first = next(folder.glob("*.xml"), None)
    return first is not None and b"<annotation" in first.read_bytes()[:2048]


def _split_lists(root: Path) -> dict[str, Path]:
    """Return the lists of ImageSets/Main; `trainval` is the training data unless it is split into both."""
    folder = root / "ImageSets" / "Main"
    lists = {name: folder / f"{name}.txt" for name in ("train", "val", "test", "trainval")}
    lists = {name: path for name, path in lists.items() if path.is_file()}
    both = lists.pop("trainval", None)
    if both and not {"train", "val"} <= lists.keys():
        lists["train"] = both
    return lists


def _xml_files(source: Path, root: Path) -> tuple[Path, list[Path]]:
    """Return the folder of the XML files, and those of a split: all in it, or those of a list."""
    if source.is_dir():
        return source, sorted(source.glob("*.xml"))
    folder = existing(root / name for name in XML_FOLDERS)[0]
    stems = [line.split()[0] for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    return folder, [folder / f"{stem}.xml" for stem in stems]


def _image_folders(root: Path, folder: Path, split: str) -> list[Path]:
    names = ("JPEGImages", "images", split)
    return existing([folder, *(base / name for base in (root, folder.parent) for name in names), root])
