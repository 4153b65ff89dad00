"""Limits of a service, and the errors of a request that goes beyond them."""

from __future__ import annotations

__all__ = ["FORMATS", "Limits"]

from dataclasses import dataclass

from thawline.recipe.checks import at_least, require

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Kinds of images that are accepted, as Pillow names them."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request, and of requests at once."""

    max_bytes: int = 20_000_000
    """Bytes of a request's body."""
    max_pixels: int = 50_000_000
    """Pixels of an image, as its header states them."""
    max_requests: int = 32
    """Requests that are worked on or wait at once; more are refused with 503."""
    timeout: float = 30.0
    """Seconds for a body to arrive, and then for the answer."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_requests"):
            at_least(name, getattr(self, name), 1)
        require(self.timeout > 0, f"`timeout={self.timeout}`: expected seconds, more than 0.")
