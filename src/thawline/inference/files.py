"""Detections of a whole source, as pictures or a film with boxes, and as a COCO results file."""

from __future__ import annotations

__all__ = ["Summary", "coco_results", "describe", "draw", "predict_files", "write_results"]

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from thawline.data.detection.drawing import draw_boxes, save_image
from thawline.data.detection.images import IMAGE_SUFFIXES, opencv
from thawline.errors import DataError
from thawline.inference.detector import Detector, Prediction
from thawline.inference.sources import Source, is_single, is_video, open_source
from thawline.models.deimv2.coco import COCO_IDS, COCO_NAMES

if TYPE_CHECKING:
    import supervision


@dataclass
class Summary:
    """What came of a source."""

    images: int = 0
    detections: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)
    """Name → why."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """COCO results: `image_id`, `category_id`, `bbox` (x, y, w, h), `score`, and the names of both."""

    @property
    def images_per_second(self) -> float:
        """Reading and drawing included."""
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
        source: as of `Detector`.
        out: folder for pictures with boxes, under their own names; or a file, for one picture or a film.
        on_prediction: called with each.
        options: as of `Detector.stream`.
    Returns: counts, unreadable files, results. Pictures that cannot be read do not stop the rest.
    """
    summary, start = Summary(), time.perf_counter()
    opened = open_source(source)
    # COCO's files are called by their ids; where one is not, all get their place in the source.
    stems = [] if is_video(source) else [Path(frame.name).stem for frame in opened.frames]
    is_numbered = all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems) > 0
    predictions = detector.stream(opened, **options)
    with (
        _writer(source, opened, out) as writer,
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
            writer.write(prediction)
            if on_prediction is not None:
                on_prediction(prediction)
    summary.seconds = time.perf_counter() - start
    return summary


def coco_results(prediction: Prediction, class_names: tuple[str, ...], image_id: int) -> list[dict[str, Any]]:
    """One entry for each detection; categories have COCO's ids where the classes are COCO's, else 0, 1, …."""
    found, is_coco = prediction.detections, class_names == COCO_NAMES
    results = []
    for (x1, y1, x2, y2), score, label in zip(
        found.xyxy.tolist(), found.confidence.tolist(), found.class_id.tolist(), strict=True
    ):
        results.append(
            {
                "image_id": image_id,
                "category_id": COCO_IDS[label] if is_coco else label,
                "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(score, 5),
                "file_name": prediction.name,
                "category_name": class_names[label],
            }
        )
    return results


def describe(prediction: Prediction) -> str:
    """One line: name, then what was found, best first."""
    found = prediction.detections
    names = found.data.get("class_name", [])
    things = [f"{name} {score:.2f}" for name, score in zip(names, found.confidence, strict=False)]
    return f"{prediction.name}: {', '.join(things) or 'nothing'}"


def draw(image: np.ndarray, detections: supervision.Detections) -> np.ndarray:
    """The picture with boxes, names and scores in a size that suits it; RGB in, RGB out."""
    side = max(image.shape[:2])
    names = [
        f"{name} {score:.2f}"
        for name, score in zip(detections.data.get("class_name", []), detections.confidence, strict=False)
    ]
    return draw_boxes(
        image,
        detections.xyxy,
        np.asarray(detections.class_id),
        names,
        thickness=max(1, side // 400),
        font_size=max(10, side // 50),
        padding=max(2, side // 300),
    )


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Write a COCO results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results) + "\n", encoding="utf-8")


class _Writer:
    """Writes nothing."""

    def write(self, prediction: Prediction) -> None:
        """Take one picture."""

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish the file."""


class _Pictures(_Writer):
    """A picture for each, where it lay under the source."""

    def __init__(self, source: str | Path, out: Path) -> None:
        self.out = out
        self.root = Path(source) if Path(source).is_dir() else None
        self.is_file = is_single(source) and out.suffix.lower() in IMAGE_SUFFIXES

    def write(self, prediction: Prediction) -> None:
        """Draw and save."""
        name = Path(prediction.name)
        inner = name.relative_to(self.root) if self.root else Path(name.name)
        assert prediction.image is not None
        path = self.out if self.is_file else self.out / inner
        save_image(path, draw(prediction.image, prediction.detections))


class _Film(_Writer):
    """All pictures one after the other."""

    def __init__(self, source: str | Path | int, rate: float, out: Path) -> None:
        name = "camera.mp4" if isinstance(source, int) else f"{Path(source).stem}.mp4"
        self.path = out if out.suffix else out / name
        self.rate = rate
        self.film: Any = None

    def write(self, prediction: Prediction) -> None:
        """Draw and append; the first picture decides the size."""
        cv2 = opencv()
        assert prediction.image is not None
        if self.film is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = prediction.image.shape[1], prediction.image.shape[0]
            self.film = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)
            if not self.film.isOpened():
                raise DataError(f"Cannot write a film to '{self.path}'. Name a file that ends in .mp4.")
        self.film.write(np.ascontiguousarray(draw(prediction.image, prediction.detections)[..., ::-1]))

    def close(self) -> None:
        """Finish the file."""
        if self.film is not None:
            self.film.release()


def _writer(source: str | Path | int, opened: Source, out: Path | None) -> _Writer:
    if out is None:
        return _Writer()
    return _Pictures(str(source), out) if opened.rate is None else _Film(source, opened.rate, out)
