"""Detections of a whole source as annotated images or a video, and as a COCO results file."""

from __future__ import annotations

__all__ = ["Summary", "coco_results", "describe", "draw", "predict_files"]

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from thawline.coco import COCO_IDS, COCO_NAMES
from thawline.data.detection.drawing import draw_boxes
from thawline.errors import ConfigError
from thawline.inference.detector import Detector, Prediction
from thawline.inference.output import Output
from thawline.inference.sources import open_source

if TYPE_CHECKING:
    import supervision

logger = logging.getLogger(__name__)


@dataclass
class Summary:
    """Counts and results of a source."""

    images: int = 0
    detections: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)
    """Name → reason."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """COCO results: `image_id`, `category_id`, `bbox` (x, y, w, h), `score`, and the names of both."""

    @property
    def images_per_second(self) -> float:
        """Speed, reading and drawing included."""
        return self.images / self.seconds if self.seconds else 0.0


def predict_files(
    detector: Detector,
    source: str | Path | int | Sequence[str | Path],
    out: Path | None = None,
    on_prediction: Callable[[Prediction], object] | None = None,
    *,
    save_results: bool = False,
    **options: Any,
) -> Summary:
    """Run a detector over a source, with a progress bar.

    Args:
        source: see `Detector`. A camera or stream ends with Ctrl-C.
        out: folder for annotated images, each at its place below the folder that all have in common; or a
            file, for a single image or a video. See `Output` for what is never overwritten.
        on_prediction: called with each prediction.
        save_results: write COCO results to predictions.json in `out`.
        options: see `Detector.stream`.
    Returns: counts, unreadable files and results. An unreadable image does not stop the run.
    Raises: ConfigError: `out` would lose a file. DataError: nothing found, or it cannot be opened.
    """
    summary, start = Summary(), time.perf_counter()
    opened = open_source(source)
    output = None if out is None else Output(out, opened, with_results=save_results)
    if output is None and save_results:
        raise ConfigError("`save_results` needs a folder: give `out`.")
    # COCO's files are named by their ids; if any name is not a number, ids are positions in the source.
    stems = [] if opened.rate is not None else [Path(frame.name).stem for frame in opened.frames]
    is_numbered = all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems) > 0
    is_coco = getattr(detector, "class_names", None) == COCO_NAMES
    predictions = detector.stream(opened, **options)
    try:
        with (
            nullcontext() if output is None else output.writer() as write,
            tqdm(total=opened.total, unit="image", disable=opened.total == 1) as progress,
        ):
            for index, prediction in enumerate(predictions):
                progress.update()
                if prediction.image is None:
                    summary.unreadable[prediction.name] = prediction.error
                    continue
                summary.images += 1
                summary.detections += len(prediction.detections)
                image_id = int(stems[index]) if is_numbered else index
                summary.results += coco_results(prediction, is_coco, image_id)
                if write is not None:
                    write(index, draw(prediction.image, prediction.detections))
                if on_prediction is not None:
                    on_prediction(prediction)
    except KeyboardInterrupt:
        if not opened.is_live:
            raise
        logger.info("Stopped after %d images.", summary.images)
    if output is not None and save_results:
        output.write_results(summary.results)
    summary.seconds = time.perf_counter() - start
    return summary


def coco_results(prediction: Prediction, is_coco: bool, image_id: int) -> list[dict[str, Any]]:
    """Return one entry per detection; category ids are COCO's for COCO's classes, else 0, 1, …."""
    found = prediction.detections
    if len(found) == 0:
        return []
    rows = zip(
        found.xyxy.tolist(),
        found.confidence.tolist(),
        found.class_id.tolist(),
        found.data["class_name"].tolist(),
        found.data.get("domain", [None] * len(found)),
        strict=True,
    )
    return [
        {
            "image_id": image_id,
            "category_id": COCO_IDS[label] if is_coco else label,
            "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 5),
            "file_name": prediction.name,
            "category_name": name,
            **({} if domain is None else {"domain": str(domain)}),
        }
        for (x1, y1, x2, y2), score, label, name, domain in rows
    ]


def describe(prediction: Prediction) -> str:
    """Return one line: the name of the image, then its detections, best first."""
    return f"{prediction.name}: {', '.join(_labels(prediction.detections)) or 'nothing'}"


def draw(image: np.ndarray, detections: supervision.Detections) -> np.ndarray:
    """Draw boxes, names and scores in a size that suits the image; RGB in, RGB out."""
    side = max(image.shape[:2])
    return draw_boxes(
        image,
        detections.xyxy,
        detections.class_id,
        _labels(detections),
        thickness=max(1, side // 400),
        font_size=max(10, side // 50),
        padding=max(2, side // 300),
    )


def _labels(detections: supervision.Detections) -> list[str]:
    names = detections.data.get("class_name", [])
    domains = detections.data.get("domain", [])
    if len(set(domains)) > 1:
        names = [f"{domain}: {name}" for domain, name in zip(domains, names, strict=True)]
    return [f"{name} {score:.2f}" for name, score in zip(names, detections.confidence, strict=False)]
