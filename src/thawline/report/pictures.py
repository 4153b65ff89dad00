"""Former home of `thawline.report.gallery`, kept for imports."""

from __future__ import annotations

__all__ = ["save_worst_images"]

from thawline.report.gallery import save_worst_images
