"""Former home of `thawline.training.detection.schedule`, kept for imports."""

from __future__ import annotations

__all__ = [
    "DetectionSchedule",
    "Window",
    "derive_schedule",
    "derive_settings",
    "flat_cosine",
    "published_schedule",
]

from thawline.training.detection.schedule import (
    DetectionSchedule,
    Window,
    derive_schedule,
    derive_settings,
    flat_cosine,
    published_schedule,
)
