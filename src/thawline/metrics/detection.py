"""How good detections are: COCO's twelve numbers, each class and size, curves, confusions, worst images.

    evaluator = DetectionEvaluator(dataset.records, class_names)
    evaluator.update(indices, detections)        # each batch, each process its own
    metrics = evaluator.compute()                # gathers over processes; every process gets the same answer
    metrics.statistics["AP"]

AP is computed by faster-coco-eval, whose numbers equal COCO's own tools'. What AP does not tell, the score
to cut at and what then goes wrong, comes from `thawline.metrics.mistakes`.
"""

from __future__ import annotations

__all__ = ["STATISTICS", "AnnotatedImage", "ClassMetrics", "DetectionEvaluator", "DetectionMetrics"]

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from thawline.errors import DataError, MissingExtraError
from thawline.metrics.mistakes import ImageMistakes, Matched, match_image, operating_point, tell_mistakes

STATISTICS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""COCO's twelve numbers in its tools' order. ARn: with at most n detections per image and class."""

RECALLS = tuple(round(0.01 * i, 2) for i in range(101))
"""The recalls at which COCO takes precision."""

ALL, SMALL, MEDIUM, LARGE = range(4)
"""Places of the area ranges in COCO's arrays: all, below 32², to 96², above."""
AT_MOST_100 = 2
IOU_50, IOU_75 = 0, 5


class AnnotatedImage(Protocol):
    """What an evaluation needs of an image; `thawline.data.detection.records.ImageRecord` has it."""

    @property
    def boxes_xyxy(self) -> np.ndarray:
        """(N, 4), pixels."""

    @property
    def labels(self) -> np.ndarray:
        """(N,), int, from 0."""

    @property
    def iscrowd(self) -> np.ndarray:
        """(N,), bool: matched by any number of detections, and never missed."""

    @property
    def area(self) -> np.ndarray:
        """(N,), pixels²: decides between small, medium and large."""


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """One class. NaN where the class has no boxes (of that size)."""

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
    """At `DetectionMetrics.threshold` and IoU 0.5, as are recall and f1."""
    recall: float
    f1: float
    precision_at_recall: tuple[float, ...]
    """At IoU 0.5 and the recalls 0, 0.01 … 1, as COCO interpolates it."""


