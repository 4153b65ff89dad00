"""What a detector gets wrong once its scores are cut: hits, confusions, false alarms, misses.

Matching is COCO's at IoU 0.5: from the best score down, each detection takes the free box of its class that
it overlaps most. What is left over at the chosen score may still lie on a box of another class: a
confusion.

Legend: G true boxes of an image, D its detections, C classes.
"""

from __future__ import annotations

__all__ = ["ImageMistakes", "Matched", "OperatingPoint", "match_image", "operating_point", "tell_mistakes"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MATCH_IOU = 0.5
NOBODY = -1
"""In the place of a true box: the detection hit none."""


@dataclass(frozen=True)
class Matched:
    """One image: which detection hit which box."""

    labels: np.ndarray
    """(G,) true classes; crowds are left out."""
    scores: np.ndarray
    """(D,) best first; detections that only hit a crowd are left out."""
    detected_labels: np.ndarray
    """(D,)"""
    hit: np.ndarray
    """(D,) place of the true box of the same class, or `NOBODY`."""
    ious: np.ndarray
    """(D, G)"""


@dataclass(frozen=True)
class OperatingPoint:
    """Precision and recall where the scores are cut."""

    threshold: float
    precision: float
    recall: float
    f1: float
    n_boxes: np.ndarray
    """(C,)"""
    precisions: np.ndarray
    """(C,), NaN for classes that were never detected; so are f1s."""
    recalls: np.ndarray
    """(C,), NaN for classes without boxes."""
    f1s: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ImageMistakes:
    """One image at the operating point."""

    index: int
    n_hits: int
    n_confused: int
    """Detections on a box of another class."""
    n_false: int
    """Detections on nothing, or on a box that another one hit."""
    n_missed: int
    """Boxes that nothing hit, not even with another class."""
    f1: float
    """1 where there is nothing to find and nothing was found."""

    @property
    def n_mistakes(self) -> int:
        """Confusions, false alarms and misses together."""
        return self.n_confused + self.n_false + self.n_missed


def match_image(
    boxes: np.ndarray,
    labels: np.ndarray,
    iscrowd: np.ndarray,
    detected_boxes: np.ndarray,
    scores: np.ndarray,
    detected_labels: np.ndarray,
) -> Matched:
    """Match an image's detections to its boxes, class by class.

    Args:
        boxes: (G, 4) xyxy.        labels, iscrowd: (G,).
        detected_boxes: (D, 4).        scores, detected_labels: (D,), best first.
    """
    crowd, real = boxes[iscrowd], boxes[~iscrowd]
    labels, crowd_labels = labels[~iscrowd], labels[iscrowd]
    ious = _overlaps(detected_boxes, real)
    hit = greedy_matches(np.where(detected_labels[:, None] == labels, ious, 0.0))
    in_crowd = _overlaps(detected_boxes, crowd, of_detection=True) >= MATCH_IOU
    in_crowd = (in_crowd & (detected_labels[:, None] == crowd_labels)).any(1)
    keep = (hit != NOBODY) | ~in_crowd
    return Matched(labels, scores[keep], detected_labels[keep], hit[keep], ious[keep])


def greedy_matches(ious: np.ndarray) -> np.ndarray:
    """From the first detection on, each takes the free box it overlaps most, if by at least `MATCH_IOU`.

    Args:
        ious: (D, G); 0 forbids a pair.
    Returns: (D,) place of the box, or `NOBODY`.
    """
    hit = np.full(len(ious), NOBODY)
    if not ious.size:
        return hit
    free = ious.copy()
    for d in np.flatnonzero(ious.max(1) >= MATCH_IOU):
        best = int(free[d].argmax())
        if free[d, best] >= MATCH_IOU:
            hit[d] = best
            free[:, best] = 0.0
    return hit


def operating_point(images: Sequence[Matched], n_classes: int) -> OperatingPoint:
    """Cut all scores where F1 over all boxes is best; the highest such score, 0 where nothing is ever hit."""
    scores = _joined([image.scores for image in images], np.float64)
    detected = _joined([image.detected_labels for image in images], np.int64)
    is_hit = _joined([image.hit for image in images], np.int64) != NOBODY
    n_boxes = np.bincount(_joined([image.labels for image in images], np.int64), minlength=n_classes)
    threshold = best_threshold(scores, is_hit, int(n_boxes.sum()))
    kept = scores >= threshold
    n_detected = np.bincount(detected[kept], minlength=n_classes)
    n_hits = np.bincount(detected[kept & is_hit], minlength=n_classes)
    total = _rates(n_hits.sum(keepdims=True), n_detected.sum(keepdims=True), n_boxes.sum(keepdims=True))
    precision, recall, f1 = (float(rate[0]) for rate in total)
    return OperatingPoint(threshold, precision, recall, f1, n_boxes, *_rates(n_hits, n_detected, n_boxes))


def best_threshold(scores: np.ndarray, is_hit: np.ndarray, n_boxes: int) -> float:
    """The score at which F1 = 2 · hits / (detections + boxes) is largest."""
    if not is_hit.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    f1 = 2 * np.cumsum(is_hit[order]) / (np.arange(1, len(ranked) + 1) + n_boxes)
    # Equal scores are cut together: only the last of them is a place to cut.
    is_cut = np.append(ranked[1:] < ranked[:-1], True)
    return float(ranked[np.where(is_cut, f1, -1.0).argmax()])


def tell_mistakes(
    images: Sequence[Matched], threshold: float, n_classes: int
) -> tuple[np.ndarray, tuple[ImageMistakes, ...]]:
    """Sort what goes wrong at a score.

    Returns: the confusion matrix, (C + 1, C + 1) int64, rows true, columns predicted, the last of each
    "nothing";
        and every image, worst F1 first, among equals those with more mistakes first.
    """
    confusion = np.zeros((n_classes + 1, n_classes + 1), np.int64)
    mistakes = []
    for index, image in enumerate(images):
        kept = image.scores >= threshold
        hit, detected, ious = image.hit[kept], image.detected_labels[kept], image.ious[kept]
        is_hit = hit != NOBODY
        is_found = np.zeros(len(image.labels), bool)
        is_found[hit[is_hit]] = True
        # Second round: what is left of the detections on what is left of the boxes, whatever their classes.
        rest = np.flatnonzero(~is_hit)
        open_boxes = np.flatnonzero(~is_found)
        confused = greedy_matches(ious[np.ix_(rest, open_boxes)])
        wrong, false = rest[confused != NOBODY], rest[confused == NOBODY]
        mistaken = open_boxes[confused[confused != NOBODY]]
        missed = np.setdiff1d(open_boxes, mistaken)
        np.add.at(confusion, (image.labels[hit[is_hit]], detected[is_hit]), 1)
        np.add.at(confusion, (image.labels[mistaken], detected[wrong]), 1)
        np.add.at(confusion, (n_classes, detected[false]), 1)
        np.add.at(confusion, (image.labels[missed], n_classes), 1)
        both = len(detected) + len(image.labels)
        mistakes.append(
            ImageMistakes(
                index=index,
                n_hits=int(is_hit.sum()),
                n_confused=len(wrong),
                n_false=len(false),
                n_missed=len(missed),
                f1=2 * int(is_hit.sum()) / both if both else 1.0,
            )
        )
    return confusion, tuple(sorted(mistakes, key=lambda image: (image.f1, -image.n_mistakes)))


def _overlaps(a: np.ndarray, b: np.ndarray, of_detection: bool = False) -> np.ndarray:
    """IoU of every pair, (A, B); `of_detection`: the share of `a` inside `b`, COCO's measure for crowds."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    inter = sides.clip(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clip(0).prod(-1) for x in (a, b))
    union = (
        np.broadcast_to(area_a[:, None], inter.shape) if of_detection else area_a[:, None] + area_b - inter
    )
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def _rates(
    n_hits: np.ndarray, n_detected: np.ndarray, n_boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1; NaN for 0/0."""
    pairs = ((n_hits, n_detected), (n_hits, n_boxes), (2 * n_hits, n_detected + n_boxes))
    precision, recall, f1 = (np.divide(a, b, out=np.full(len(a), math.nan), where=b > 0) for a, b in pairs)
    return precision, recall, f1


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
