"""Detection errors at a score threshold: hits, confusions, false positives, misses.

Matching is COCO's at IoU 0.5: in order of decreasing score, each detection takes the free box of its class
with the highest overlap. Detections left over may still overlap a box of another class: a confusion.

Legend: G true boxes of an image, D its detections, C classes.
"""

from __future__ import annotations

__all__ = [
    "MOST_CONFUSIONS",
    "MOST_MATRIX_CLASSES",
    "Confusion",
    "ImageMistakes",
    "MatchedImage",
    "OperatingPoint",
    "best_threshold",
    "count_mistakes",
    "match_image",
    "operating_point",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MATCH_IOU = 0.5
NO_BOX = -1
"""Index of the matched box of a detection that matches none."""


MOST_MATRIX_CLASSES = 100
"""Classes of which a confusion matrix is kept; it grows with the square of their number."""
MOST_CONFUSIONS = 100
"""Confusions that are listed, the most frequent ones."""


@dataclass(frozen=True)
class MatchedImage:
    """Detections of one image and the boxes they match."""

    labels: np.ndarray
    """(G,) true classes, without crowds."""
    scores: np.ndarray
    """(D,) descending, without detections that match only a crowd."""
    detected_labels: np.ndarray
    """(D,)"""
    matches: np.ndarray
    """(D,) index of the true box of the same class, or `NO_BOX`."""
    ious: np.ndarray
    """(D, G)"""


@dataclass(frozen=True)
class OperatingPoint:
    """Precision and recall at a score threshold, by class and, as the last entry, over the boxes of all."""

    threshold: float
    n_boxes: np.ndarray
    """(C + 1,)"""
    precisions: np.ndarray
    """(C + 1,), NaN for classes without detections; so are f1s."""
    recalls: np.ndarray
    """(C + 1,), NaN for classes without boxes."""
    f1s: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ImageMistakes:
    """Counts of one image at the operating point."""

    index: int
    n_hits: int
    n_confused: int
    """Detections of a box with another class."""
    n_false: int
    """Detections of nothing, or of a box that another detection has matched."""
    n_missed: int
    """Boxes without a detection, even of another class."""
    f1: float
    """1 if there is nothing to find and nothing was found."""

    @property
    def n_mistakes(self) -> int:
        """Confusions, false positives and misses together."""
        return self.n_confused + self.n_false + self.n_missed


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Detections of one class for boxes of another. The number of classes stands for "nothing"."""

    true: int
    detected: int
    count: int


def match_image(
    boxes: np.ndarray,
    labels: np.ndarray,
    iscrowd: np.ndarray,
    detected_boxes: np.ndarray,
    scores: np.ndarray,
    detected_labels: np.ndarray,
) -> MatchedImage:
    """Match an image's detections to its boxes, class by class.

    Args:
        boxes: (G, 4) xyxy.        labels, iscrowd: (G,).
        detected_boxes: (D, 4).        scores, detected_labels: (D,), by descending score.
    """
    crowd, real = boxes[iscrowd], boxes[~iscrowd]
    labels, crowd_labels = labels[~iscrowd], labels[iscrowd]
    ious = _overlaps(detected_boxes, real)
    matches = _match_greedily(np.where(detected_labels[:, None] == labels, ious, 0.0))
    in_crowd = _overlaps(detected_boxes, crowd, of_detection=True) >= MATCH_IOU
    in_crowd = (in_crowd & (detected_labels[:, None] == crowd_labels)).any(1)
    keep = (matches != NO_BOX) | ~in_crowd
    return MatchedImage(labels, scores[keep], detected_labels[keep], matches[keep], ious[keep])


def operating_point(images: Sequence[MatchedImage], n_classes: int) -> OperatingPoint:
    """Find the score threshold with the best F1 over all boxes; 0 if no box is ever hit."""
    scores = np.concatenate([np.zeros(0), *(image.scores for image in images)])
    detected, matches, labels = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(image, name) for image in images)])
        for name in ("detected_labels", "matches", "labels")
    )
    is_hit = matches != NO_BOX
    threshold = best_threshold(scores, is_hit, len(labels))
    kept = scores >= threshold
    n_hits, n_detected, n_boxes = (
        np.append(np.bincount(found, minlength=n_classes), len(found))
        for found in (detected[kept & is_hit], detected[kept], labels)
    )
    f1s = _divide(2 * n_hits, n_detected + n_boxes)
    return OperatingPoint(threshold, n_boxes, _divide(n_hits, n_detected), _divide(n_hits, n_boxes), f1s)


def best_threshold(scores: np.ndarray, is_hit: np.ndarray, n_boxes: int) -> float:
    """Return the highest score at which F1 = 2 · hits / (detections + boxes) is largest."""
    if not is_hit.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    f1 = 2 * np.cumsum(is_hit[order]) / (np.arange(1, len(ranked) + 1) + n_boxes)
    # Equal scores are kept or dropped together: only the last of them can be a threshold.
    is_last = np.append(ranked[1:] < ranked[:-1], True)
    return float(ranked[np.where(is_last, f1, -1.0).argmax()])


def count_mistakes(
    images: Sequence[MatchedImage], threshold: float, n_classes: int
) -> tuple[np.ndarray, tuple[Confusion, ...], tuple[ImageMistakes, ...]]:
    """Count hits and mistakes at a score threshold.

    Returns: the confusion matrix, (C + 1, C + 1) int64, rows true, columns predicted, the last of each
        "nothing", or (0, 0) for more than `MOST_MATRIX_CLASSES`; the most frequent confusions; and every
        image, by ascending F1, with more mistakes first among equals.
    """
    pairs, counted = [np.zeros((0, 2), np.int64)], []
    for index, image in enumerate(images):
        kept = image.scores >= threshold
        matches, detected, ious = image.matches[kept], image.detected_labels[kept], image.ious[kept]
        is_hit = matches != NO_BOX
        hit_boxes = matches[is_hit]
        # Second round: leftover detections against leftover boxes, whatever their classes.
        rest, free = np.flatnonzero(~is_hit), np.setdiff1d(np.arange(len(image.labels)), hit_boxes)
        confused = _match_greedily(ious[np.ix_(rest, free)])
        is_confused = confused != NO_BOX
        wrong, false = rest[is_confused], rest[~is_confused]
        mistaken = free[confused[is_confused]]
        missed = np.setdiff1d(free, mistaken)
        nothing = np.full(len(false) + len(missed), n_classes)
        true = [image.labels[hit_boxes], image.labels[mistaken], nothing[: len(false)], image.labels[missed]]
        found = [detected[is_hit], detected[wrong], detected[false], nothing[: len(missed)]]
        pairs.append(np.stack([np.concatenate(true), np.concatenate(found)], axis=1))
        total = len(detected) + len(image.labels)
        counted.append(
            ImageMistakes(
                index=index,
                n_hits=len(hit_boxes),
                n_confused=len(wrong),
                n_false=len(false),
                n_missed=len(missed),
                f1=2 * len(hit_boxes) / total if total else 1.0,
            )
        )
    cells, counts = np.unique(np.concatenate(pairs), axis=0, return_counts=True)
    matrix = np.zeros((n_classes + 1,) * 2 if n_classes <= MOST_MATRIX_CLASSES else (0, 0), np.int64)
    if matrix.size:
        matrix[tuple(cells.T)] = counts
    wrong = np.flatnonzero(cells[:, 0] != cells[:, 1])
    top = wrong[np.argsort(-counts[wrong], kind="stable")][:MOST_CONFUSIONS]
    confusions = tuple(
        Confusion(true=true, detected=detected, count=count)
        for (true, detected), count in zip(cells[top].tolist(), counts[top].tolist(), strict=True)
    )
    return matrix, confusions, tuple(sorted(counted, key=lambda one: (one.f1, -one.n_mistakes)))


def _match_greedily(ious: np.ndarray) -> np.ndarray:
    """Match each detection, in order, to the free box with the highest IoU of at least `MATCH_IOU`.

    Args:
        ious: (D, G); 0 forbids a pair.
    Returns: (D,) index of the box, or `NO_BOX`.
    """
    matches = np.full(len(ious), NO_BOX)
    if not ious.size:
        return matches
    free = ious.copy()
    for d in np.flatnonzero(ious.max(1) >= MATCH_IOU):
        best = int(free[d].argmax())
        if free[d, best] >= MATCH_IOU:
            matches[d] = best
            free[:, best] = 0.0
    return matches


def _overlaps(a: np.ndarray, b: np.ndarray, of_detection: bool = False) -> np.ndarray:
    """Return the IoU of every pair, (A, B); `of_detection`: the share of `a` inside `b`, used for crowds."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    inter = sides.clip(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clip(0).prod(-1) for x in (a, b))
    total = np.broadcast_to(area_a[:, None], inter.shape)
    return _divide(inter, total if of_detection else total + area_b - inter, undefined=0.0)


def _divide(a: np.ndarray, b: np.ndarray, undefined: float = math.nan) -> np.ndarray:
    """Divide where `b` is positive."""
    return np.divide(a, b, out=np.full(a.shape, undefined), where=b > 0)