@dataclass(frozen=True, kw_only=True)
class DetectionMetrics:
    """The result of an evaluation, in plain numbers."""

    statistics: dict[str, float]
    """`STATISTICS`. NaN where there is nothing to measure (no small box, say); COCO's tools write -1."""
    classes: tuple[ClassMetrics, ...]
    threshold: float
    """The score at which F1 over all boxes is best (IoU 0.5): a first choice where detections must be cut."""
    precision: float
    """At `threshold`, over all classes' boxes together, as are recall and f1."""
    recall: float
    f1: float
    confusion: tuple[tuple[int, ...], ...]
    """(C + 1, C + 1) at `threshold`: rows are true classes, columns predicted, the last of each "nothing"."""
    images: tuple[ImageMistakes, ...]
    """Every image, worst first."""
    n_images: int
    n_boxes: int

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values for JSON, which has no NaN: null stands for it."""
        return _without_nan(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectionMetrics:
        """What `to_dict` gave."""
        return cls(
            statistics={key: _number(value) for key, value in values["statistics"].items()},
            classes=tuple(ClassMetrics(**_with_nan(entry)) for entry in values["classes"]),
            confusion=tuple(map(tuple, values["confusion"])),
            images=tuple(ImageMistakes(**_with_nan(entry)) for entry in values["images"]),
            threshold=values["threshold"],
            precision=_number(values["precision"]),
            recall=_number(values["recall"]),
            f1=_number(values["f1"]),
            n_images=values["n_images"],
            n_boxes=values["n_boxes"],
        )


@dataclass(frozen=True)
class Detections:
    """What was detected in one image, best score first."""

    boxes_xyxy: np.ndarray
    """(K, 4), pixels."""
    scores: np.ndarray
    """(K,)"""
    labels: np.ndarray
    """(K,), int64."""


class DetectionEvaluator:
    """Collects detections image by image and measures them against the annotations.

    Args:
        images: the annotations of the evaluated images, all of them in every process, in the data set's
        order. class_names: the name of label 0, 1, ….
    Raises: DataError: if a label has no name. MissingExtraError: without faster-coco-eval.
    """

    def __init__(self, images: Sequence[AnnotatedImage], class_names: Sequence[str]) -> None:
        _coco_tools()
        self.images = tuple(images)
        self.class_names = tuple(class_names)
        highest = max((int(image.labels.max()) for image in self.images if len(image.labels)), default=-1)
        if highest >= len(self.class_names):
            raise DataError(f"Label {highest} has no name: {len(self.class_names)} class names were given.")
        self._detections: dict[int, Detections] = {}

    def update(self, indices: Iterable[int] | torch.Tensor, detections: Iterable[Mapping[str, Any]]) -> None:
        """Add the detections of some images.

        An image that comes twice counts once: samplers pad the last batch with images from the start.

        Args:
            indices: places of the images in `images`. detections: per image `boxes` (K, 4) xyxy in pixels,
            `scores` (K,), `labels` (K,); tensors or arrays.
        Raises: DataError: for an index or label out of range, or scores that are not finite.
        """
        for index, detected in zip(indices, detections, strict=True):
            self._detections.setdefault(self._index(index), self._checked(detected))

    def reset(self) -> None:
        """Forget all detections."""
        self._detections.clear()

    def compute(self) -> DetectionMetrics:
        """Measure. Where a process group is up, all its processes must call this; all get the same answer.

        Raises: DataError: if an image was never evaluated: its boxes would silently count as missed.
        """
        self._detections = detections = self._gathered()
        if missing := [i for i in range(len(self.images)) if i not in detections]:
            raise DataError(
                f"{len(missing)} of {len(self.images)} images were not evaluated (first: {missing[0]}). "
                "Give `update` every image, also those without detections."
            )
        results = [detections[i] for i in range(len(self.images))]
        arrays = _accumulate(self.images, results, len(self.class_names))
        matched = [
            match_image(
                image.boxes_xyxy, image.labels, image.iscrowd, found.boxes_xyxy, found.scores, found.labels
            )
            for image, found in zip(self.images, results, strict=True)
        ]
        return self._summary(arrays, matched)

    def detections(self, index: int) -> Detections:
        """What was detected in an image; after `compute`, whichever process did it."""
        return self._detections[self._index(index)]

    def to_coco_results(
        self, image_ids: Sequence[int | str], class_ids: Sequence[int | str]
    ) -> list[dict[str, Any]]:
        """Detections in COCO's result format, with the files' own ids; after `compute`, of all processes."""
        return [
            {
                "image_id": image_ids[index],
                "category_id": class_ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for index, found in sorted(self._detections.items())
            for (x1, y1, x2, y2), score, label in zip(
                found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
            )
        ]

    def _index(self, index: int | torch.Tensor) -> int:
        index = int(index)
        if not 0 <= index < len(self.images):
            raise DataError(f"Image index must be in 0–{len(self.images) - 1}, got {index}.")
        return index

    def _checked(self, detected: Mapping[str, Any]) -> Detections:
        boxes = _array(detected["boxes"]).reshape(-1, 4)
        scores, labels = _array(detected["scores"]), _array(detected["labels"]).astype(np.int64)
        if not len(boxes) == len(scores) == len(labels):
            raise DataError(
                f"Detections of an image must match: {len(boxes)} boxes, {len(scores)} scores, "
                f"{len(labels)} labels."
            )
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            raise DataError(
                "Detections hold NaN or infinity: the model has diverged. Lower the learning rate."
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise DataError(
                f"Detected labels must be in 0–{len(self.class_names) - 1}, "
                f"got {labels.min()}–{labels.max()}."
            )
        order = np.argsort(-scores, kind="stable")
        return Detections(boxes[order], scores[order], labels[order])

    def _gathered(self) -> dict[int, Detections]:
        if not (dist.is_available() and dist.is_initialized()):
            return self._detections
        parts: list[dict[int, Detections]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, self._detections)
        merged: dict[int, Detections] = {}
        for part in reversed(parts):  # the lowest rank's answer stands, so that all processes agree
            merged |= part
        return merged

    def _summary(self, arrays: _CocoArrays, matched: list[Matched]) -> DetectionMetrics:
        n_classes = len(self.class_names)
        point = operating_point(matched, n_classes)
        confusion, images = tell_mistakes(matched, point.threshold, n_classes)
        return DetectionMetrics(
            statistics=dict(zip(STATISTICS, arrays.statistics, strict=True)),
            classes=tuple(
                ClassMetrics(
                    name=name,
                    n_boxes=int(point.n_boxes[k]),
                    AP=arrays.average_precision(k),
                    AP50=arrays.average_precision(k, iou=IOU_50),
                    AP75=arrays.average_precision(k, iou=IOU_75),
                    AP_small=arrays.average_precision(k, SMALL),
                    AP_medium=arrays.average_precision(k, MEDIUM),
                    AP_large=arrays.average_precision(k, LARGE),
                    AR100=_mean(arrays.recall[:, k, ALL, AT_MOST_100]),
                    precision=float(point.precisions[k]),
                    recall=float(point.recalls[k]),
                    f1=float(point.f1s[k]),
                    precision_at_recall=tuple(
                        math.nan if value < 0 else float(value)
                        for value in arrays.precision[IOU_50, :, k, ALL, AT_MOST_100]
                    ),
                )
                for k, name in enumerate(self.class_names)
            ),
            threshold=point.threshold,
            precision=point.precision,
            recall=point.recall,
            f1=point.f1,
            confusion=tuple(tuple(row) for row in confusion.tolist()),
            images=images,
            n_images=len(self.images),
            n_boxes=int(point.n_boxes.sum()),
        )


@dataclass(frozen=True)
class _CocoArrays:
    """faster-coco-eval's arrays: T IoU thresholds, R recalls, K classes, A areas, M detection limits."""

    statistics: tuple[float, ...]
    precision: np.ndarray
    """(T, R, K, A, M), -1 where a class has no box of that area."""
    recall: np.ndarray
    """(T, K, A, M)"""

    def average_precision(self, k: int, area: int = ALL, iou: int | slice = slice(None)) -> float:
        return _mean(self.precision[iou, :, k, area, AT_MOST_100])


