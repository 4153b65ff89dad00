"""One tiny detection set and its copies in every format, as that format's tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image

NAMES = ("ant", "bee", "cat")
Box = tuple[float, float, float, float]
SETS: dict[str, dict[str, tuple[tuple[int, int], list[tuple[str, Box]]]]] = {
    "train": {
        "a": ((40, 30), [("bee", (4, 3, 24, 18)), ("cat", (10, 6, 30, 27))]),
        "b": ((50, 20), []),
        "c": ((32, 64), [("ant", (0, 0, 16, 32))]),
    },
    "val": {"d": ((64, 48), [("cat", (8, 12, 40, 36))]), "e": ((20, 20), [("ant", (5, 5, 15, 20))])},
}
"""Split → image → ((width, height), [(class, xyxy)]); all sizes different."""


def write_images(folder: Path, split: str, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, ((width, height), _) in SETS[split].items():
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}{suffix}")


def coco_content(split: str, ids: tuple[int, int, int] = (1, 2, 3), first_image: int = 0) -> dict:
    content: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in zip(ids, NAMES, strict=True)],
    }
    for i, (name, ((width, height), boxes)) in enumerate(SETS[split].items(), start=first_image):
        content["images"].append({"id": i, "file_name": f"{name}.png", "width": width, "height": height})
        for label, (x1, y1, x2, y2) in boxes:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": i,
                    "category_id": ids[NAMES.index(label)],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    return content


def write_coco(root: Path, ids: tuple[int, int, int] = (1, 2, 3)) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split in SETS:
        write_images(root / f"{split}2017", split)
        save_json(root / "annotations" / f"instances_{split}2017.json", coco_content(split, ids))
    return root


def write_yolo(root: Path, images_first: bool = True, names: object = list(NAMES)) -> Path:
    for split in SETS:
        images, labels = (
            (root / "images" / split, root / "labels" / split)
            if images_first
            else (root / split / "images", root / split / "labels")
        )
        write_images(images, split)
        labels.mkdir(parents=True)
        for name, ((width, height), boxes) in SETS[split].items():
            lines = [
                f"{NAMES.index(label)} {(x1 + x2) / 2 / width!r} {(y1 + y2) / 2 / height!r} "
                f"{(x2 - x1) / width!r} {(y2 - y1) / height!r}\n"
                for label, (x1, y1, x2, y2) in boxes
            ]
            (labels / f"{name}.txt").write_text("".join(lines))
    folder = "images/{}" if images_first else "{}/images"
    save_yaml(root / "data.yaml", {split: folder.format(split) for split in SETS} | {"nc": 3, "names": names})
    return root


def write_voc(root: Path) -> Path:
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    for split in SETS:
        write_images(root / "JPEGImages", split)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(SETS[split]) + "\n")
        for name in SETS[split]:
            write_voc_file(root / "Annotations", split, name)
    return root


def write_voc_file(
    folder: Path, split: str, name: str, filename: str | None = None, source: str = ""
) -> None:
    (width, height), boxes = SETS[split][name]
    top = ElementTree.Element("annotation")
    ElementTree.SubElement(top, "filename").text = filename or f"{name}.png"
    ElementTree.SubElement(ElementTree.SubElement(top, "source"), "database").text = source
    size = ElementTree.SubElement(top, "size")
    for side, value in (("width", width), ("height", height)):
        ElementTree.SubElement(size, side).text = str(value)
    for label, box in boxes:
        node = ElementTree.SubElement(top, "object")
        ElementTree.SubElement(node, "name").text = label
        corners = ElementTree.SubElement(node, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(corners, key).text = str(value)
    ElementTree.ElementTree(top).write(folder / f"{name}.xml")


def save_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save_yaml(path: Path, content: object) -> None:
    path.write_text(yaml.safe_dump(content))
