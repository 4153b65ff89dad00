"""One network of several domains: the frozen part is there once, and each domain's changes are put into it.

A call runs the parts that no asked domain changes once for all images, then the rest for each domain in turn.
"""

from __future__ import annotations

__all__ = ["Job", "SharedNetwork"]

import threading
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thawline.domains.changes import Changes, JoinedWeights
from thawline.inference.frames import Found
from thawline.inference.torch_network import TorchNetwork
from thawline.models.deimv2 import DEIMv2

STAGES = ("backbone", "encoder", "decoder")


class Job(NamedTuple):
    """A domain and the images, by position, in which it detects."""

    changes: Changes
    rows: Sequence[int]


class SharedNetwork(TorchNetwork):
    """A fused detector into which domains are put by turns; threads may call it, and wait for one another.

    Args:
        base: the detector that the domains share.
        device: None: a GPU if there is one.
    """

    def __init__(self, base: DEIMv2, device: str | torch.device | None = None) -> None:
        super().__init__(base, device)
        if self.device.type == "cpu":  # packs kernels for the inputs that they get
            self([np.zeros((*self.config.image_size, 3), np.uint8)])
        self._weights = JoinedWeights(self.model)
        self._lock = threading.RLock()
        self._resident: Changes | None = None

    def changes_of(self, domain: DEIMv2) -> Changes:
        """Return what a domain's merged detector changes in this network."""
        fused = domain.fuse()
        with self._lock:
            self.switch(None)
            return Changes(self._weights, fused)

    def switch(self, changes: Changes | None) -> None:
        """Put a domain's changes into the network, in the place of those inside; None: the base."""
        with self._lock:
            if changes is self._resident:
                return
            if self._resident is not None:
                self._resident.exchange()
            if changes is not None:
                changes.exchange()
            self._resident = changes

    @torch.inference_mode()
    def detect(self, images: Sequence[np.ndarray], jobs: Sequence[Job]) -> list[list[Found]]:
        """Return for each job the detections in its images.

        Args:
            images: (H, W, 3) uint8, RGB, each.
        """
        x: Any = self.prepare(images)
        with self._lock:
            common = list(
                takewhile(lambda stage: not any(stage in job.changes.parts for job in jobs), STAGES)
            )
            if self._resident is not None and not any(job.changes is self._resident for job in jobs):
                self.switch(None)
            for stage in common:
                x = getattr(self.model, stage)(x)
            found = []
            for job in sorted(jobs, key=lambda job: job.changes is not self._resident):
                self.switch(job.changes)
                y = _rows(x, job.rows, len(images))
                for stage in STAGES[len(common) :]:
                    y = getattr(self.model, stage)(y)
                found.append((job, self.answer(y, [images[row] for row in job.rows])))
        by_job = {id(job): answer for job, answer in found}
        return [by_job[id(job)] for job in jobs]


def _rows(x: Any, rows: Sequence[int], n: int) -> Any:
    """Return some images of a batch, or of a list of maps."""
    if list(rows) == list(range(n)):
        return x
    if isinstance(x, Tensor):
        return x[list(rows)]
    return [level[list(rows)] for level in x]
