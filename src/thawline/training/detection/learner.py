"""The module that is trained: a detector with its losses, from bytes to loss terms in one forward."""

from __future__ import annotations

__all__ = ["HostTargets", "Learner", "collate_on_host"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thawline.data.detection.augment import TrainingSample
from thawline.data.detection.collate import Collate, to_float
from thawline.models.deimv2.loss.criterion import Criterion
from thawline.models.deimv2.loss.targets import Target
from thawline.models.deimv2.model import DEIMv2
from thawline.training.detection.detectors import Detectors


@dataclass(frozen=True)
class HostTargets:
    """Targets of a batch, which stay on the host: accelerate and Trainer only move classes that they know."""

    targets: list[Target]
    dataset: int = 0
    """Number of the images' dataset, where a run has several."""

    def pin_memory(self) -> HostTargets:
        """Return a copy in pinned memory, for asynchronous copies to a GPU."""
        return HostTargets(
            [{"labels": t["labels"].pin_memory(), "boxes": t["boxes"].pin_memory()} for t in self.targets],
            self.dataset,
        )


class Learner(nn.Module):
    """A detector, or one for each of several datasets, with its losses.

    It also shields the detector's frozen config from Trainer, which writes to any `model.config`.
    """

    def __init__(self, detector: DEIMv2 | Detectors) -> None:
        super().__init__()
        # Channels last is the fastest layout for convolutions; the other layers do not depend on it.
        self.detector: DEIMv2 | Detectors = detector.to(memory_format=torch.channels_last)
        for name, parameter in detector.named_parameters():
            if ".lora_" in name:  # PEFT's DoRA takes views of them that only this layout has
                parameter.data = parameter.data.contiguous()
        self.criterion = Criterion(detector.config)

    def forward(self, pixel_values: Tensor, targets: HostTargets, *, epoch: int) -> dict[str, Tensor]:
        """Return every loss term, weighted.

        Args:
            pixel_values: (B, 3, H, W) uint8.
            targets: boxes and classes.
            epoch: from 0; decides how queries are matched.
        """
        config, detector = self.detector.config, self.detector
        if isinstance(detector, Detectors):
            detector = detector.member(targets.dataset)
        pixels = to_float(pixel_values, mean=config.image_mean, std=config.image_std)
        return self.criterion(detector(pixels, targets.targets), targets.targets, epoch=epoch)

    def get_base_model(self) -> DEIMv2 | Detectors:
        """Return the detector, by PEFT's name for the model inside."""
        return self.detector


def collate_on_host(collate: Collate, samples: Sequence[TrainingSample]) -> dict[str, Any]:
    """Collate a batch whose targets stay on the host, where the losses count them."""
    batch = collate(samples)
    targets = HostTargets(batch["targets"], samples[0].dataset)
    return {"pixel_values": batch["pixel_values"], "targets": targets}
