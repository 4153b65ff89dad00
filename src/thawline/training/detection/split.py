"""Training and held-out images of a detection dataset, and the sizes of the training boxes."""

from __future__ import annotations

__all__ = ["shorter_sides", "split_images"]

import logging
from collections.abc import Sequence

import numpy as np

from thawline.data.detection.records import DetectionSet, ImageRecord, clip_boxes
from thawline.recipe import DetectionData

logger = logging.getLogger(__name__)

EVAL_SPLITS = ("val", "valid", "validation", "test")


def split_images(
    found: DetectionSet, data: DetectionData, seed: int
) -> tuple[Sequence[ImageRecord], Sequence[ImageRecord]]:
    """Return the images to train on and those to evaluate on."""
    train = found.records(data.train_split)
    splits = [name for name in EVAL_SPLITS if name in found.splits and name != data.train_split]
    name = data.eval_split or next(iter(splits), None)
    if name is not None:
        held_out = found.records(name)
    else:
        order = np.random.default_rng(seed).permutation(len(train))
        n = round(len(train) * data.eval_fraction)
        logger.info("'%s' has no evaluation split: %d of %d images are held out.", data.path, n, len(train))
        held_out = tuple(train[i] for i in sorted(order[:n]))
        train = tuple(train[i] for i in sorted(order[n:]))
    return _draw(train, data.max_images, seed), _draw(held_out, data.max_eval_images, seed)


def shorter_sides(records: Sequence[ImageRecord], size: tuple[int, int]) -> np.ndarray:
    """Return the shorter side of every box that is trained on, in an input whose longer side is 1, (N,).

    Args:
        size: (height, width) of the input.
    """
    sides, shape = [np.empty((0, 2))], np.array([size[1], size[0]]) / max(size)
    for record in records:
        boxes = clip_boxes(record.boxes_xyxy[~record.iscrowd], record.width, record.height)
        sides.append((boxes[:, 2:] - boxes[:, :2]) / (record.width, record.height) * shape)
    shorter = np.concatenate(sides).min(axis=1)
    return shorter[shorter > 0]


def _draw(records: Sequence[ImageRecord], n: int | None, seed: int) -> Sequence[ImageRecord]:
    if n is None or n >= len(records):
        return records
    return [records[i] for i in sorted(np.random.default_rng(seed).permutation(len(records))[:n])]
