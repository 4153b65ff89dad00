"""Former home of `thawline.measure`, kept for imports."""

from __future__ import annotations

__all__ = [
    "Sample",
    "count_ops",
    "machine_stamp",
    "median_ratio",
    "paired_rounds",
    "saved_bytes",
    "write_results",
]

from thawline.measure import (
    Sample,
    count_ops,
    machine_stamp,
    median_ratio,
    paired_rounds,
    saved_bytes,
    write_results,
)
