"""Boxes of a batch, padded once for denoising, matching and losses.

Counts stay on the host, where they are known without asking the device.
"""

from __future__ import annotations

__all__ = ["PackedTargets", "Target", "pack_targets"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from thawline.errors import DataError


class Target(TypedDict):
    """Labels and boxes of one image."""

    labels: Tensor
    """(N,), int64, in [0, num_classes)."""
    boxes: Tensor
    """(N, 4), cxcywh in 0–1 of the network's input."""


@dataclass(frozen=True)
class PackedTargets:
    """Targets of B images, padded to the G boxes of the fullest one."""

    counts: tuple[int, ...]
    """Number of boxes in each image, B values on the host."""
    labels: Tensor
    """(B, G), int64; `num_classes` where padded."""
    boxes: Tensor
    """(B, G, 4), cxcywh; zeros where padded."""

    @property
    def n_boxes(self) -> int:
        """Number of boxes in the batch."""
        return sum(self.counts)


def pack_targets(
    targets: Sequence[Target], num_classes: int, device: torch.device | str = "cpu"
) -> PackedTargets:
    """Pad a batch of targets to one tensor each, with room for at least one box.

    Raises: DataError: labels and boxes of an image differ in number, boxes are not (N, 4), or a class is
        outside the model's (seen only while labels are still on the host: looking elsewhere would wait).
    """
    for index, target in enumerate(targets):
        labels, boxes = target["labels"], target["boxes"]
        if labels.dim() != 1 or boxes.shape != (len(labels), 4):
            raise DataError(
                f"targets[{index}]: expected labels (N,) and boxes (N, 4), got {tuple(labels.shape)} and "
                f"{tuple(boxes.shape)}. An image without boxes has labels (0,) and boxes (0, 4)."
            )
        if labels.device.type == "cpu" and len(labels):
            low, high = labels.numpy().min(), labels.numpy().max()
            if low < 0 or high >= num_classes:
                raise DataError(
                    f"targets[{index}]: labels run from {low} to {high}, the model has classes 0 to "
                    f"{num_classes - 1}. Map the dataset's ids to 0, 1, … or set `num_classes`."
                )
    counts = tuple(len(target["labels"]) for target in targets)
    # One more, empty image makes the padded length at least 1, so a batch without boxes has the same shapes.
    room = [torch.full((1,), num_classes, device=device)], [torch.zeros(1, 4, device=device)]
    labels = pad_sequence(
        [target["labels"].to(device, torch.int64, non_blocking=True) for target in targets] + room[0],
        batch_first=True,
        padding_value=num_classes,
    )
    boxes = pad_sequence(
        [target["boxes"].to(device, torch.float32, non_blocking=True) for target in targets] + room[1],
        batch_first=True,
    )
    return PackedTargets(counts, labels[:-1], boxes[:-1])
