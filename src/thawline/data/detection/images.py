"""Image files: a quick look at their headers, and decoding to RGB.

`probe_image` reads a few kilobytes of a JPEG or PNG and returns the size, the EXIF orientation and whether
the file is complete, so that a dataset of 100 000 images is checked in seconds. Truncated files are the most
common damage, and OpenCV silently fills what is missing with grey; if the end marker is not in place, Pillow
decodes the file to find out. Files of all other formats, and those with 16 bits, are decoded as in training.

A camera may store an image on its side and say so in an EXIF tag. Annotation tools differ in whether they
apply it, so the size stated in the annotation decides (`ImageRecord.oriented`). The tag is applied here, not
by OpenCV, whose versions differ in the formats for which they do.
"""

from __future__ import annotations

__all__ = [
    "IMAGE_SUFFIXES", "ImageProbe", "decode_image", "has_frames", "is_image", "opencv", "probe_image",
    "read_image", "stored_size",
]  # fmt: skip

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, BinaryIO, TypeVar

import numpy as np

from thawline.errors import DataError, requires_extra

T = TypeVar("T")

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".jp2"
)  # fmt: skip

ORIENTATION = 0x0112
"""The EXIF tag: 1 upright; 2–4 mirrored or upside down; 5–8 on its side."""

ENDINGS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}
"""First bytes of a JPEG and a PNG → their end marker."""

TAIL = 1 << 16
"""Bytes at a file's end in which its end marker must lie: cameras append thumbnails and notes."""

PNG_DEPTH = 24
"""Place of the bit depth in a PNG."""


MAX_PIXELS = int(os.environ.get("OPENCV_IO_MAX_IMAGE_PIXELS") or 1 << 30)
"""Pixels of the largest image that OpenCV decodes."""

LOW_RANGE = 4095
"""Values of 16-bit images that reach no further have 12 bits or less."""

_PILLOW_LIMIT = Lock()


@dataclass(frozen=True, kw_only=True)
class ImageProbe:
    """Facts about an image file."""

    width: int = 0
    """Pixels as stored, before any EXIF orientation."""
    height: int = 0
    orientation: int = 1
    """EXIF orientation, 1–8."""
    is_low_range: bool = False
    """True if 16-bit values use at most 12 bits."""
    has_frames: bool = False
    """True if the file holds several images, as an animation does; only the first is used."""
    fault: str = ""
    """Reason why the file cannot be used; empty if it can."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) after the EXIF orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def is_image(path: Path) -> bool:
    """Return True for the name of an image file, except hidden files."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def probe_image(path: Path, decode: bool = False) -> ImageProbe:
    """Look at an image file; with `decode`, decode all of it, as training does.

    Never raises for a bad file: `fault` says what is wrong with it.
    Raises: MissingExtraError: without Pillow or OpenCV.
    """
    _pillow(), opencv()
    try:
        with path.open("rb") as stream:
            if not decode and _is_header_enough(stream):
                return _probe_header(stream)
            stream.seek(0)
            return _probe_pixels(stream.read())
    # Pillow raises what its decoders raise: OSError, SyntaxError, ValueError, struct.error, …
    except Exception as error:
        return ImageProbe(fault=_reason(error))


