"""Generated images of circles, squares and triangles: a detection dataset that needs no download."""

from __future__ import annotations

__all__ = ["CLASSES", "draw_shapes", "write_shapes"]


from pathlib import Path
from typing import Any

import numpy as np

from thawline.data.detection.images import opencv
from thawline.files import write_json

CLASSES = ("circle", "square", "triangle")
SIDE = 192
"""Side of an image, pixels."""
SIZES = (36, 80)
"""Sides of the boxes, pixels."""
MAX_SHAPES = 4
"""Maximum shapes per image."""


def write_shapes(folder: Path, n_train: int, n_val: int, *, seed: int = 0) -> Path:
    """Write a COCO dataset of `n_train` and `n_val` images; return its folder."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for split, n_images in (("train", n_train), ("val", n_val)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(n_images):
            image, boxes, labels = draw_shapes(rng)
            name = f"{split}_{index:04d}.png"
            opencv().imwrite(str(folder / "images" / name), image)
            images.append({"id": index, "file_name": name, "width": SIDE, "height": SIDE})
            annotations += [
                {
                    "id": len(annotations) + i,
                    "image_id": index,
                    "category_id": int(label) + 1,
                    "bbox": [int(x0), int(y0), int(x1 - x0), int(y1 - y0)],
                    "area": int((x1 - x0) * (y1 - y0)),
                    "iscrowd": 0,
                }
                for i, ((x0, y0, x1, y1), label) in enumerate(zip(boxes, labels, strict=True))
            ]
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        values = {"images": images, "annotations": annotations, "categories": categories}
        write_json(folder / f"instances_{split}.json", values, indent=None)
    return folder


def draw_shapes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one to `MAX_SHAPES` separate shapes of any colour on a background of soft spots and noise.

    Returns: the image, (SIDE, SIDE, 3) uint8; boxes (N, 4) xyxy, int; labels (N,).
    """
    spots = opencv().resize(rng.uniform(60, 190, (4, 4, 3)), (SIDE, SIDE), interpolation=opencv().INTER_CUBIC)
    image = np.clip(spots + rng.normal(0, 8, spots.shape), 0, 255).astype(np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(rng.integers(1, MAX_SHAPES + 1)):
        for _ in range(20):  # attempts to find free space
            side = int(rng.integers(*SIZES))
            x, y = (int(v) for v in rng.integers(0, SIDE - side, 2))
            box = (x, y, x + side, y + side)
            if not any(_touch(box, other) for other in boxes):
                boxes.append(box)
                break
    labels = rng.integers(0, len(CLASSES), len(boxes))
    for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
        ground = image[y0:y1, x0:x1].mean((0, 1))
        # Far from the background in every channel, so that every shape is visible.
        share = rng.random(3)
        colour = np.where(ground > 127, share * (ground - 60), 255 - share * (195 - ground))
        _draw(image, CLASSES[label], (x0, y0, x1 - 1, y1 - 1), tuple(colour.tolist()))
    return image, np.array(boxes), labels


def _draw(
    image: np.ndarray, name: str, box: tuple[int, int, int, int], colour: tuple[float, float, float]
) -> None:
    cv2 = opencv()
    x0, y0, x1, y1 = box
    if name == "circle":
        centre, radius = ((x0 + x1) // 2, (y0 + y1) // 2), (x1 - x0) // 2
        cv2.circle(image, centre, radius, colour, -1, cv2.LINE_AA)
    elif name == "square":
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, -1)
    else:
        corners = np.array([[(x0 + x1) // 2, y0], [x0, y1], [x1, y1]])
        cv2.fillPoly(image, [corners], colour, cv2.LINE_AA)


def _touch(a: tuple[int, int, int, int], b: tuple[int, int, int, int], gap: int = 4) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap
