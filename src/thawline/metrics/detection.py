"""Detection metrics: COCO's twelve numbers, per class and size, curves, confusions, worst images.

    evaluator = DetectionEvaluator(dataset.records, class_names)
    evaluator.update(indices, detections)        # each batch, each process its own
    metrics = evaluator.compute()                # gathers over processes; every process gets the same result
    metrics.statistics["AP"]

AP is computed by faster-coco-eval, whose numbers equal those of COCO's own tools. The score threshold of the
best F1, and the errors made there, come from `mistakes.py`.
"""

from __future__ import annotations

__all__ = [
    "RECALLS",
    "STATISTICS",
    "AnnotatedImage",
    "ClassMetrics",
    "DetectionEvaluator",
    "DetectionMetrics",
    "Detections",
]

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from thawline.errors import ConfigError, DataError, requires_extra
from thawline.metrics.mistakes import (
    Confusion,
    ImageMistakes,
    OperatingPoint,
    count_mistakes,
    match_image,
    operating_point,
)

STATISTICS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""COCO's twelve numbers in its tools' order. ARn: with at most n detections per image and class."""

RECALLS = tuple(round(0.01 * i, 2) for i in range(101))
"""Recalls at which COCO samples precision."""

ALL, SMALL, MEDIUM, LARGE = range(4)
"""Indices of the area ranges in COCO's arrays: all, below 32², to 96², above."""
AT_MOST_1, AT_MOST_10, AT_MOST_100, AT_MOST_MAX = 0, 1, 2, -1
"""Indices of the limits of detections in COCO's arrays."""
IOU_50, IOU_75 = 0, 5
MOST_CELLS = 500_000
"""Images × classes that COCO's tools evaluate at once; they keep some 1.5 kB for each."""

logger = logging.getLogger(__name__)


class AnnotatedImage(Protocol):
    """Annotations of an image, such as `thawline.data.detection.records.ImageRecord`."""

    @property
    def boxes_xyxy(self) -> np.ndarray:
        """(N, 4), pixels."""

    @property
    def labels(self) -> np.ndarray:
        """(N,), int, from 0."""

    @property
    def iscrowd(self) -> np.ndarray:
        """(N,), bool: may match any number of detections, and is never missed."""

    @property
    def area(self) -> np.ndarray:
        """(N,), pixels²: decides between small, medium and large."""


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """Metrics of one class. NaN if the class has no boxes (of that size)."""

    name: str
    n_boxes: int
    """Without crowds."""
    AP: float
    AP50: float
    AP75: float
    AP_small: float
    AP_medium: float
    AP_large: float
    AR100: float
    precision: float
    """At `DetectionMetrics.threshold` and IoU 0.5. The same for recall and f1."""
    recall: float
    f1: float
    precision_at_recall: tuple[float, ...]
    """At IoU 0.5 and the recalls 0, 0.01 … 1, interpolated as in COCO."""


