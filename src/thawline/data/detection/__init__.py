"""Detection datasets: reading, checking, augmenting and batching labelled images.

Names load on first use, since the runtime of exported detectors reads images without torch.
"""

from __future__ import annotations

__all__ = ["DetectionDataset", "Sample", "load_detection", "read_detection", "to_tensors"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
    from thawline.data.detection import dataset

    return getattr(dataset, name)
