"""Labelled images: boxes and class names drawn on an image, and grids of such images.

In a grid, images are scaled before they are drawn on, so that lines and text are legible at any image size.
"""

from __future__ import annotations

__all__ = ["Panel", "class_colours", "draw_boxes", "draw_panel", "encode_image", "panel_grid", "save_image"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from thawline.data.detection.images import opencv
from thawline.errors import requires_extra
from thawline.files import atomic_file

if TYPE_CHECKING:
    import supervision

PAPER = 255
"""Grey of the background between images."""
INK = (40, 40, 40)
CAPTION_HEIGHT = 22
MARGIN = 6
LABEL_SIZE = 11
"""Font size of class names, pixels."""
# fmt: off
COLOURS = [
    "e11e2d", "0000ff", "00a500", "0087c3", "ff00c3", "5a4b0f", "690f4b", "8769f0",
    "00a587", "d27800", "d27878", "969600", "d200ff", "d20069", "005a00", "781e00",
]
# fmt: on
"""Colours of class 0, 1, …, repeated after the last. Each is the one farthest in CIELAB from those before it,
among colours on which white text is legible: any two are 38 apart, supervision's neighbours down to 21."""
COVERED = 0.15
"""Maximum share of an image that names may cover; above it only boxes are drawn, in the legend's colours."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One image of a grid."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    boxes_xyxy: np.ndarray
    """(N, 4), pixels of `image`."""
    labels: np.ndarray
    """(N,), int."""
    scores: np.ndarray | None = None
    """(N,), written after the names. None: annotations have no scores."""
    caption: str = ""


def panel_grid(
    panels: Sequence[Panel], class_names: Sequence[str], columns: int = 4, cell: tuple[int, int] = (360, 300)
) -> np.ndarray:
    """Draw images side by side, each with its caption, under a legend of the classes that they show.

    Args:
        panels: at least one.        class_names: the name of label 0, 1, ….
        cell: (width, height) that each image is scaled to fit into, pixels.
    Returns: (H, W, 3) uint8, RGB.
    """
    columns = min(columns, len(panels))
    width = columns * (cell[0] + MARGIN) + MARGIN
    shown = sorted({int(label) for panel in panels for label in panel.labels})
    strips = [_legend({label: class_names[label] for label in shown}, width)]
    for first in range(0, len(panels), columns):
        row = panels[first : first + columns]
        images = [draw_panel(panel, class_names, cell) for panel in row]
        strip = np.full((CAPTION_HEIGHT + max(map(len, images)) + MARGIN, width, 3), PAPER, np.uint8)
        for i, (panel, image) in enumerate(zip(row, images, strict=True)):
            left = i * (cell[0] + MARGIN) + MARGIN
            _write_caption(strip[:CAPTION_HEIGHT, left : left + cell[0]], panel.caption)
            strip[CAPTION_HEIGHT : CAPTION_HEIGHT + len(image), left : left + image.shape[1]] = image
        strips.append(strip)
    return np.concatenate(strips)


def draw_panel(panel: Panel, class_names: Sequence[str], fit: tuple[int, int] | None = None) -> np.ndarray:
    """Draw an image with its boxes, (H, W, 3) uint8, RGB; `fit`: (width, height) to scale it to first."""
    cv2 = opencv()
    height, width = panel.image.shape[:2]
    scale = min(fit[0] / width, fit[1] / height) if fit else 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = cv2.resize(panel.image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    boxes = panel.boxes_xyxy * np.tile([size[0] / width, size[1] / height], 2)
    names = [class_names[label] for label in panel.labels]
    if panel.scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, panel.scores, strict=True)]
    # A letter is about half as wide as it is high; two pixels of padding on every side.
    covered = sum(map(len, names)) * LABEL_SIZE // 2 * (LABEL_SIZE + 4)
    if covered > COVERED * size[0] * size[1]:
        return draw_boxes(image, boxes, panel.labels, thickness=1)
    return draw_boxes(image, boxes, panel.labels, names, avoid_overlap=True)


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] = (),
    *,
    thickness: int = 2,
    font_size: int = LABEL_SIZE,
    padding: int = 2,
    avoid_overlap: bool = False,
) -> np.ndarray:
    """Draw boxes in their classes' colours, with names; RGB in, RGB out.

    Args:
        boxes_xyxy: (N, 4), pixels.        labels: (N,), int.
        names: text for each box. Empty: boxes only.
        avoid_overlap: move names apart, away from their boxes if need be.
    """
    if not len(boxes_xyxy):
        return image
    sv = _supervision()
    found = sv.Detections(xyxy=boxes_xyxy.astype(np.float32), class_id=labels.astype(int))
    image = np.ascontiguousarray(image[..., ::-1])  # supervision draws for OpenCV, which has blue first
    image = sv.BoxAnnotator(class_colours(), thickness=thickness).annotate(image, found)
    if names:
        annotator = sv.RichLabelAnnotator(
            class_colours(), font_size=font_size, text_padding=padding, smart_position=avoid_overlap
        )
        image = annotator.annotate(image, found, labels=list(names))
    return np.ascontiguousarray(image[..., ::-1])


def class_colours() -> supervision.ColorPalette:
    """Return the colour of each class, for supervision's annotators."""
    return _supervision().ColorPalette.from_hex(COLOURS)


def save_image(path: Path, image: np.ndarray) -> Path:
    """Write an RGB image, in the format of the path's suffix, and return the path."""
    suffix = ".jpg" if path.suffix.lower() == ".jfif" else path.suffix
    with atomic_file(path) as temporary:
        temporary.write_bytes(encode_image(image, suffix))
    return path


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """Return an RGB image as a file of a format, e.g. ".png"."""
    _, data = opencv().imencode(suffix, np.ascontiguousarray(image[..., ::-1]))
    encoded: bytes = data.tobytes()
    return encoded


def _legend(class_names: Mapping[int, str], width: int) -> np.ndarray:
    """Draw classes by number in their colours, on as many lines as needed."""
    from PIL import Image, ImageDraw

    palette, side = class_colours(), CAPTION_HEIGHT // 2
    canvas = Image.new("RGB", (width, CAPTION_HEIGHT * max(1, len(class_names))), (PAPER,) * 3)
    pen = ImageDraw.Draw(canvas)
    left, top = MARGIN, 0
    for label, name in class_names.items():
        entry_width = int(pen.textlength(name)) + CAPTION_HEIGHT + 2 * MARGIN
        if left > MARGIN and left + entry_width > width:
            left, top = MARGIN, top + CAPTION_HEIGHT
        square = (left, top + side // 2, left + side, top + side // 2 + side)
        pen.rectangle(square, fill=palette.by_idx(label).as_rgb())
        pen.text((left + side + MARGIN, top + side), name, fill=INK, anchor="lm")
        left += entry_width
    return np.asarray(canvas)[: top + CAPTION_HEIGHT]


def _write_caption(strip: np.ndarray, text: str) -> None:
    """Write a caption into a strip of the grid; long ones (file names) are cut at the start."""
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(strip)
    pen = ImageDraw.Draw(canvas)
    while text and pen.textlength(text) > strip.shape[1]:
        text = "…" + text.lstrip("…")[1:]
    pen.text((0, CAPTION_HEIGHT // 2), text, fill=INK, anchor="lm")
    strip[:] = np.asarray(canvas)


def _supervision() -> ModuleType:
    with requires_extra("Drawing boxes", "supervision", "detect"):
        import supervision
    return supervision
