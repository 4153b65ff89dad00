"""Videos, cameras and network streams, read by OpenCV.

A live source is read by a thread of its own and gives its newest image, so that a slow detector is not
further behind with every image. A stream that is lost is opened again.
"""

from __future__ import annotations

__all__ = ["download_image", "is_url", "is_video", "open_video", "without_password"]

import logging
import queue
import re
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from thawline.data.detection.images import IMAGE_SUFFIXES, decode_image, opencv
from thawline.errors import DataError
from thawline.inference.frames import Frame, Source

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
TIMEOUT = 10
"""Seconds that a network stream may take to open, and between two images."""
PAUSES = (1, 2, 4, 8, 16)
"""Seconds before each attempt to reopen a stream; after the last one it has ended."""

_URL = re.compile(r"(https?|rtsps?|rtmps?|rtp|udp|tcp|srt|mmsh?)://", re.IGNORECASE)
_DEVICE = re.compile(r"/dev/video\d+")


def is_video(source: Any) -> bool:
    """Return True for a video, a camera or a network stream."""
    if isinstance(source, str | Path):
        suffix = _suffix(source)
        return suffix in VIDEO_SUFFIXES or _camera(source) is not None or (is_url(source) and not suffix)
    return isinstance(source, int) and not isinstance(source, bool)


def open_video(source: str | Path | int) -> Source:
    """Open a video file, a camera or a network stream. Raises: DataError: it cannot be opened."""
    cv2, name = opencv(), without_password(source)
    camera = _camera(source)
    is_stream = camera is None and is_url(source)
    file = None if camera is not None or is_stream else Path(str(source))
    if file is not None and not file.is_file():
        raise DataError(f"No video '{source}'. Videos are predicted one at a time, without patterns.")
    address = str(source) if camera is None else camera

    def connect() -> Any:
        if not is_stream:
            return cv2.VideoCapture(address)
        limits = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, cv2.CAP_PROP_READ_TIMEOUT_MSEC)
        return cv2.VideoCapture(address, cv2.CAP_FFMPEG, [n for key in limits for n in (key, 1000 * TIMEOUT)])

    capture = connect()
    if not capture.isOpened():
        kind, hint = "Video", "Is the file complete?"
        if camera is not None:
            kind, hint = "Camera", "Is it connected, and not used by another program?"
        elif is_stream:
            kind, hint = (
                "Stream",
                "Check address, user and password, and that this machine reaches the server.",
            )
        raise DataError(f"{kind} '{name}' cannot be opened. {hint}")
    count, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    # A file behind an address ends; a stream without a length goes on, and may be lost on the way.
    is_endless = is_stream and count <= 0 and not _suffix(str(source))
    is_live = camera is not None or is_endless

    def frames() -> Iterator[Frame]:
        index = attempts = 0
        opened = capture
        while True:
            images = _images(opened)
            with closing(_newest(images) if is_live else images) as shown:
                for image in shown:
                    yield _decoded(image, f"frame {index}")
                    index, attempts = index + 1, 0
            if not is_endless:
                return
            if attempts == len(PAUSES):
                break
            pause, attempts = PAUSES[attempts], attempts + 1
            logger.warning("'%s' stopped at image %d. Reopening it in %g s.", name, index, pause)
            time.sleep(pause)
            opened = connect()
        yield Frame(name, lambda: _raise_ended(name, index))

    return Source(
        frames(),
        count if count > 0 and camera is None else None,
        name=file.name if file else "stream" if is_stream else "camera",
        path=file,
        is_live=is_live,
        rate=rate if 0 < rate < 1000 else 25.0,
    )


def _images(capture: Any) -> Generator[np.ndarray]:
    """Yield the images of an opened capture, RGB, and release it."""
    try:
        while (found := capture.read())[0]:
            yield opencv().cvtColor(found[1], opencv().COLOR_BGR2RGB)
    finally:
        capture.release()


def _newest(images: Generator[np.ndarray]) -> Generator[np.ndarray]:
    """Yield the newest of the images that a thread reads meanwhile, each once, and always the last one."""
    waiting: queue.Queue[np.ndarray | None] = queue.Queue()
    is_closed = threading.Event()

    def read() -> None:
        try:
            with closing(images):
                for image in images:
                    if is_closed.is_set():
                        return
                    with suppress(queue.Empty):
                        waiting.get_nowait()
                    waiting.put(image)
        finally:
            waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (image := waiting.get()) is not None:
            yield image
    finally:
        is_closed.set()


def _decoded(image: np.ndarray, name: str) -> Frame:
    return Frame(name, lambda: image)


def _raise_ended(name: str, n_images: int) -> np.ndarray:
    raise DataError(f"'{name}' ended after {n_images} images: {len(PAUSES)} attempts to reopen it failed.")


def download_image(address: str) -> np.ndarray:
    """Return the image at an address, RGB. Raises: DataError: it cannot be downloaded, or is none."""
    name, parts = without_password(address), urlsplit(address)
    try:
        request = urllib.request.Request(name)
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            request.add_header("Authorization", f"Basic {b64encode(login.encode()).decode()}")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            kind = response.headers.get_content_type()
            if kind.startswith(("multipart/", "text/")):
                raise DataError(f"'{name}' is {kind}, not an image.")
            return decode_image(response.read())
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(f"'{name}' cannot be downloaded: {error}.") from error


def is_url(source: Any) -> bool:
    """Return True for a network address."""
    return isinstance(source, str) and _URL.match(source) is not None


def _suffix(source: str | Path) -> str:
    """Return the lower-case suffix; of an address only one that names an image or a video."""
    if not is_url(source):
        return Path(source).suffix.lower()
    suffix = Path(str(source).partition("?")[0]).suffix.lower()
    is_file = str(source).lower().startswith("http") and suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    return suffix if is_file else ""


def _camera(source: Any) -> int | str | None:
    """Return a camera as OpenCV names it, from a number, digits or `/dev/videoN`; None for other sources."""
    if isinstance(source, int):
        return source
    if str(source).isdecimal() and not Path(source).exists():
        return int(source)
    return str(source) if _DEVICE.fullmatch(str(source)) else None


def without_password(source: Any) -> str:
    """Return a source as messages name it."""
    return re.sub(r"(?<=://)[^/]+@", "", str(source))