def _accumulate(
    images: Sequence[AnnotatedImage], results: Sequence[Detections], n_classes: int
) -> _CocoArrays:
    coco, evaluate = _coco_tools()
    shell = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": k, "name": str(k)} for k in range(n_classes)],
    }
    truth = [
        {"image_id": i, "category_id": label, "bbox": bbox, "area": area, "iscrowd": int(crowd)}
        for i, image in enumerate(images)
        for label, bbox, area, crowd in zip(
            image.labels.tolist(),
            _xywh(image.boxes_xyxy),
            image.area.tolist(),
            image.iscrowd.tolist(),
            strict=True,
        )
    ]
    found = [
        {"image_id": i, "category_id": label, "bbox": bbox, "area": bbox[2] * bbox[3], "score": score}
        for i, result in enumerate(results)
        for label, bbox, score in zip(
            result.labels.tolist(), _xywh(result.boxes_xyxy), result.scores.tolist(), strict=True
        )
    ]
    for entries in (truth, found):
        for number, entry in enumerate(entries, start=1):  # COCO's matching takes id 0 for "no match"
            entry["id"] = number
    evaluator = evaluate(coco({**shell, "annotations": truth}), coco({**shell, "annotations": found}), "bbox")
    evaluator.run()
    statistics = tuple(
        math.nan if value < 0 else float(value) for value in evaluator.stats[: len(STATISTICS)]
    )
    shape = (10, len(RECALLS), n_classes, 4, 3)
    precision = np.asarray(evaluator.eval["precision"]).reshape(shape)
    recall = np.asarray(evaluator.eval["recall"]).reshape(shape[:1] + shape[2:])
    return _CocoArrays(statistics, precision, recall)


def _coco_tools() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise MissingExtraError("COCO metrics", "faster-coco-eval", "detect") from error
    return COCO, COCOeval_faster


def _xywh(boxes_xyxy: np.ndarray) -> list[list[float]]:
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], 1).tolist()


def _array(values: object) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, np.float64)


def _mean(values: np.ndarray) -> float:
    """Mean of the entries that are defined; NaN where none is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _with_nan(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(map(_number, value)) if isinstance(value, (list, tuple)) else _number(value)
        for key, value in entry.items()
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
