"""Evaluation of a detector on held-out images, shared among the processes that train together."""

from __future__ import annotations

__all__ = ["mean_evaluation", "measure_detector", "n_devices", "to_evaluation"]

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from thawline.data.detection.collate import to_float
from thawline.data.detection.dataset import DetectionDataset, Sample
from thawline.data.detection.geometry import resize
from thawline.data.detection.records import ImageRecord
from thawline.metrics.detection import DetectionEvaluator, DetectionMetrics
from thawline.models.deimv2.model import DEIMv2
from thawline.training.evaluation import Evaluation
from thawline.tuners.adapters import has_adapters

SHOWN_SCORE = 0.05
"""Detections below this score are left out of predictions.jsonl."""
CLASS_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")


def measure_detector(
    model: nn.Module,
    records: Sequence[ImageRecord],
    class_names: Sequence[str],
    *,
    size: tuple[int, int],
    batch_size: int,
    workers: int = 0,
    max_dets: int = 100,
) -> tuple[DetectionMetrics, DetectionEvaluator]:
    """Compute every metric of a detector. In a process group each process detects on its share of the images.

    Args:
        model: a detector, or anything with its `config`, forward and `postprocess`; left in eval mode.
        records: images with their annotations.
        class_names: classes of the annotations.
        size: (height, width) of the input, pixels.
        batch_size: images per device.
        workers: processes that load images.
        max_dets: detections per image and class that count.
    Returns: the metrics, and the evaluator with the detections.
    """

    def fit(sample: Sample) -> Sample:
        return dataclasses.replace(sample, image=resize(sample.image, width=size[1], height=size[0]))

    device = next(model.parameters()).device
    config: Any = model.config
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    share = Subset(DetectionDataset(records, transform=fit), range(rank, len(records), n_devices()))
    loader = DataLoader(
        share,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_stack,
        generator=torch.Generator(),  # leaves the run's own random state alone
    )
    evaluator = DetectionEvaluator(records, class_names, max_dets)
    network = _inference_form(model.eval())
    bar = tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=len(loader) < 20 or None)
    with torch.no_grad():
        for pixels, indices, sizes in bar:
            inputs = to_float(pixels.to(device), mean=config.image_mean, std=config.image_std)
            evaluator.update(indices, network.postprocess(network(inputs), sizes))
    return evaluator.compute(), evaluator


def to_evaluation(
    records: Sequence[ImageRecord],
    metrics: DetectionMetrics,
    evaluator: DetectionEvaluator,
    class_ids: Mapping[str, int | str],
) -> Evaluation:
    """Convert the results of `measure_detector` to a run's evaluation: metrics overall and by class.

    `class_ids`: id of each class in the annotation files; its rows have those of the images, too.
    """
    classes = [{"class": entry.name, "category_id": class_ids.get(entry.name)} for entry in metrics.classes]
    return Evaluation(
        metrics=_finite(metrics.statistics),
        parts={
            entry.name: {"rows": entry.n_boxes, **_finite({k: getattr(entry, k) for k in CLASS_METRICS})}
            for entry in metrics.classes
        },
        rows=[
            {
                "image": record.path.name,
                "image_id": record.image_id,
                "detections": _shown(evaluator, index, classes),
            }
            for index, record in enumerate(records)
        ],
        files={"detection_metrics.json": metrics.to_dict()},
        detections=(DetectionDataset(records), evaluator, metrics),
    )


def mean_evaluation(datasets: Mapping[str, Evaluation]) -> Evaluation:
    """Return the evaluation over several datasets: their mean, of which each is a part.

    Metrics also hold the AP of each dataset, as NAME/AP, so that metrics.jsonl shows its course.
    """
    names = dict.fromkeys(name for one in datasets.values() for name in one.metrics)
    values = {name: [one.metrics[name] for one in datasets.values() if name in one.metrics] for name in names}
    own = {f"{name}/AP": one.metrics["AP"] for name, one in datasets.items() if "AP" in one.metrics}
    return Evaluation(
        metrics={name: sum(found) / len(found) for name, found in values.items()} | own,
        parts={name: {"images": len(one.rows), **one.metrics} for name, one in datasets.items()},
        rows=[{"dataset": name, **row} for name, one in datasets.items() for row in one.rows],
        files={
            f"{Path(file).stem}-{name}.json": content
            for name, one in datasets.items()
            for file, content in one.files.items()
        },
        datasets=dict(datasets),
    )


def n_devices() -> int:
    """Return the number of processes that train together, also before the process group is initialised."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _inference_form(model: nn.Module) -> Any:
    """Return the fused copy of a detector: the same detections in less time.

    Returns the model itself with adapters inside, and after it has diverged: kernels of the fused form make
    numbers of NaN.
    """
    if not isinstance(model, DEIMv2) or has_adapters(model):
        return model
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point())
    return model.fuse() if all(torch.isfinite(tensor).all() for tensor in tensors) else model


def _shown(
    evaluator: DetectionEvaluator, index: int, classes: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    found = evaluator.detections(index)
    return [
        {**classes[label], "score": round(score, 4), "xyxy": [round(v, 1) for v in box]}
        for box, score, label in zip(
            found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
        )
        if score >= SHOWN_SCORE
    ]


def _stack(items: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> tuple[Tensor, list[int], Tensor]:
    """Stack images; return them with their indices and their original (height, width)."""
    pixels = torch.stack([image for image, _ in items])
    sizes = torch.stack([target["orig_size"].flip(0) for _, target in items])
    return pixels, [int(target["index"]) for _, target in items], sizes


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """Drop metrics without anything to measure them on."""
    return {key: value for key, value in values.items() if math.isfinite(value)}