@dataclass(frozen=True, kw_only=True)
class DetectionMetrics:
    """Result of an evaluation, in plain numbers."""

    statistics: dict[str, float]
    """`STATISTICS`. NaN if there is nothing to measure (no small box, say), where COCO's tools write -1."""
    classes: tuple[ClassMetrics, ...]
    threshold: float
    """Score at which F1 over all boxes is best (IoU 0.5): a first choice of a threshold for detections."""
    precision: float
    """At `threshold`, over the boxes of all classes. The same for recall and f1."""
    recall: float
    f1: float
    confusion: tuple[tuple[int, ...], ...]
    """(C + 1, C + 1) at `threshold`: rows are true classes, columns predicted, the last of each "nothing".
    Empty for more than 100 classes, since its size grows with their square."""
    confusions: tuple[Confusion, ...]
    """The most frequent 100 at `threshold`, "nothing" included, most frequent first."""
    images: tuple[ImageMistakes, ...]
    """Every image, worst first."""
    n_images: int
    n_boxes: int

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values for JSON, with None for NaN, which JSON lacks."""
        return _map_leaves(
            asdict(self), lambda value: None if isinstance(value, float) and math.isnan(value) else value
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectionMetrics:
        """Restore metrics from `to_dict`."""
        values = _map_leaves(dict(values), lambda value: math.nan if value is None else value)
        classes = tuple(ClassMetrics(**entry) for entry in values["classes"])
        images = tuple(ImageMistakes(**entry) for entry in values["images"])
        confusions = tuple(Confusion(**entry) for entry in values.get("confusions", ()))
        return cls(**{**values, "classes": classes, "images": images, "confusions": confusions})


@dataclass(frozen=True)
class Detections:
    """Detections of one image, by descending score."""

    boxes_xyxy: np.ndarray
    """(K, 4), pixels."""
    scores: np.ndarray
    """(K,)"""
    labels: np.ndarray
    """(K,), int64."""


class DetectionEvaluator:
    """Collect detections image by image and evaluate them against the annotations.

    Args:
        images: annotations of all evaluated images, in the dataset's order; the same in every process.
        class_names: name of label 0, 1, ….
        max_dets: detections per image and class that count, best first, at least 100, which is COCO's number
            (AR1, AR10 and AR100 have their own).
    Raises: DataError: if a label has no name. ConfigError: for a lower `max_dets`. MissingExtraError:
        without faster-coco-eval.
    """

    def __init__(
        self, images: Sequence[AnnotatedImage], class_names: Sequence[str], max_dets: int = 100
    ) -> None:
        _coco_tools()
        if max_dets < 100:
            raise ConfigError(f"`max_dets` must be at least 100, got {max_dets}.")
        self.max_dets = max_dets
        self.images = tuple(images)
        self.class_names = tuple(class_names)
        highest = max((int(image.labels.max()) for image in self.images if len(image.labels)), default=-1)
        if highest >= len(self.class_names):
            raise DataError(f"Label {highest} has no name: {len(self.class_names)} class names were given.")
        self._detections: dict[int, Detections] = {}

    def update(self, indices: Iterable[int] | torch.Tensor, detections: Iterable[Mapping[str, Any]]) -> None:
        """Add the detections of some images.

        An image given twice counts once: samplers pad the last batch with images from the start.

        Args:
            indices: indices of the images in `images`.
            detections: per image `boxes` (K, 4) xyxy in pixels, `scores` (K,), `labels` (K,); tensors or
                arrays.
        Raises: DataError: for an index or label out of range, or scores that are not finite.
        """
        for index, detected in zip(indices, detections, strict=True):
            self._detections.setdefault(self._check_index(index), self._convert(detected))

    def reset(self) -> None:
        """Forget all detections."""
        self._detections.clear()

    def compute(self) -> DetectionMetrics:
        """Evaluate. In a process group all processes must call this; all get the same result.

        Raises: DataError: if an image was never evaluated: its boxes would silently count as missed.
        """
        self._detections = self._gather()
        if missing := [i for i in range(len(self.images)) if i not in self._detections]:
            raise DataError(
                f"{len(missing)} of {len(self.images)} images were not evaluated (first: {missing[0]}). "
                "Pass every image to `update`, even those without detections."
            )
        n_classes = len(self.class_names)
        results = [self._detections[i] for i in range(len(self.images))]
        matched = [
            match_image(
                image.boxes_xyxy, image.labels, image.iscrowd, found.boxes_xyxy, found.scores, found.labels
            )
            for image, found in zip(self.images, results, strict=True)
        ]
        point = operating_point(matched, n_classes)
        confusion, confusions, images = count_mistakes(matched, point.threshold, n_classes)
        self._remark_crowded()
        precision, recall = _evaluate_coco(self.images, results, n_classes, self.max_dets)
        return DetectionMetrics(
            statistics=_statistics(precision, recall),
            classes=tuple(
                _class_metrics(k, name, precision[:, :, k], recall[:, k], point)
                for k, name in enumerate(self.class_names)
            ),
            threshold=point.threshold,
            precision=float(point.precisions[-1]),
            recall=float(point.recalls[-1]),
            f1=float(point.f1s[-1]),
            confusion=tuple(map(tuple, confusion.tolist())),
            confusions=confusions,
            images=images,
            n_images=len(self.images),
            n_boxes=int(point.n_boxes[-1]),
        )

    def detections(self, index: int) -> Detections:
        """Return the detections of an image; after `compute`, those of any process."""
        return self._detections[self._check_index(index)]

    def _remark_crowded(self) -> None:
        """Say that images hold more boxes of a class than detections count."""
        counts = [int(np.bincount(image.labels[~image.iscrowd], minlength=1).max()) for image in self.images]
        crowded = [n for n in counts if n > self.max_dets]
        if crowded:
            _warn_once(
                f"{len(crowded)} of {len(counts)} images hold more than {self.max_dets} boxes of a class, up "
                f"to {max(crowded)}, and no more detections count, which lowers AP. Set `objective.max_dets`."
            )

    def _check_index(self, index: int | torch.Tensor) -> int:
        index = int(index)
        if not 0 <= index < len(self.images):
            raise DataError(f"Image index must be in 0–{len(self.images) - 1}, got {index}.")
        return index

    def _convert(self, detected: Mapping[str, Any]) -> Detections:
        boxes = _to_numpy(detected["boxes"]).reshape(-1, 4)
        scores, labels = _to_numpy(detected["scores"]), _to_numpy(detected["labels"]).astype(np.int64)
        if not len(boxes) == len(scores) == len(labels):
            raise DataError(
                f"Detections of an image must match: {len(boxes)} boxes, {len(scores)} scores, "
                f"{len(labels)} labels."
            )
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            raise DataError(
                "Detections contain NaN or infinity: the model has diverged. Lower the learning rate."
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise DataError(
                f"Detected labels must be in 0–{len(self.class_names) - 1}, "
                f"got {labels.min()}–{labels.max()}."
            )
        order = np.argsort(-scores, kind="stable")
        return Detections(boxes[order], scores[order], labels[order])

    def _gather(self) -> dict[int, Detections]:
        if not (dist.is_available() and dist.is_initialized()):
            return self._detections
        parts: list[dict[int, Detections]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, self._detections)
        merged: dict[int, Detections] = {}
        for part in reversed(parts):  # the lowest rank's detections count, so that all processes agree
            merged |= part
        return merged


@cache
def _warn_once(message: str) -> None:
    """Log a warning, but not again after every epoch."""
    logger.warning(message)


def _class_metrics(
    k: int, name: str, precision: np.ndarray, recall: np.ndarray, point: OperatingPoint
) -> ClassMetrics:
    """Summarise class k. `precision`: (T, R, A, M), `recall`: (T, A, M), as in `_evaluate_coco`."""
    at_most_100, precision = recall[:, ALL, AT_MOST_100], precision[..., AT_MOST_MAX]
    return ClassMetrics(
        name=name,
        n_boxes=int(point.n_boxes[k]),
        AP=_mean(precision[..., ALL]),
        AP50=_mean(precision[IOU_50, :, ALL]),
        AP75=_mean(precision[IOU_75, :, ALL]),
        AP_small=_mean(precision[..., SMALL]),
        AP_medium=_mean(precision[..., MEDIUM]),
        AP_large=_mean(precision[..., LARGE]),
        AR100=_mean(at_most_100),
        precision=float(point.precisions[k]),
        recall=float(point.recalls[k]),
        f1=float(point.f1s[k]),
        precision_at_recall=tuple(precision[IOU_50, :, ALL].tolist()),
    )


def _evaluate_coco(
    images: Sequence[AnnotatedImage], results: Sequence[Detections], n_classes: int, max_dets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Run faster-coco-eval; NaN where there is nothing to measure.

    Returns: precision (T, R, K, A, M) and recall (T, K, A, M), for T IoU thresholds, R recalls, K classes, A
        areas, M limits of detections: 1, 10, 100 and, if it is another, `max_dets`.
    """
    step = max(1, MOST_CELLS // max(1, len(images)))
    parts = [
        _evaluate_classes(images, results, range(start, min(start + step, n_classes)), max_dets)
        for start in range(0, max(1, n_classes), step)
    ]
    precisions, recalls = zip(*parts, strict=True)
    return np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)


