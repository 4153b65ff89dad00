"""Former home of `thawline.data.detection.augment`, kept for imports."""

from __future__ import annotations

__all__ = [
    "AugmentPolicy",
    "TrainingImages",
    "TrainingSample",
]

from thawline.data.detection.augment import (
    AugmentPolicy,
    TrainingImages,
    TrainingSample,
)
