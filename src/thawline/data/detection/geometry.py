"""Geometric augmentation of pixels and boxes: zoom-out, IoU crop, flips, resizing, affine maps.

Zoom-out, crop and flips only choose a region, so they are collected in a `View` and cost nothing;
`View.render` resizes the visible part once, straight to the network's size, and moves boxes by the same
numbers as the pixels. Beyond the image it is black.

Boxes are xyxy in continuous coordinates: pixel i covers [i, i + 1).
Zoom-out and crop: Liu et al., SSD, ECCV 2016, with torchvision's constants, which the published runs used.
"""

from __future__ import annotations

__all__ = ["View", "affine_boxes", "large_enough", "random_affine", "resize", "shrink"]

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from thawline.data.detection.images import opencv

# IoU crop: required overlaps (1 leaves the image alone), tries for each, sides and their ratio.
_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_TRIES = 40
_SIDES = (0.3, 1.0)
_RATIOS = (0.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class View:
    """Rectangle in the pixels of an image, possibly larger than it, with its flips."""

    left: int
    top: int
    width: int
    height: int
    hflip: bool = False
    """Left and right are swapped."""
    vflip: bool = False
    """Top and bottom are swapped."""

    @classmethod
    def of(cls, image: np.ndarray) -> View:
        """Return the view of a whole image."""
        return cls(left=0, top=0, width=image.shape[1], height=image.shape[0])

    def zoom_out(self, rng: np.random.Generator, max_side: float) -> View:
        """Return a view 1 to `max_side` times as large, with this one anywhere in it."""
        side, across, down = rng.random(3)
        side = 1 + side * (max_side - 1)
        width, height = int(self.width * side), int(self.height * side)
        left = self.left - int((width - self.width) * across)
        top = self.top - int((height - self.height) * down)
        return replace(self, left=left, top=top, width=width, height=height)

    def crop(self, rng: np.random.Generator, boxes: np.ndarray) -> View:
        """Return a part of the view that holds the centre of a box and overlaps such a box enough.

        A required overlap is drawn and a number of crops are tried; if all fail, another overlap is drawn.
        Without boxes, or with the overlap 1, the view stays.

        Args:
            boxes: (N, 4), pixels of the image.
        """
        if not len(boxes):
            return self
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        while (overlap := _OVERLAPS[rng.integers(len(_OVERLAPS))]) < 1:
            tries = self._tries(rng)
            inside = (centres > tries[:, None, :2]) & (centres < tries[:, None, 2:])
            reached = np.where(inside.all(-1), _overlaps(tries, boxes), -1.0).max(1)
            good = np.flatnonzero(reached >= overlap)
            if len(good):
                left, top, right, bottom = (int(edge) for edge in tries[good[0]])
                return replace(self, left=left, top=top, width=right - left, height=bottom - top)
        return self

    def _tries(self, rng: np.random.Generator) -> np.ndarray:
        """Draw crops of admissible shape, xyxy in whole pixels."""
        sides = _SIDES[0] + (_SIDES[1] - _SIDES[0]) * rng.random((_TRIES, 2))
        place = rng.random((_TRIES, 2))
        whole = np.array([self.width, self.height])
        size = np.floor(whole * sides)
        start = np.floor((whole - size) * place) + np.array([self.left, self.top])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = size[:, 0] / size[:, 1]
        shaped = (ratio >= _RATIOS[0]) & (ratio <= _RATIOS[1]) & (size > 0).all(1)
        return np.concatenate([start, start + size], axis=1)[shaped]

    def holds_centre(self, boxes: np.ndarray) -> np.ndarray:
        """Return which boxes have their centre inside, (N,) bool."""
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        low, high = [self.left, self.top], [self.left + self.width, self.top + self.height]
        return ((centres > low) & (centres < high)).all(1)

    def clip(self, boxes: np.ndarray) -> np.ndarray:
        """Clip boxes to the view, still in pixels of the image."""
        right, bottom = self.left + self.width, self.top + self.height
        low = np.array([self.left, self.top, self.left, self.top], boxes.dtype)
        return np.clip(boxes, low, np.array([right, bottom, right, bottom], boxes.dtype))

    def render(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        size: tuple[int, int],
        colour: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Render the view as an image of one size.

        Args:
            image: (H, W, 3) uint8.
            boxes: (N, 4), pixels of the image, inside it.
            size: (height, width) of the result, pixels.
            colour: pixelwise colour change; runs on the visible part before or after resizing, whichever has
                fewer pixels, so that the area beyond the image stays black.
        Returns: (height, width, 3) uint8, and the boxes in its pixels, inside it.
        """
        height, width = size
        left, right = max(self.left, 0), min(self.left + self.width, image.shape[1])
        top, bottom = max(self.top, 0), min(self.top + self.height, image.shape[0])
        across, down = width / self.width, height / self.height
        x0, x1 = _span((left - self.left) * across, (right - self.left) * across, width)
        y0, y1 = _span((top - self.top) * down, (bottom - self.top) * down, height)

        part = image[top:bottom, left:right]
        colour_first = (bottom - top) * (right - left) < (x1 - x0) * (y1 - y0)
        if colour is not None and colour_first:
            part = colour(part)
        part, used_width, used_height = shrink(part, x1 - x0, y1 - y0)
        if colour is not None and not colour_first:
            part = colour(part)

        scale = np.array([(x1 - x0) / used_width, (y1 - y0) / used_height] * 2)
        moved = (boxes - [left, top, left, top]) * scale + [x0, y0, x0, y0]
        moved = np.clip(moved, [x0, y0, x0, y0], [x1, y1, x1, y1]).astype(np.float32)
        if part.shape[:2] != size:
            whole = np.zeros((*size, 3), np.uint8)
            whole[y0:y1, x0:x1] = part
            part = whole
        if self.hflip:
            part = opencv().flip(part, 1)
            moved[:, [0, 2]] = width - moved[:, [2, 0]]
        if self.vflip:
            part = opencv().flip(part, 0)
            moved[:, [1, 3]] = height - moved[:, [3, 1]]
        return part, moved


def large_enough(boxes: np.ndarray, min_size: float) -> np.ndarray:
    """Return which boxes have both sides at least `min_size`, (N,) bool."""
    return (boxes[:, 2:] - boxes[:, :2] >= min_size).all(1)


def shrink(image: np.ndarray, width: int, height: int) -> tuple[np.ndarray, int, int]:
    """Resize quickly, for training: average whole blocks of pixels, then interpolate bilinearly.

    Averaging over fractions of pixels, OpenCV's INTER_AREA, is about six times as slow for the same
    closeness to Pillow's antialiased resize. The blocks leave out the last few rows and columns, less than
    one pixel of the result.

    Returns: (height, width, C), and the number of columns and rows of `image` it shows, to scale boxes by.
    """
    cv2 = opencv()
    across, down = max(1, image.shape[1] // width), max(1, image.shape[0] // height)
    rows, columns = image.shape[0] // down, image.shape[1] // across
    if across > 1 or down > 1:
        image = image[: rows * down, : columns * across]
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
    if (columns, rows) != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image, columns * across, rows * down


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize the whole image, for evaluation: area averaging where it shrinks, else bilinear."""
    cv2 = opencv()
    if image.shape[:2] == (height, width):
        return image
    shrinks = width < image.shape[1] or height < image.shape[0]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def random_affine(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    degrees: float = 10.0,
    translate: float = 0.1,
    scale: tuple[float, float] = (0.5, 1.5),
) -> np.ndarray:
    """Draw a rotation, scaling and shift about the centre of a canvas.

    Args:
        rng: random numbers.
        width, height: of the canvas, pixels.
        degrees: largest rotation, either way.
        translate: largest shift as a share of the canvas; shifts are whole pixels.
        scale: range of the factor.
    Returns: map of continuous coordinates, (2, 3) float64.
    """
    angle = math.radians(rng.uniform(-degrees, degrees))
    shift = np.round(rng.uniform(-translate, translate, 2) * [width, height])
    factor = rng.uniform(*scale)
    turn = factor * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    centre = np.array([width / 2, height / 2])
    return np.concatenate([turn, (centre + shift - turn @ centre)[:, None]], axis=1)


def affine_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the axis-aligned boxes around the moved corners, (N, 4)."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2) @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def _span(start: float, stop: float, size: int) -> tuple[int, int]:
    """Round an interval to whole pixels, at least one, within [0, size)."""
    first = min(max(round(start), 0), size - 1)
    return first, max(min(round(stop), size), first + 1)


def _overlaps(crops: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of M crops with N boxes, (M, N)."""
    low = np.maximum(crops[:, None, :2], boxes[:, :2])
    high = np.minimum(crops[:, None, 2:], boxes[:, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1) + (crops[:, 2:] - crops[:, :2]).prod(-1)[:, None]
    return shared / np.maximum(areas - shared, 1e-9)
