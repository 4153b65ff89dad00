"""Former home of `thawline.measure`, kept for imports."""

from __future__ import annotations

from thawline.measure import *  # noqa: F403
