"""Detector for images and videos: `Detector.from_pretrained("runs/cards")("photo.jpg")`.

Boxes are returned in pixels of the original image, clipped to its edges. This file loads no torch: a network
is either a `TorchNetwork`, imported where one is given, or an `ExportedNetwork`.
"""

from __future__ import annotations

__all__ = ["Detector", "Prediction", "empty_detections", "load_frame", "with_reason"]

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from thawline.errors import ConfigError, DataError, requires_extra
from thawline.inference.classes import class_ids
from thawline.inference.exported import ExportedNetwork, check_number_of_classes, is_exported
from thawline.inference.frames import Found, Frame, Network
from thawline.inference.sources import is_single, open_source
from thawline.inference.videos import is_video

if TYPE_CHECKING:
    import supervision
    import torch

    from thawline.models.deimv2 import DEIMv2

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
        model: a `DEIMv2`, which is put into eval mode and fused; or an exported file (.onnx, .xml), or a
            folder that holds one, itself or in `exports/`, which runs on the CPU without torch; or a network.
        device: of a `DEIMv2`. None: a GPU if there is one.
        threshold: minimum score of a detection; a call may override it.
    Raises: CheckpointError: no exported file, or not one of thawline's.
    """

    def __init__(
        self,
        model: DEIMv2 | str | Path | Network,
        *,
        device: str | torch.device | None = None,
        threshold: float = THRESHOLD,
    ) -> None:
        self.network: Network
        """The network: from RGB images to the highest-scoring boxes."""
        if isinstance(model, str | Path):
            if device not in (None, "cpu"):
                raise ConfigError(f"`device={device}`: exported files run on the CPU.")
            self.network = ExportedNetwork(model)
        elif not hasattr(model, "postprocess"):
            self.network = cast("Network", model)
        else:
            from thawline.inference.torch_network import TorchNetwork

            self.network = TorchNetwork(cast("DEIMv2", model), device)
        self.threshold = _score(threshold)
        self.class_names = self.network.class_names

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
        """Load a detector from anything `DEIMv2.from_pretrained` reads, or from an exported file.

        Args:
            path_or_variant: path of the weights, or a size (atto … x) for its published weights; or an
                exported file (.onnx, .xml), or a folder with nothing else.
            variant: the size, for weights that do not determine it.
            weights: "random" builds the size untrained, to try things out.
            class_names: names of class 0, 1, …; they replace those of the weights.
        Raises: CheckpointError: unreadable, does not fit, or holds no trained detector.
        """
        if not is_exported(path_or_variant):
            from thawline.inference.torch_network import load_model

            model: Any = load_model(path_or_variant, variant, weights, class_names)
            return cls(model, device=device, threshold=threshold)
        if variant is not None or weights == "random":
            raise ConfigError(f"'{path_or_variant}' is exported: its size and its weights are in the file.")
        detector = cls(path_or_variant, device=device, threshold=threshold)
        if class_names is not None:
            check_number_of_classes(path_or_variant, len(detector.class_names), class_names)
            detector.class_names = tuple(class_names)
        return detector

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
            return map(with_reason, predictions)
        if is_single(source):
            (prediction,) = predictions
            if prediction.error:
                raise DataError(prediction.error)
            return prediction.detections
        return [with_reason(prediction) for prediction in predictions]

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
        Raises: ConfigError: unknown class, or a threshold that is no score. DataError: nothing found, or it
            cannot be opened. Both are raised by the call, before the first image is requested.
        """
        kept = None if classes is None else class_ids(classes, self.class_names)
        lowest = self.threshold if threshold is None else _score(threshold)
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
        images, errors = zip(*map(load_frame, frames), strict=True)
        readable = [image for image in images if image is not None]
        if tile is None:
            found = iter(self._detect(readable, threshold) if readable else [])
        else:
            found = (self._detect_tiles(image, threshold, tile) for image in readable)
        for frame, image, error in zip(frames, images, errors, strict=True):
            if image is None:
                yield Prediction(frame.name, None, empty_detections(), error)
                continue
            detections = next(found)
            if classes is not None:
                detections = detections[np.isin(detections.class_id, classes)]
            if max_detections is not None:
                detections = detections[np.argsort(-detections.confidence, kind="stable")[:max_detections]]
            yield Prediction(frame.name, image, detections)

    def _detect(self, images: Sequence[np.ndarray], threshold: float) -> list[supervision.Detections]:
        return [
            self._detections(found, (image.shape[0], image.shape[1]), threshold)
            for found, image in zip(self.network(images), images, strict=True)
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

    def _detections(self, found: Found, size: tuple[int, int], threshold: float) -> supervision.Detections:
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


def with_reason(prediction: Prediction) -> supervision.Detections:
    """Return the detections of a prediction; those of an unreadable image, which is logged, say why."""
    if prediction.error:
        logger.warning("%s: %s", prediction.name, prediction.error)
        prediction.detections.metadata["error"] = prediction.error
    return prediction.detections


def _score(threshold: float) -> float:
    """Return a threshold as it is. Raises: ConfigError: if it is no score."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"`threshold` is a score from 0 to 1, got {threshold:g}.")
    return threshold


def empty_detections() -> supervision.Detections:
    """Return no detections, as of an image that could not be read."""
    return _supervision().Detections.empty()


def load_frame(frame: Frame) -> tuple[np.ndarray | None, str]:
    """Decode an image; return it, or None and the reason why it cannot be read."""
    try:
        return frame.load(), ""
    except DataError as error:
        return None, str(error)
    except Exception as error:  # decoders raise anything, and one file must not end a whole folder
        return None, f"'{frame.name}': {type(error).__name__}: {error}"


def _supervision() -> ModuleType:
    with requires_extra("Detection", "supervision", "detect"):
        import supervision
    return supervision
