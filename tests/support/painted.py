"""Images whose boxes are painted: what an augmentation does to pixels can be read off them."""

from __future__ import annotations

import cv2
import numpy as np

from thawline.data.detection.dataset import DetectionDataset, Sample

COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
GROUND = 60


class Painted(DetectionDataset):
    """Grey images of various sizes with a few rectangles, label i in colour i, clear of each other and the
    edges."""

    def __init__(self, n_images: int = 9, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__([])
        self.pictures = [self._draw(np.random.default_rng([seed, i]), scale) for i in range(n_images)]
        self.n_reads = 0

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(self, index: int) -> Sample:
        self.n_reads += 1
        image, boxes, labels = self.pictures[index]
        return Sample(
            image=image.copy(),
            boxes_xyxy=boxes.copy(),
            labels=labels.copy(),
            area=np.zeros(len(labels), np.float32),
            iscrowd=np.zeros(len(labels), bool),
            index=index,
            orig_size=(image.shape[1], image.shape[0]),
        )

    @staticmethod
    def _draw(rng: np.random.Generator, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        width, height = (int(scale * side) for side in rng.integers(150, 260, 2))
        image = np.full((height, width, 3), GROUND, np.uint8)
        boxes = []
        for column in range(3):  # one rectangle in each third, so that none touches another
            low = np.array([column * width / 3, 0]) + scale * 8
            room = np.array([width / 3, height]) - scale * 16
            size = room * rng.uniform(0.3, 0.9, 2)
            start = np.round(low + (room - size) * rng.random(2)).astype(int)
            stop = start + np.maximum(size.astype(int), 3)
            boxes.append([*start, *stop])
        labels = rng.permutation(3)
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
            image[y0:y1, x0:x1] = COLOURS[label]
        return image, np.array(boxes, np.float32), labels.astype(np.int64)


def painted_boxes(image: np.ndarray, label: int) -> np.ndarray:
    """The boxes of what has a label's colour, (N, 4), found in the pixels alone."""
    others = np.delete(image.astype(int), label, axis=2).max(2)
    mask = ((image[..., label].astype(int) - others) > 127).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    left, top, width, height = stats[1:, :4].T
    return np.stack([left, top, left + width, top + height], axis=1).astype(float).reshape(-1, 4)


def assert_boxes_follow_pixels(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, within: float
) -> None:
    """Every box is painted, edge by edge to `within` pixels, and nothing large is painted without a box.

    A turned rectangle that leaves the picture may lose a corner that its box still counts, so the paint of
    a box at the border need only lie inside it, and one in a corner of the image may have none.
    """
    for label in range(3):
        found, mine = painted_boxes(image, label), boxes[labels == label]
        for box in mine[(mine[:, 2:] - mine[:, :2]).min(1) > 2 * within]:
            in_corner = (_at_border(box, image.shape, within)).all()
            assert in_corner or any(_fits(paint, box, image.shape, within) for paint in found), (label, box)
        for paint in found[(found[:, 2:] - found[:, :2]).min(1) > 4 * within]:
            assert any(_fits(paint, box, image.shape, within) for box in mine), (label, paint, mine)


def _fits(paint: np.ndarray, box: np.ndarray, shape: tuple[int, ...], within: float) -> bool:
    inside = (paint[:2] > box[:2] - within).all() and (paint[2:] < box[2:] + within).all()
    return inside and (_at_border(box, shape, within).any() or np.abs(paint - box).max() <= within)


def _at_border(box: np.ndarray, shape: tuple[int, ...], within: float) -> np.ndarray:
    """Whether a box reaches a vertical, and a horizontal, border."""
    return (box[:2] < within) | (box[2:] > np.array([shape[1], shape[0]]) - within)
