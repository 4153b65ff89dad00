"""Detectors that torch runs: a `DEIMv2`, loaded, fused, normalised and post-processed.

Images are resized to the training size without keeping their aspect ratio, as in training, by an antialiased
bilinear filter, and rounded to bytes, as Pillow does: of its bytes few differ, by 1.
"""

from __future__ import annotations

__all__ = ["TorchNetwork", "load_model"]

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thawline.errors import CheckpointError
from thawline.inference.exported import check_number_of_classes
from thawline.inference.frames import Found
from thawline.models.deimv2 import VARIANTS, DEIMv2
from thawline.models.deimv2.checkpoints.read import read_checkpoint
from thawline.models.deimv2.outputs import DetectionOutput


class TorchNetwork:
    """Network in torch.

    Args:
        model: a detector; it is put into eval mode and fused.
        device: None: a GPU if there is one.
    """

    def __init__(self, model: DEIMv2, device: str | torch.device | None = None) -> None:
        self.config = model.config
        self.class_names = self.config.shown_names
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        fuse = getattr(model.eval(), "fuse", lambda: model)
        self.model = fuse().to(self.device).eval()
        self._mean = torch.tensor(self.config.image_mean, device=self.device)[:, None, None]
        self._std = torch.tensor(self.config.image_std, device=self.device)[:, None, None]

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Found]:
        """Detect in images, each (H, W, 3) uint8, RGB."""
        return self.answer(self.model(self.prepare(images)), images)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return images as the model takes them, (B, 3, H, W)."""
        pixels = torch.stack([_resize(image, self.config.image_size) for image in images]).to(self.device)
        return (pixels / 255 - self._mean) / self._std

    def answer(self, output: DetectionOutput, images: Sequence[np.ndarray]) -> list[Found]:
        """Return the model's output as detections in pixels of the images."""
        found = self.model.postprocess(output, [image.shape[:2] for image in images])
        return [cast(Found, {key: value.cpu().numpy() for key, value in one.items()}) for one in found]


def load_model(
    path: str | Path,
    variant: str | None,
    weights: Literal["pretrained", "random"],
    class_names: Sequence[str] | None,
) -> DEIMv2:
    """Load a trained detector; the arguments are those of `Detector.from_pretrained`."""
    if weights == "random":
        names = {} if class_names is None else {"class_names": tuple(class_names)}
        return DEIMv2.from_variant(variant or str(path), **names)
    _check_trained(path, class_names)
    model = DEIMv2.from_pretrained(path, variant)
    if class_names is not None:
        model.config = replace(model.config, class_names=tuple(class_names))
    return model


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
    if class_names is not None:
        check_number_of_classes(path, len(checkpoint.score_head), class_names)


def _resize(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize (H, W, 3) to (3, *size), both uint8."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)[0]
