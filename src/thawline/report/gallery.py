"""Images of an evaluation as annotated and as detected: the worst, the median and the best ones."""

from __future__ import annotations

__all__ = ["GALLERY", "save_gallery", "save_worst_images"]

import shutil
from pathlib import Path

from thawline.data.detection.dataset import DetectionDataset
from thawline.data.detection.drawing import Panel, panel_grid, save_image
from thawline.metrics.detection import DetectionEvaluator, DetectionMetrics
from thawline.metrics.mistakes import ImageMistakes

GALLERY = ("worst", "median", "best")
"""Folders of the gallery, in the order in which a report shows them."""


def save_worst_images(
    path: Path,
    dataset: DetectionDataset,
    evaluator: DetectionEvaluator,
    metrics: DetectionMetrics,
    n_images: int = 8,
) -> Path:
    """Draw the worst images in one grid: annotations and, beside them, detections at `metrics.threshold`.

    Args:
        path: image file to write (.png, .jpg).
        dataset: the evaluated images, in the evaluator's order.
        evaluator: after its `compute`, which gave `metrics`.
        metrics: decides the order of the images and the threshold.
        n_images: number of images drawn.
    Returns: `path`.
    """
    worst = metrics.images[:n_images]
    panels = [panel for one in worst for panel in _panels(one, dataset, evaluator, metrics.threshold)]
    return save_image(path, panel_grid(panels, evaluator.class_names))


def save_gallery(
    folder: Path,
    dataset: DetectionDataset,
    evaluator: DetectionEvaluator,
    metrics: DetectionMetrics,
    n_each: int = 6,
) -> list[Path]:
    """Write the worst, the median and the best images by F1 as JPEG files of annotations beside detections.

    Images without annotations and detections are never among the best: there is nothing to see. An image
    is drawn once, so few images make a small gallery. It replaces the gallery of an earlier evaluation.

    Args:
        folder: gets `worst/`, `median/` and `best/`; the other arguments are those of `save_worst_images`.
    Returns: the files.
    """
    ranked = [one for one in metrics.images if one.n_hits + one.n_mistakes]
    middle = max(len(ranked) // 2 - n_each // 2, 0)
    chosen = (ranked[:n_each], ranked[middle : middle + n_each], ranked[::-1][:n_each])
    files, drawn = [], set[int]()
    for name, images in zip(GALLERY, chosen, strict=True):
        shutil.rmtree(folder / name, ignore_errors=True)
        for rank, one in enumerate((one for one in images if one.index not in drawn), start=1):
            drawn.add(one.index)
            panels = _panels(one, dataset, evaluator, metrics.threshold)
            file = folder / name / f"{rank:02d}-{dataset.records[one.index].path.stem}.jpg"
            files.append(save_image(file, panel_grid(panels, evaluator.class_names)))
    return files


def _panels(
    one: ImageMistakes, dataset: DetectionDataset, evaluator: DetectionEvaluator, threshold: float
) -> list[Panel]:
    """Return two panels of an image: as annotated, as detected."""
    sample, found = dataset.sample(one.index), evaluator.detections(one.index)
    kept = found.scores >= threshold
    return [
        Panel(
            image=sample.image,
            boxes_xyxy=sample.boxes_xyxy,
            labels=sample.labels,
            caption=f"{one.index}: {dataset.records[one.index].path.name}, as annotated",
        ),
        Panel(
            image=sample.image,
            boxes_xyxy=found.boxes_xyxy[kept],
            labels=found.labels[kept],
            scores=found.scores[kept],
            caption=f"as detected: {one.n_missed} missed, {one.n_false} false, {one.n_confused} confused",
        ),
    ]
