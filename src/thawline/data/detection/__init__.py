"""Detection datasets: reading, checking, augmenting and batching labelled images."""

from __future__ import annotations

__all__ = ["DetectionDataset", "Sample", "load_detection", "read_detection", "to_tensors"]

from thawline.data.detection.dataset import (
    DetectionDataset,
    Sample,
    load_detection,
    read_detection,
    to_tensors,
)
