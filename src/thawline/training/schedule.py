"""Former home of `thawline.training.detection.schedule`, kept for imports."""

from __future__ import annotations

__all__ = [
    "DetectionSchedule",
    "Window",
    "derive_schedule",
    "flat_cosine",
    "published_schedule",
]

from thawline.recipe.resolved import Window
from thawline.training.detection.schedule import (
    DetectionSchedule,
    derive_schedule,
    flat_cosine,
    published_schedule,
)