def read_image(path: Path, oriented: bool = True) -> np.ndarray:
    """Decode an image file to RGB, (H, W, 3) uint8.

    Grey, palette, RGBA (alpha dropped), CMYK and 16-bit files (upper byte) are all converted to RGB.

    Args:
        path: the file.
        oriented: apply the EXIF orientation.
    Raises: DataError: if the file is missing, truncated, or no image. MissingExtraError: without OpenCV.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read image '{path}': {error.strerror}.") from error
    try:
        return decode_image(data, oriented)
    except DataError as error:
        raise DataError(f"'{path}': {error}") from error


def decode_image(data: bytes, oriented: bool = True) -> np.ndarray:
    """Decode the bytes of an image file, as `read_image`. Raises: DataError: if truncated, or no image."""
    cv2, end = opencv(), _end_marker(data)
    try:
        if end is not None and end not in data[-TAIL:]:
            _open(io.BytesIO(data)).load()  # unlike OpenCV, Pillow refuses a truncated file
        image = cv2.cvtColor(_decode(data), cv2.COLOR_BGR2RGB)
    except Exception as error:
        raise DataError(
            f"cannot be decoded ({_reason(error)}). Replace the file, or remove it from the data."
        ) from error
    return _turn(image, _from_header(io.BytesIO(data), _exif_orientation, 1)) if oriented else image


def has_frames(path: Path) -> bool:
    """Return True if an image file holds several images, as an animation does; only the first is used."""
    with path.open("rb") as stream:
        return _from_header(stream, _has_frames, False)


def stored_size(data: bytes, formats: Sequence[str]) -> tuple[int, int]:
    """Return (width, height) of the bytes of an image file, from its header; nothing is decoded.

    Args:
        formats: those that are accepted, as Pillow names them.
    Raises: DataError: the bytes are of none of them.
    """
    try:
        size: tuple[int, int] = _read_header(io.BytesIO(data), formats).size
    except _pillow().UnidentifiedImageError as error:
        raise DataError("the bytes are of none of these formats") from error
    except Exception as error:  # Pillow raises what its plugins raise
        raise DataError(_reason(error)) from error
    return size


def opencv() -> ModuleType:
    """Return the module `cv2`. Raises: MissingExtraError: if it is not installed."""
    with requires_extra("Working with images", "opencv-python-headless", "detect"):
        import cv2
    return cv2


def _pillow() -> Any:
    with requires_extra("Checking images", "pillow", "detect"):
        import PIL.Image
    return PIL.Image


def _is_header_enough(stream: BinaryIO) -> bool:
    """Return True for a JPEG, or a PNG of 8 bits, that ends with its end marker."""
    head = stream.read(PNG_DEPTH + 1)
    end = _end_marker(head)
    if end is None or (head.startswith(b"\x89PNG") and head[PNG_DEPTH:] == b"\x10"):
        return False
    stream.seek(max(0, stream.seek(0, io.SEEK_END) - TAIL))
    return end in stream.read()


def _probe_header(stream: BinaryIO) -> ImageProbe:
    with _open(stream) as image:
        width, height = image.size
        turn = _exif_orientation(image)
        return ImageProbe(width=width, height=height, orientation=turn, has_frames=_has_frames(image))


def _probe_pixels(data: bytes) -> ImageProbe:
    """Decode an image as training does, and find damage inside a JPEG or PNG, which OpenCV passes over."""
    if _end_marker(data) is not None:
        _open(io.BytesIO(data)).load()
    pixels = _decode(data)
    height, width = pixels.shape[:2]
    is_low_range = False
    if pixels.max() <= (LOW_RANGE + 1) >> 8:
        deep = _decode(data, opencv().IMREAD_ANYDEPTH)
        is_low_range = deep.dtype == np.uint16 and 0 < deep.max() <= LOW_RANGE
    orientation, has_frames = _from_header(
        io.BytesIO(data), lambda image: (_exif_orientation(image), _has_frames(image)), (1, False)
    )
    return ImageProbe(
        width=width,
        height=height,
        orientation=orientation,
        is_low_range=bool(is_low_range),
        has_frames=has_frames,
    )


def _decode(data: bytes, more_flags: int = 0) -> np.ndarray:
    """Decode to BGR as stored, (H, W, 3). Raises: an error of OpenCV's, or DataError."""
    cv2 = opencv()
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION | more_flags
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if image is None:
        raise DataError(_unsupported(data))
    return image


def _unsupported(data: bytes) -> str:
    """Say why OpenCV returns nothing."""
    try:
        image = _open(io.BytesIO(data))
        image.load()
    except Exception as error:
        return _reason(error)
    return f"OpenCV does not support {image.format} of mode {image.mode}; convert it to PNG or JPEG"


def _open(stream: BinaryIO) -> Any:
    """Open an image with Pillow, up to the size that OpenCV decodes."""
    image = _read_header(stream)
    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"{image.width}×{image.height} pixels are more than OpenCV decodes, {MAX_PIXELS:,}; cut the image"
        )
    return image


def _read_header(stream: BinaryIO, formats: Sequence[str] | None = None) -> Any:
    """Open an image with Pillow, of any size."""
    module = _pillow()
    stream.seek(0)
    with _PILLOW_LIMIT:
        limit, module.MAX_IMAGE_PIXELS = module.MAX_IMAGE_PIXELS, None
        try:
            return module.open(stream, formats=formats)
        finally:
            module.MAX_IMAGE_PIXELS = limit


def _from_header(stream: BinaryIO, read: Callable[[Any], T], otherwise: T) -> T:
    """Return what `read` finds in an image that Pillow has opened; `otherwise`, if Pillow cannot open it."""
    try:
        return read(_open(stream))
    except Exception:  # OpenCV reads formats that Pillow does not
        return otherwise


def _has_frames(image: Any) -> bool:
    """Return True for an animation, or several pages; a camera's MPO holds one image in two sizes."""
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def _exif_orientation(image: Any) -> int:
    """Return the EXIF orientation in an image's header; 1 for TIFF, which OpenCV turns upright by itself."""
    exif = _pillow().Exif()
    try:
        exif.load(image.info.get("exif", b"") if image.format != "TIFF" else b"")
        value = exif.get(ORIENTATION, 1)
    except Exception:  # broken EXIF data does not make an image unreadable
        return 1
    return value if value in range(1, 9) else 1


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image upright, (H, W, 3) or (W, H, 3)."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(image[::rows, ::columns])


def _end_marker(head: bytes) -> bytes | None:
    return next((end for start, end in ENDINGS.items() if head.startswith(start)), None)


def _reason(error: Exception) -> str:
    text = re.sub(r" <_io\.BytesIO.*?>", "", " ".join(str(error).split()))
    return text if isinstance(error, DataError) else f"{type(error).__name__}: {text}"
