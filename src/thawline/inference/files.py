"""Detections of a whole source as annotated images or a video, and as a COCO results file."""

from __future__ import annotations

__all__ = ["Summary", "coco_results", "describe", "draw", "predict_files", "write_results"]

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tqdm import tqdm

from thawline.data.detection.drawing import draw_boxes, save_image
from thawline.data.detection.images import IMAGE_SUFFIXES, opencv
from thawline.errors import DataError
from thawline.files import write_text
from thawline.inference.detector import Detector, Prediction
from thawline.inference.sources import Source, is_single, is_video, open_source
from thawline.models.deimv2.coco import COCO_IDS, COCO_NAMES

if TYPE_CHECKING:
    import supervision

Write: TypeAlias = Callable[[str, np.ndarray], object]
"""Writes one annotated image, given the name of its frame and its pixels."""


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
    source: str | Path | int,
    out: Path | None = None,
    on_prediction: Callable[[Prediction], object] | None = None,
    **options: Any,
) -> Summary:
    """Run a detector over a source, with a progress bar.

    Args:
        source: see `Detector`.
        out: folder for annotated images, which keep their names; or a file, for a single image or a video.
        on_prediction: called with each prediction.
        options: see `Detector.stream`.
    Returns: counts, unreadable files and results. An unreadable image does not stop the run.
    """
    summary, start = Summary(), time.perf_counter()
    opened = open_source(source)
    # COCO's files are named by their ids; if any name is not a number, ids are positions in the source.
    stems = [] if is_video(source) else [Path(frame.name).stem for frame in opened.frames]
    is_numbered = all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems) > 0
    predictions = detector.stream(opened, **options)
    with (
        _writer(source, opened, out) as write,
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
            summary.results += coco_results(prediction, detector.class_names, image_id)
            if write is not None:
                write(prediction.name, draw(prediction.image, prediction.detections))
            if on_prediction is not None:
                on_prediction(prediction)
    summary.seconds = time.perf_counter() - start
    return summary


def coco_results(prediction: Prediction, class_names: tuple[str, ...], image_id: int) -> list[dict[str, Any]]:
    """Return one entry per detection; category ids are COCO's for COCO's classes, else 0, 1, …."""
    found = prediction.detections
    category_ids = COCO_IDS if class_names == COCO_NAMES else range(len(class_names))
    rows = zip(found.xyxy.tolist(), found.confidence.tolist(), found.class_id.tolist(), strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 5),
            "file_name": prediction.name,
            "category_name": class_names[label],
        }
        for (x1, y1, x2, y2), score, label in rows
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


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Write a COCO results file."""
    write_text(path, json.dumps(results) + "\n")


def _labels(detections: supervision.Detections) -> list[str]:
    names = detections.data.get("class_name", [])
    return [f"{name} {score:.2f}" for name, score in zip(names, detections.confidence, strict=False)]


@contextmanager
def _writer(source: str | Path | int, opened: Source, out: Path | None) -> Iterator[Write | None]:
    """Yield the function that writes one annotated image, or None if nothing is to be written."""
    if out is None:
        yield None
    elif opened.rate is None:
        root = Path(str(source)) if Path(str(source)).is_dir() else None
        is_file = is_single(source) and out.suffix.lower() in IMAGE_SUFFIXES

        def path_of(name: str) -> Path:
            return out if is_file else out / (Path(name).relative_to(root) if root else Path(name).name)

        yield lambda name, image: save_image(path_of(name), image)
    else:
        name = "camera.mp4" if isinstance(source, int) else f"{Path(source).stem}.mp4"
        with _video(out if out.suffix else out / name, opened.rate) as append:
            yield append


@contextmanager
def _video(path: Path, rate: float) -> Iterator[Write]:
    """Yield a function that appends a frame to a video; the first frame determines its size."""
    cv2, video = opencv(), None

    def append(_: str, image: np.ndarray) -> None:
        nonlocal video
        if video is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, image.shape[1::-1])
            if not video.isOpened():
                raise DataError(f"Cannot write a video to '{path}'. Use a file name that ends in .mp4.")
        video.write(np.ascontiguousarray(image[..., ::-1]))

    try:
        yield append
    finally:
        if video is not None:
            video.release()
