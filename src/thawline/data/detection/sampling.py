"""Repeat-factor sampling: images with rare classes come several times an epoch.

f(c) is the share of images with a box of class c, and r(c) = max(1, √(t / f(c))) its repeat factor; that of
an image is the largest of its classes'. Classes in at least t, the threshold, of the images are left alone.

Source: Gupta et al., LVIS, CVPR 2019.
"""

from __future__ import annotations

__all__ = ["class_repeats", "image_repeats"]

from collections.abc import Sequence

import numpy as np

from thawline.data.detection.records import ImageRecord


def class_repeats(records: Sequence[ImageRecord], n_classes: int, threshold: float) -> np.ndarray:
    """Return the repeat factor of each class, (n_classes,) float64; 1 for a class without a box."""
    counts = np.zeros(n_classes)
    for record in records:
        counts[_classes(record)] += 1
    shares = counts / max(1, len(records))
    return np.sqrt(np.maximum(1.0, threshold / np.where(counts > 0, shares, np.inf)))


def image_repeats(records: Sequence[ImageRecord], of_class: np.ndarray) -> np.ndarray:
    """Return the repeat factor of each image, (len(records),) float64, given those of the classes."""
    return np.array([of_class[_classes(record)].max(initial=1.0) for record in records])


def _classes(record: ImageRecord) -> np.ndarray:
    return np.unique(record.labels[~record.iscrowd])
