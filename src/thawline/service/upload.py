"""The image of a request: its body, raw or as a form's file, checked before anything is decoded."""

from __future__ import annotations

__all__ = ["Upload", "read_upload"]

import asyncio
import re
from dataclasses import dataclass

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from thawline.data.detection.images import stored_size
from thawline.errors import DataError
from thawline.service.limits import FORMATS, Limits

_BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;]+))', re.IGNORECASE)


@dataclass(frozen=True)
class Upload:
    """An image to detect in, encoded, and what to answer."""

    data: bytes
    draw: bool = False
    """Answer with a labelled PNG."""
    threshold: float | None = None
    """Lowest score. None: the service's."""
    domain: str | None = None
    """Domain of a shared detector."""


async def read_upload(request: Request) -> Upload:
    """Read a request.

    Raises: HTTPException: 400, 408, 413 or 415, with the reason, for what is no image within the limits.
    """
    limits: Limits = request.app.state.limits
    draw, threshold, domain = _options(request)
    body = await _body(request, limits)
    kind = request.headers.get("content-type", "")
    data = _file(body, kind) if kind.lower().startswith("multipart/") else body
    await asyncio.to_thread(_check, data, limits)
    return Upload(data, draw, threshold, domain)


def _options(request: Request) -> tuple[bool, float | None, str | None]:
    given = dict(request.query_params)
    draw, threshold = given.pop("draw", "0"), given.pop("threshold", None)
    domain = given.pop("domain", None)
    if given:
        raise HTTPException(400, f"Unknown parameter '{next(iter(given))}'. Known: draw, threshold, domain.")
    if draw not in ("0", "1"):
        raise HTTPException(400, f"draw={draw}: expected 0 or 1.")
    try:
        score = None if threshold is None else float(threshold)
    except ValueError:
        score = -1.0
    if score is not None and not 0 <= score <= 1:
        raise HTTPException(400, f"threshold={threshold}: expected a number in 0-1.")
    return draw == "1", score, domain


async def _body(request: Request, limits: Limits) -> bytes:
    too_large = HTTPException(413, f"The body is larger than {limits.max_bytes:,} bytes.")
    if int(request.headers.get("content-length") or 0) > limits.max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_bytes:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive within {limits.timeout:g} seconds.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The client disconnected.") from None
    return bytes(body)


def _file(body: bytes, content_type: str) -> bytes:
    """Return the first file of a form. Starlette's own parser would write a large one to disk."""
    found = _BOUNDARY.search(content_type)
    boundary = b"\r\n--" + (found[1] or found[2]).encode("latin-1") if found else b""
    for part in (b"\r\n" + body).split(boundary)[1:] if found else ():
        headers, separator, content = part.partition(b"\r\n\r\n")
        if separator and b"filename" in headers.lower():
            return content
    raise HTTPException(400, "The form holds no file. Send one: curl -F file=@photo.jpg")


def _check(data: bytes, limits: Limits) -> None:
    if not data:
        raise HTTPException(400, "The body is empty. Send an image: curl --data-binary @photo.jpg")
    try:
        width, height = stored_size(data, FORMATS)
    except DataError as error:
        raise HTTPException(415, f"Expected an image ({', '.join(FORMATS)}): {error}.") from None
    if width * height > limits.max_pixels:
        raise HTTPException(413, f"{width}×{height} pixels are more than {limits.max_pixels:,}.")