def _evaluate_classes(
    images: Sequence[AnnotatedImage], results: Sequence[Detections], classes: range, max_dets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate some of the classes, each of which is independent of the others."""
    coco, evaluate = _coco_tools()
    truth = [
        {"image_id": i, "category_id": label, "bbox": bbox, "area": area, "iscrowd": int(crowd)}
        for i, image in enumerate(images)
        for label, bbox, area, crowd in _coco_rows(image, image.area, image.iscrowd, classes=classes)
    ]
    found = [
        {"image_id": i, "category_id": label, "bbox": bbox, "area": bbox[2] * bbox[3], "score": score}
        for i, result in enumerate(results)
        for label, bbox, score in _coco_rows(result, result.scores, classes=classes)
    ]
    for entries in (truth, found):
        for number, entry in enumerate(entries, start=1):  # COCO's matching takes id 0 for "no match"
            entry["id"] = number
    shared = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": k, "name": str(k)} for k in classes],
    }
    datasets = (coco({**shared, "annotations": entries}) for entries in (truth, found))
    evaluator = evaluate(*datasets, "bbox")
    evaluator.params.maxDets = sorted({1, 10, 100, max_dets})
    evaluator.evaluate()
    evaluator.accumulate()
    shape = (10, len(RECALLS), len(classes), 4, len(evaluator.params.maxDets))
    precision, recall = (
        np.where(np.asarray(values) < 0, math.nan, values)
        for values in (evaluator.eval["precision"], evaluator.eval["recall"])
    )
    return precision.reshape(shape), recall.reshape(shape[:1] + shape[2:])


def _statistics(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """Return `STATISTICS`: means over all that is defined, as in COCO's tools."""
    best, found = precision[..., AT_MOST_MAX], recall[..., AT_MOST_MAX]
    values = [best[..., ALL], best[IOU_50, ..., ALL], best[IOU_75, ..., ALL]]
    values += [best[..., size] for size in (SMALL, MEDIUM, LARGE)]
    values += [recall[..., ALL, limit] for limit in (AT_MOST_1, AT_MOST_10, AT_MOST_100)]
    values += [found[..., size] for size in (SMALL, MEDIUM, LARGE)]
    return dict(zip(STATISTICS, map(_mean, values), strict=True))


def _coco_tools() -> tuple[Any, Any]:
    with requires_extra("COCO metrics", "faster-coco-eval", "detect"):
        from faster_coco_eval import COCO, COCOeval_faster
    return COCO, COCOeval_faster


def _coco_rows(
    image: AnnotatedImage | Detections, *columns: np.ndarray, classes: range | None = None
) -> Iterable[Any]:
    """Yield label, bbox (x, y, width, height) and other columns' values, for boxes of some classes or all."""
    corners, others = image.boxes_xyxy[:, :2], image.boxes_xyxy[:, 2:]
    values = (image.labels, np.concatenate([corners, others - corners], 1), *columns)
    if classes is not None:
        chosen = (image.labels >= classes.start) & (image.labels < classes.stop)
        values = tuple(column[chosen] for column in values)
    return zip(*(column.tolist() for column in values), strict=True)


def _to_numpy(values: object) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, np.float64)


def _mean(values: np.ndarray) -> float:
    """Return the mean of the entries that are not NaN; NaN if there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def _map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to all leaves of nested dicts and sequences; sequences become tuples."""
    if isinstance(value, dict):
        return {key: _map_leaves(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_map_leaves(item, function) for item in value)
    return function(value)
