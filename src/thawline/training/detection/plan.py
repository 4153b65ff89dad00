"""Plan of a detector's run: schedule and first batch, as plain values and in a few lines."""

from __future__ import annotations

__all__ = ["batch_statistics", "sampling_overview", "sampling_plan", "schedule_overview"]

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from thawline.data.detection.collate import to_float
from thawline.data.draws import EpochOrder
from thawline.models.deimv2.config import DEIMv2Config
from thawline.training.detection.schedule import DetectionSchedule

SHOWN_CLASSES = 3
"""Rare classes named in the overview."""


def schedule_overview(schedule: DetectionSchedule, plan: Mapping[str, Any]) -> dict[str, str]:
    """Return the schedule in words, under at most four headings; `plan` is the trainer's.

    Each says in brackets which rules its values follow from.
    """
    settings = schedule.settings
    windows = {name: f"{a}–{b - 1}" for name, (a, b) in schedule.windows.items() if b > a}
    lines = {
        "steps": f"{plan['steps']:,} of {plan['rows_a_step']} images: {schedule.epochs} epochs × "
        f"{schedule.steps_per_epoch}, {plan['loader']['images_per_second_each']} images/s per process",
        "rates": f"{settings.lr:.2g}, backbone {settings.backbone_lr:.2g}, {plan['schedule']['form']}, "
        f"falling to {settings.lr_gamma:g} of it after {settings.warmup_steps} warm-up steps",
        "epochs": ", ".join(f"{name} {span}" for name, span in windows.items()),
        "boxes": f"not learned with a side under {settings.min_box_size} px of "
        + " × ".join(map(str, settings.height_width)),
    }
    return {
        name: f"{text} ({why})" if (why := schedule.reasons.get(name)) else text
        for name, text in lines.items()
    }


def sampling_plan(order: EpochOrder, repeats: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Return an epoch's length and the repeat factors above 1, the largest first."""
    rarest = sorted(zip(repeats.tolist(), class_names, strict=True), reverse=True)
    return {
        "draws": len(order),
        "images": order.n_images,
        "repeats": {name: round(factor, 3) for factor, name in rarest if factor > 1},
    }


def sampling_overview(sampling: Mapping[str, Any]) -> str:
    """Return the plan of a sampling in words."""
    repeats = dict(list(sampling["repeats"].items())[:SHOWN_CLASSES])
    classes = ", ".join(f"{name} × {factor:.1f}" for name, factor in repeats.items())
    draws = f"an epoch draws {sampling['draws']:,} of {sampling['images']:,} images"
    return f"{draws} ({classes or 'no class is rare'})"


def batch_statistics(
    batch: Mapping[str, Any], config: DEIMv2Config, class_names: Sequence[str]
) -> dict[str, Any]:
    """Summarise a batch as the network gets it: pixels after normalisation, boxes, classes."""
    pixels = to_float(batch["pixel_values"], mean=config.image_mean, std=config.image_std)
    boxes = torch.cat([target["boxes"] for target in batch["targets"]])
    labels = torch.cat([target["labels"] for target in batch["targets"]])
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    height, width = pixels.shape[-2:]
    sides = boxes[:, 2:] * torch.tensor([width, height])
    side = round(float(sides.median()), 1) if len(boxes) else None
    return {
        "pixel_values": {
            "shape": list(pixels.shape),
            "mean": [round(v, 4) for v in pixels.mean(dim=(0, 2, 3)).tolist()],
            "std": [round(v, 4) for v in pixels.std(dim=(0, 2, 3)).tolist()],
        },
        "boxes": {
            "per_image": [len(target["labels"]) for target in batch["targets"]],
            "median_side_pixels": side,
            "by_class": {name: n for name, n in zip(class_names, counts, strict=True) if n},
        },
    }
