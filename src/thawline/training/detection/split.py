"""Training and held-out images of a detection dataset, their classes, and the sizes of the training boxes."""

from __future__ import annotations

__all__ = ["evaluated_split", "join_classes", "shorter_sides", "split_images", "warn_of_crowded"]

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from thawline.data.detection.records import DetectionSet, ImageRecord, clip_boxes, n_learnable
from thawline.errors import DataError
from thawline.recipe import DetectionData

logger = logging.getLogger(__name__)

EVAL_SPLITS = ("val", "valid", "validation", "test")


def evaluated_split(found: DetectionSet, data: DetectionData) -> str | None:
    """Return the split to evaluate on: the recipe's, else the first with images. None: there is none."""
    if data.eval_split is not None:
        if not found.records(data.eval_split):
            raise DataError(f"'{data.path}': the split '{data.eval_split}' has no images.")
        return data.eval_split
    return next((name for name in EVAL_SPLITS if name != data.train_split and found.splits.get(name)), None)


def split_images(
    found: DetectionSet, data: DetectionData, seed: int
) -> tuple[Sequence[ImageRecord], Sequence[ImageRecord]]:
    """Return the images to train on and those to evaluate on.

    Without an evaluation split, the latter are a share of the former, `data.eval_fraction`: at least one
    image, unless it is 0 or there is one image only.
    """
    name = evaluated_split(found, data)
    if name is not None:
        train, held_out = found.splits.get(data.train_split, ()), found.splits[name]
    else:
        train = found.records(data.train_split)
        n = round(len(train) * data.eval_fraction)
        n = 1 if n == 0 < data.eval_fraction and len(train) > 1 else n
        empty = [f"'{split}'" for split in EVAL_SPLITS if split in found.splits and split != data.train_split]
        reason = f"has no images in {' and '.join(empty)}" if empty else "has no evaluation split"
        if n:
            logger.info("'%s' %s: %d of %d images are held out.", data.path, reason, n, len(train))
        else:
            logger.warning("'%s' %s, and no image is held out: the run is not evaluated.", data.path, reason)
        order = np.random.default_rng(seed).permutation(len(train))
        held_out = tuple(train[i] for i in sorted(order[:n]))
        train = tuple(train[i] for i in sorted(order[n:]))
    if held_out and not any(map(n_learnable, held_out)):
        logger.warning("None of the %d held-out images has a box: there is nothing to score.", len(held_out))
    return _draw(train, data.max_images, seed), _draw(held_out, data.max_eval_images, seed)


def join_classes(
    records: Sequence[ImageRecord], names: Sequence[str], wanted: Sequence[str]
) -> tuple[ImageRecord, ...]:
    """Return images with the labels of another class list, joined by name.

    Args:
        records: images, whose labels are indices into `names`.
        wanted: names in the order of the new labels; it may lack those that no box has.
    Raises: DataError: if boxes have a class that `wanted` lacks.
    """
    used = sorted({int(label) for record in records for label in record.labels})
    if unknown := [names[label] for label in used if names[label] not in wanted]:
        raise DataError(
            f"There are boxes of {', '.join(unknown)}, and the detector was trained on {', '.join(wanted)}. "
            "Rename or remove these classes."
        )
    labels = np.array([wanted.index(name) if name in wanted else -1 for name in names], np.int64)
    return tuple(replace(record, labels=labels[record.labels]) for record in records)


def warn_of_crowded(records: Sequence[ImageRecord], num_queries: int) -> None:
    """Say that images have more boxes than the detector can find."""
    counts = [n for n in map(n_learnable, records) if n > num_queries]
    if counts:
        logger.warning(
            "%d of %d training images have more than %d boxes, up to %d, and the detector has only so many "
            "queries: it cannot find all of them. Set `base.overrides.num_queries`.",
            len(counts), len(records), num_queries, max(counts),
        )  # fmt: skip


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
