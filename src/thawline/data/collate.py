"""Former home of `thawline.data.detection.collate`, kept for imports."""

from __future__ import annotations

__all__ = [
    "Collate",
    "build_loader",
    "multi_scale_sizes",
    "to_float",
]

from thawline.data.detection.collate import (
    Collate,
    build_loader,
    multi_scale_sizes,
    to_float,
)
