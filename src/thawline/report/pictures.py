"""The worst images of an evaluation, each as annotated and as detected, side by side."""

from __future__ import annotations

__all__ = ["save_worst_images"]

from pathlib import Path

from thawline.data.detection.dataset import DetectionDataset
from thawline.data.detection.drawing import Panel, panel_grid, save_picture
from thawline.metrics.detection import DetectionEvaluator, DetectionMetrics


def save_worst_images(
    path: Path,
    dataset: DetectionDataset,
    evaluator: DetectionEvaluator,
    metrics: DetectionMetrics,
    n_images: int = 8,
) -> Path:
    """Draw the worst images, two pictures each: what is there, and what was found at `metrics.threshold`.

    Args:
        path: of the picture (.png, .jpg); `pictures/worst.png` in a run's folder goes into its report.
        dataset: the evaluated images, in the evaluator's order.
        evaluator: after its `compute`, which gave `metrics`.
    Returns: `path`.
    """
    panels: list[Panel] = []
    for mistakes in metrics.images[:n_images]:
        sample = dataset.sample(mistakes.index)
        found = evaluator.detections(mistakes.index)
        kept = found.scores >= metrics.threshold
        name = dataset.records[mistakes.index].path.name
        told = f"{mistakes.n_missed} missed, {mistakes.n_false} false, {mistakes.n_confused} confused"
        panels += [
            Panel(
                image=sample.image,
                boxes_xyxy=sample.boxes_xyxy,
                labels=sample.labels,
                caption=f"{mistakes.index}: {name}, as annotated",
            ),
            Panel(
                image=sample.image,
                boxes_xyxy=found.boxes_xyxy[kept],
                labels=found.labels[kept],
                scores=found.scores[kept],
                caption=f"as detected: {told}",
            ),
        ]
    return save_picture(path, panel_grid(panels, evaluator.class_names))
