"""Convert any image to RGB bytes.

Files are read by `data/detection/images.py`, which applies their orientation and detects truncated ones. An
image in memory may be Pillow's, NumPy's or torch's; grey, with alpha (dropped), CMYK, 16 bits (upper byte),
or floats in 0–1.
"""

from __future__ import annotations

__all__ = ["is_tensor", "to_rgb"]

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from thawline.data.detection.images import has_frames, read_image
from thawline.errors import DataError

logger = logging.getLogger(__name__)


def to_rgb(source: Any) -> np.ndarray:
    """Return one image as (H, W, 3) uint8, RGB.

    Args:
        source: path; Pillow image (its EXIF orientation is applied); array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4), RGB; tensor (3, H, W) or (1, H, W). Arrays and tensors hold bytes, 16-bit values, or
            floats in 0–1.
    Raises: DataError: unreadable, of another shape, empty, or floats beyond 0–1.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        image = read_image(path)
        if has_frames(path):
            logger.warning("'%s' holds several images (frames or pages); the first is used.", path)
        return image
    if is_tensor(source):
        if source.dim() != 3 or source.shape[0] not in (1, 3):
            raise DataError(f"Expected a tensor (3, H, W) or (1, H, W), got {tuple(source.shape)}.")
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source
        return _to_bytes(source.permute(1, 2, 0).numpy())
    if isinstance(source, np.ndarray):
        return _to_bytes(source)
    if hasattr(source, "getexif"):
        return _to_bytes(_from_pillow(source))
    raise DataError(f"Expected a path, a Pillow image, an array or a tensor, got {type(source).__name__}.")


def is_tensor(source: Any) -> bool:
    """Return True for a tensor of torch, which need not be installed."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _from_pillow(image: Any) -> np.ndarray:
    from PIL import ImageOps

    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.uint16)
        if image.mode == "F":
            return np.asarray(image)
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # a file that Pillow had opened without reading it
        raise DataError(f"The image cannot be decoded ({type(error).__name__}: {error}).") from error


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or not pixels.size:
        raise DataError(f"Expected an array (H, W), (H, W, 3) or (H, W, 4), got {pixels.shape}.")
    pixels = pixels[..., :3]
    if pixels.dtype == np.uint16:
        pixels = pixels >> 8
    elif pixels.dtype == bool:
        pixels = pixels * 255
    elif np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise DataError(
                f"Pixels as floats are in 0–1, these run from {pixels.min():g} to {pixels.max():g}. "
                "Divide by 255, or pass bytes (uint8)."
            )
        pixels = (pixels * 255).round()
    elif pixels.dtype != np.uint8:
        raise DataError(f"Pixels are uint8, uint16, bool or floats, not {pixels.dtype}.")
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8))
