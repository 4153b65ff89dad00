"""Labelled pictures: boxes and names on an image, and many such images in one grid.

Pictures are scaled first and drawn on afterwards, so that lines and letters are legible at any image size.
"""

from __future__ import annotations

__all__ = ["Panel", "class_colours", "draw_panel", "panel_grid", "save_picture"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from thawline.data.detection.images import opencv
from thawline.errors import MissingExtraError

if TYPE_CHECKING:
    import supervision

PAPER = 255
"""Grey of the ground between pictures."""
INK = (40, 40, 40)
CAPTION_HEIGHT = 22
MARGIN = 6
LABEL_SIZE = 11
"""Pixels of a class name's letters."""
# fmt: off
COLOURS = [
    "e11e2d", "0000ff", "00a500", "0087c3", "ff00c3", "5a4b0f", "690f4b", "8769f0",
    "00a587", "d27800", "d27878", "969600", "d200ff", "d20069", "005a00", "781e00",
]
# fmt: on
"""Of class 0, 1, …, and from the first again. Each is the one farthest in CIELAB from those before it, among
colours that white letters are legible on: any two are 38 apart, supervision's neighbours down to 21."""
COVERED = 0.15
"""Where names would cover more of a picture, lines alone are drawn: the legend has the colours."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One picture of a grid."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    boxes_xyxy: np.ndarray
    """(N, 4), pixels of `image`."""
    labels: np.ndarray
    """(N,), int."""
    scores: np.ndarray | None = None
    """(N,), written beside the names. None: annotations have no scores."""
    caption: str = ""


def panel_grid(
    panels: Sequence[Panel], class_names: Sequence[str], columns: int = 4, cell: tuple[int, int] = (360, 300)
) -> np.ndarray:
    """Pictures side by side, each with its caption, under a legend of the classes.

    Args:
        panels: at least one.        class_names: the name of label 0, 1, ….
        cell: (width, height) that a picture is fitted into, pixels.
    Returns: (H, W, 3) uint8, RGB.
    """
    columns = min(columns, len(panels))
    pictures = [draw_panel(panel, class_names, cell) for panel in panels]
    width = columns * (cell[0] + MARGIN) + MARGIN
    strips = [_legend(class_names, width)]
    for first in range(0, len(panels), columns):
        row = pictures[first : first + columns]
        strip = np.full((CAPTION_HEIGHT + max(map(len, row)) + MARGIN, width, 3), PAPER, np.uint8)
        for i, picture in enumerate(row):
            left = i * (cell[0] + MARGIN) + MARGIN
            _write(strip[:CAPTION_HEIGHT, left : left + cell[0]], panels[first + i].caption)
            strip[CAPTION_HEIGHT : CAPTION_HEIGHT + len(picture), left : left + picture.shape[1]] = picture
        strips.append(strip)
    return np.concatenate(strips)


def draw_panel(panel: Panel, class_names: Sequence[str], fit: tuple[int, int] | None = None) -> np.ndarray:
    """The picture with its boxes, (H, W, 3) uint8, RGB; `fit`: scaled to fit into (width, height), pixels."""
    sv, cv2 = _supervision(), opencv()
    height, width = panel.image.shape[:2]
    scale = min(fit[0] / width, fit[1] / height) if fit else 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = cv2.resize(panel.image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    if not len(panel.boxes_xyxy):
        return picture
    boxes = panel.boxes_xyxy * np.tile([size[0] / width, size[1] / height], 2)
    found = sv.Detections(xyxy=boxes.astype(np.float32), class_id=panel.labels.astype(int))
    names = [class_names[label] for label in panel.labels]
    if panel.scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, panel.scores, strict=True)]
    # A letter is about half as wide as it is high; two pixels of margin all around.
    covered = sum(map(len, names)) * LABEL_SIZE // 2 * (LABEL_SIZE + 4)
    is_crowded = covered > COVERED * size[0] * size[1]
    # supervision draws for OpenCV, which has blue first.
    picture = np.ascontiguousarray(picture[..., ::-1])
    colours = class_colours()
    picture = sv.BoxAnnotator(colours, thickness=1 if is_crowded else 2).annotate(picture, found)
    if not is_crowded:
        writer = sv.RichLabelAnnotator(colours, font_size=LABEL_SIZE, text_padding=2, smart_position=True)
        picture = writer.annotate(picture, found, labels=names)
    return np.ascontiguousarray(picture[..., ::-1])


def class_colours() -> supervision.ColorPalette:
    """The colour of each class, for supervision's annotators."""
    return _supervision().ColorPalette.from_hex(COLOURS)


def save_picture(path: Path, image: np.ndarray) -> Path:
    """Write an RGB image; the name's ending decides the format. Returns: the path."""
    cv2 = opencv()
    _, data = cv2.imencode(path.suffix, np.ascontiguousarray(image[..., ::-1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())
    return path


def _legend(class_names: Sequence[str], width: int) -> np.ndarray:
    """The classes in their colours, in as many lines as they need."""
    from PIL import Image, ImageDraw

    palette = class_colours()
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, left, line = [], MARGIN, 0
    for name in class_names:
        wide = int(pen.textlength(name)) + CAPTION_HEIGHT + 2 * MARGIN
        if left > MARGIN and left + wide > width:
            left, line = MARGIN, line + 1
        places.append((left, line * CAPTION_HEIGHT))
        left += wide
    canvas = Image.new("RGB", (width, (line + 1) * CAPTION_HEIGHT), (PAPER,) * 3)
    pen = ImageDraw.Draw(canvas)
    for label, (name, (x, y)) in enumerate(zip(class_names, places, strict=True)):
        side = CAPTION_HEIGHT // 2
        square = (x, y + side // 2, x + side, y + side // 2 + side)
        pen.rectangle(square, fill=palette.by_idx(label).as_rgb())
        pen.text((x + side + MARGIN, y + CAPTION_HEIGHT // 2), name, fill=INK, anchor="lm")
    return np.asarray(canvas)


def _write(strip: np.ndarray, text: str) -> None:
    """Write a caption into a strip of the grid; what is too long loses its beginning, as file names do."""
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(strip)
    pen = ImageDraw.Draw(canvas)
    while text and pen.textlength(text) > strip.shape[1]:
        text = "…" + text.lstrip("…")[1:]
    pen.text((0, CAPTION_HEIGHT // 2), text, fill=INK, anchor="lm")
    strip[:] = np.asarray(canvas)


def _supervision() -> ModuleType:
    try:
        import supervision
    except ImportError as error:
        raise MissingExtraError("Drawing boxes", "supervision", "detect") from error
    return supervision
