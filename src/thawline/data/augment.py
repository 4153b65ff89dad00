"""Former home of `thawline.data.detection.augment`, kept for imports."""

from __future__ import annotations

__all__ = [
    "TrainingImages",
    "TrainingSample",
]

from thawline.data.detection.augment import (
    TrainingImages,
    TrainingSample,
)
