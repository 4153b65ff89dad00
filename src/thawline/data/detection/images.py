"""Image files: a quick look at a header, and decoding to RGB bytes.

`probe_image` reads a few kilobytes and answers size, camera orientation and whether the file ends as it
should, so that a data set of 100 000 images is looked through in seconds. Cut files are the common damage,
and OpenCV fills what is missing with grey, without a word; where the end is not in place, Pillow decodes
the file to settle the matter.

Which way up? A camera may store a picture lying on its side and say so in an EXIF tag. Annotation tools
differ in whether they obey it, so the size that the annotation states decides (`ImageRecord.oriented`).
"""

from __future__ import annotations

__all__ = ["IMAGE_SUFFIXES", "ImageProbe", "decode_image", "is_image", "opencv", "probe_image", "read_image"]

import io
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from thawline.errors import DataError, MissingExtraError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

ORIENTATION = 0x0112
"""The EXIF tag: 1 upright; 2–4 mirrored or upside down; 5–8 on its side."""

ENDINGS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}
"""First bytes of a JPEG and a PNG → the bytes that end them."""

TAIL = 1 << 16
"""Bytes at a file's end in which its ending must lie: cameras append thumbnails and notes."""


@dataclass(frozen=True, kw_only=True)
class ImageProbe:
    """What an image file says of itself."""

    width: int = 0
    """Pixels as stored, before any orientation tag."""
    height: int = 0
    orientation: int = 1
    """EXIF orientation, 1–8."""
    fault: str = ""
    """Why the file cannot be used; empty where it can."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) once the orientation tag is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def is_image(path: Path) -> bool:
    """Whether the name is that of an image file. Names that begin with a dot are other programs' notes."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def probe_image(path: Path, decode: bool = False) -> ImageProbe:
    """Look at an image file without decoding it, or, with `decode`, with decoding all of it.

    Never raises for a bad file: `fault` says what is wrong with it.
    Raises: MissingExtraError: without Pillow.
    """
    pillow = _pillow()
    try:
        # Read as a stream: Pillow holds a lazily opened file until the image is gone.
        with path.open("rb") as stream, pillow.open(stream) as image:
            width, height = image.size
            # getexif() on a PNG or TIFF may read the whole file; only JPEGs and WebPs come from cameras.
            orientation = image.getexif().get(ORIENTATION, 1) if image.format in ("JPEG", "WEBP") else 1
            if decode or not _stream_ends_well(stream):
                stream.seek(0)
                image.load()
    except Exception as error:  # as in `_decoding_fault`
        return ImageProbe(fault=f"{type(error).__name__}: {error}")
    orientation = orientation if orientation in range(1, 9) else 1
    return ImageProbe(width=width, height=height, orientation=orientation)


def read_image(path: Path, oriented: bool = True) -> np.ndarray:
    """Decode an image file to RGB, (H, W, 3) uint8.

    Grey, palette, RGBA (alpha dropped), CMYK and 16-bit files (upper byte) all come as RGB.

    Args:
        path: the file.
        oriented: apply the camera's orientation tag.
    Raises: DataError: if the file is missing, cut off, or no image. MissingExtraError: without OpenCV.
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
    """`read_image` for a file that is in memory already. Raises: DataError: if it is cut off, or no image."""
    cv2 = opencv()
    fault = "" if _ends_well(data[:8], data[-TAIL:]) else _decoding_fault(io.BytesIO(data))
    flags = cv2.IMREAD_COLOR if oriented else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = None if fault else cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        fault = fault or "OpenCV does not know the format"
        raise DataError(f"cannot be decoded ({fault}). Replace the file, or take it out of the data.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _ends_well(head: bytes, tail: bytes) -> bool:
    """Whether a file surely is whole; False where only decoding can tell."""
    return any(head.startswith(start) and end in tail for start, end in ENDINGS.items())


def _stream_ends_well(stream: BinaryIO) -> bool:
    stream.seek(0)
    head = stream.read(8)
    stream.seek(max(0, stream.seek(0, io.SEEK_END) - TAIL))
    return _ends_well(head, stream.read())


def _decoding_fault(stream: BinaryIO) -> str:
    """Why a file cannot be decoded to its end, or nothing: unlike OpenCV, Pillow refuses a cut one."""
    try:
        with _pillow().open(stream) as image:
            image.load()
    # Pillow raises what its decoders raise: OSError, SyntaxError, ValueError, struct.error,
    # DecompressionBombError, …
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def opencv() -> ModuleType:
    """The module `cv2`. Raises: MissingExtraError: without it."""
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError("Working with images", "opencv-python-headless", "detect") from error
    return cv2


def _pillow() -> ModuleType:
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingExtraError("Checking images", "pillow", "detect") from error
    return PIL.Image
