"""Detector for images and videos: `Detector.from_pretrained("runs/cards")("photo.jpg")`.

Images are resized to the training size without keeping their aspect ratio, as in training, by Pillow's
antialiased bilinear filter (torch computes the same bytes), and normalised as the checkpoint's config says.
Boxes are returned in pixels of the original image, clipped to its edges.
"""

from __future__ import annotations

__all__ = ["Detector", "Prediction"]

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thawline.errors import CheckpointError, DataError, requires_extra
from thawline.inference.classes import class_ids
from thawline.inference.frames import Frame
from thawline.inference.sources import is_single, open_source
from thawline.inference.videos import is_video
from thawline.models.deimv2 import VARIANTS, DEIMv2
from thawline.models.deimv2.checkpoints.read import read_checkpoint

if TYPE_CHECKING:
    import supervision

logger = logging.getLogger(__name__)

THRESHOLD = 0.4


@dataclass(frozen=True, eq=False)
class Prediction:
    """One image of a source and its detections."""

    name: str
    """Path, or position in the source."""
    image: np.ndarray | None
    """RGB, (H, W, 3) uint8; None if it could not be read."""
    detections: supervision.Detections
    """Empty if the image could not be read."""
    error: str = ""
    """Reason why it could not be read."""


class Detector:
    """Detector that takes images and returns `supervision.Detections`.

    Args:
        model: a detector; it is put into eval mode and fused.
        device: None: a GPU if there is one.
        threshold: minimum score of a detection; a call may override it.
    """

    def __init__(
        self, model: DEIMv2, *, device: str | torch.device | None = None, threshold: float = THRESHOLD
    ) -> None:
        self.config = model.config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        fuse = getattr(model.eval(), "fuse", lambda: model)
        self.model = fuse().to(self.device).eval()
        self.threshold = threshold
        self.class_names = self.config.shown_names
        self._mean = torch.tensor(self.config.image_mean, device=self.device)[:, None, None]
        self._std = torch.tensor(self.config.image_std, device=self.device)[:, None, None]

    @classmethod
    def from_pretrained(
        cls,
        path_or_variant: str | Path,
        variant: str | None = None,
        *,
        weights: Literal["pretrained", "random"] = "pretrained",
        class_names: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        threshold: float = THRESHOLD,
    ) -> Detector:
        """Load a detector from anything `DEIMv2.from_pretrained` reads.

        Args:
            path_or_variant: path of the weights, or a size (atto … x) for its published weights.
            variant: the size, for weights that do not determine it.
            weights: "random" builds the size untrained, to try things out.
            class_names: names of class 0, 1, …; they replace those of the weights.
        Raises: CheckpointError: unreadable, does not fit, or holds no trained detector.
        """
        if weights == "random":
            names = {} if class_names is None else {"class_names": tuple(class_names)}
            model = DEIMv2.from_variant(variant or str(path_or_variant), **names)
        else:
            _check_trained(path_or_variant, class_names)
            model = DEIMv2.from_pretrained(path_or_variant, variant)
            if class_names is not None:
                model.config = replace(model.config, class_names=tuple(class_names))
        return cls(model, device=device, threshold=threshold)

    def __call__(self, source: Any, **options: Any) -> Any:
        """Detect.

        Args:
            source: a single image (path, address, Pillow image, array, tensor), several (folder, pattern,
                batch, list of these), a video, a camera's number, or the address of a stream.
            options: see `stream`.
        Returns: the detections of a single image; a list for several, where an unreadable image is logged and
            has empty detections with the reason in `metadata["error"]`; an iterator for a video, camera
            or stream.
        Raises: DataError: the single image cannot be read, or nothing was found.
        """
        predictions = self.stream(source, **options)
        if is_video(source):
            return map(self._with_reason, predictions)
        if is_single(source):
            (prediction,) = predictions
            if prediction.error:
                raise DataError(prediction.error)
            return prediction.detections
        return [self._with_reason(prediction) for prediction in predictions]

    def stream(
        self,
        source: Any,
        *,
        threshold: float | None = None,
        classes: Sequence[str | int] | str | int | None = None,
        max_detections: int | None = None,
        tile: int | tuple[int, int] | None = None,
        batch_size: int = 8,
    ) -> Iterator[Prediction]:
        """Yield predictions image by image, with names and pixels, for large folders and videos.

        Args:
            source: see `__call__`.
            threshold: minimum score; None: the detector's.
            classes: classes to keep, by name or number, each alone or several in a text, comma-separated
                (`"0,2"`, `"dog, cat"`, `'"traffic light, red",dog'`); None: all. A name may hold a comma.
            max_detections: maximum detections per image (highest scores kept); None: all.
            tile: side of the squares, or (width, height) in pixels, that large images are cut into, with an
                overlap of a fifth; small objects keep their size.
            batch_size: images in one forward pass.
        Raises: ConfigError: unknown class. DataError: nothing found, or it cannot be opened. Both are raised
            by the call, before the first image is requested.
        """
        kept = None if classes is None else class_ids(classes, self.class_names)
        lowest = self.threshold if threshold is None else threshold
        opened = open_source(source)
        frames, step = iter(opened.frames), 1 if opened.is_live else batch_size
        batches = iter(lambda: list(islice(frames, step)), [])
        return chain.from_iterable(
            self._predict(batch, lowest, kept, max_detections, tile) for batch in batches
        )

    def _predict(
        self,
        frames: Sequence[Frame],
        threshold: float,
        classes: Sequence[int] | None,
        max_detections: int | None,
        tile: int | tuple[int, int] | None,
    ) -> Iterator[Prediction]:
        images, errors = zip(*map(_load, frames), strict=True)
        readable = [image for image in images if image is not None]
        if tile is None:
            found = iter(self._detect(readable, threshold) if readable else [])
        else:
            found = (self._detect_tiles(image, threshold, tile) for image in readable)
        for frame, image, error in zip(frames, images, errors, strict=True):
            if image is None:
                yield Prediction(frame.name, None, _supervision().Detections.empty(), error)
                continue
            detections = next(found)
            if classes is not None:
                detections = detections[np.isin(detections.class_id, classes)]
            if max_detections is not None:
                detections = detections[np.argsort(-detections.confidence, kind="stable")[:max_detections]]
            yield Prediction(frame.name, image, detections)

    @torch.inference_mode()
    def _detect(self, images: Sequence[np.ndarray], threshold: float) -> list[supervision.Detections]:
        pixels = torch.stack([_resize(image, self.config.image_size) for image in images]).to(self.device)
        output = self.model((pixels / 255 - self._mean) / self._std)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return [
            self._detections({key: value.cpu().numpy() for key, value in found.items()}, size, threshold)
            for found, size in zip(self.model.postprocess(output, sizes), sizes, strict=True)
        ]

    def _detect_tiles(
        self, image: np.ndarray, threshold: float, tile: int | tuple[int, int]
    ) -> supervision.Detections:
        width, height = (tile, tile) if isinstance(tile, int) else tile
        slicer = _supervision().InferenceSlicer(
            callback=lambda part: self._detect([part], threshold)[0],
            slice_wh=(width, height),
            overlap_wh=(width // 5, height // 5),
        )
        return slicer(image)

    def _detections(
        self, found: dict[str, np.ndarray], size: tuple[int, int], threshold: float
    ) -> supervision.Detections:
        height, width = size
        boxes = found["boxes"].clip(0, np.array([width, height, width, height], np.float32))
        kept = (found["scores"] >= threshold) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        labels = found["labels"][kept].astype(int)
        return _supervision().Detections(
            xyxy=boxes[kept],
            confidence=found["scores"][kept],
            class_id=labels,
            data={"class_name": np.array([self.class_names[label] for label in labels], dtype=str)},
        )

    def _with_reason(self, prediction: Prediction) -> supervision.Detections:
        if prediction.error:
            logger.warning("%s: %s", prediction.name, prediction.error)
            prediction.detections.metadata["error"] = prediction.error
        return prediction.detections


def _check_trained(path: str | Path, class_names: Sequence[str] | None) -> None:
    """Reject weights that would leave a part of the detector random."""
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        if str(path) in VARIANTS:
            raise CheckpointError(f"{error} For random weights pass weights='random'.") from error
        raise
    if checkpoint.layout == "backbone":
        raise CheckpointError(
            f"'{path}' holds a backbone alone: the rest of the detector would be random. Train it first."
        )
    n_classes = len(checkpoint.score_head)
    if class_names is not None and len(class_names) != n_classes:
        raise CheckpointError(
            f"'{path}' has {n_classes} classes, but {len(class_names)} `class_names` were given."
        )


def _load(frame: Frame) -> tuple[np.ndarray | None, str]:
    try:
        return frame.load(), ""
    except DataError as error:
        return None, str(error)
    except Exception as error:  # decoders raise anything, and one file must not end a whole folder
        return None, f"'{frame.name}': {type(error).__name__}: {error}"


def _resize(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize (H, W, 3) to (3, *size), both uint8, with the same result as Pillow."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)[0]


def _supervision() -> ModuleType:
    with requires_extra("Detection", "supervision", "detect"):
        import supervision
    return supervision
