"""Annotated images and detections for the tests of metrics, mistakes and reports."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from thawline.metrics.detection import DetectionEvaluator, DetectionMetrics

NAMES = ("ant", "bee", "cat")


@dataclass
class Annotated:
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray = field(default=None)  # type: ignore[assignment]
    area: np.ndarray = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.boxes_xyxy = np.asarray(self.boxes_xyxy, float).reshape(-1, 4)
        self.labels = np.asarray(self.labels, np.int64)
        sides = self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]
        self.area = sides.prod(1) if self.area is None else self.area
        self.iscrowd = np.zeros(len(self.labels), bool) if self.iscrowd is None else self.iscrowd


def detected(boxes=(), scores=(), labels=()) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def measure(
    images: list[Annotated], detections: list[dict], names: tuple[str, ...] = NAMES
) -> DetectionMetrics:
    evaluator = DetectionEvaluator(images, names)
    evaluator.update(range(len(images)), detections)
    return evaluator.compute()


def random_set(n_images: int) -> tuple[list[Annotated], list[dict]]:
    """Images with 0–5 boxes and detections that hit, miss, or confuse them."""
    rng = np.random.default_rng(0)
    images, detections = [], []
    for _ in range(n_images):
        corners = rng.uniform(0, 80, (rng.integers(0, 6), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 60, corners.shape)], 1)
        images.append(Annotated(boxes, rng.integers(0, 3, len(boxes)), rng.random(len(boxes)) < 0.1))
        noise = np.concatenate([boxes, boxes]) + rng.normal(0, 3, (2 * len(boxes), 4))
        labels = np.where(rng.random(len(noise)) < 0.7, np.tile(images[-1].labels, 2), rng.integers(0, 3))
        detections.append(detected(noise.tolist(), rng.random(len(noise)).tolist(), labels.tolist()))
    return images, detections
