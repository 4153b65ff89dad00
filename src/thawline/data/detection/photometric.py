"""Colour augmentation: brightness, contrast, saturation, hue, and the order of the channels.

Each change has the same probability; contrast comes before or after saturation and hue. Linear changes are
multiplied into one matrix and applied in one pass, so values are clipped to 0–255 once per pass instead of
after every step.

Source: SSD's distortion (Liu et al., ECCV 2016) with torchvision's constants, which the published runs
used; the channel permutation is part of it.
"""

from __future__ import annotations

__all__ = ["Colour"]

from dataclasses import dataclass

import numpy as np

from thawline.data.detection.images import opencv

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)
_GREY = np.array([0.299, 0.587, 0.114])
# About this many pixels of an image are enough to know its mean grey to a third of a level.
_PROBE_PIXELS = 4000


@dataclass(frozen=True, kw_only=True)
class Colour:
    """Drawn colour change. A factor of `None` leaves the pixels alone."""

    brightness: float | None = None
    """Factor on all values."""
    contrast: float | None = None
    """Factor on the distance to the image's mean grey."""
    saturation: float | None = None
    """Factor on the distance to the pixel's own grey."""
    hue: float | None = None
    """Shift around the hue circle, whose length is 1."""
    contrast_first: bool = True
    """Contrast before saturation and hue, or after."""
    channels: tuple[int, int, int] = (0, 1, 2)
    """Channel i of the result is this channel of the image."""

    @classmethod
    def draw(cls, rng: np.random.Generator, prob: float) -> Colour:
        """Draw each change with probability `prob`."""
        *changes, permutes = rng.random(5) < prob
        values = [float(rng.uniform(*bounds)) for bounds in (_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE)]
        drawn = (value if change else None for value, change in zip(values, changes, strict=True))
        brightness, contrast, saturation, hue = drawn
        first = bool(rng.random() < 0.5)
        red, green, blue = rng.permutation(3).tolist()
        return cls(
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            contrast_first=first,
            channels=(red, green, blue) if permutes else (0, 1, 2),
        )

    def apply(self, pixels: np.ndarray, whole: np.ndarray | None = None) -> np.ndarray:
        """Return the changed pixels.

        Args:
            pixels: (H, W, 3) uint8, RGB; not written to.
            whole: image that `pixels` is part of; contrast is relative to its mean grey. `None`: `pixels`.
        """
        if self == _UNCHANGED:
            return pixels
        # The probe goes through the same changes as the pixels: contrast needs its mean at that point.
        both = [pixels, _probe(pixels if whole is None else whole)]
        linear = _Linear()
        if self.brightness is not None:
            linear.scale(self.brightness)
        if self.contrast is not None and self.contrast_first:
            linear.contrast(self.contrast, both[1])
        if self.saturation is not None:
            linear.saturate(self.saturation)
        if self.hue is not None:
            both = [_turn_hue(linear.apply(image), self.hue) for image in both]
            linear = _Linear()
        if self.contrast is not None and not self.contrast_first:
            linear.contrast(self.contrast, both[1])
        linear.permute(self.channels)
        return linear.apply(both[0])


_UNCHANGED = Colour()


class _Linear:
    """Linear map of RGB values, built up step by step."""

    def __init__(self) -> None:
        self.matrix = np.eye(3)
        self.offset = np.zeros(3)

    def scale(self, factor: float) -> None:
        self.matrix, self.offset = self.matrix * factor, self.offset * factor

    def contrast(self, factor: float, probe: np.ndarray) -> None:
        mean = _GREY @ (self.matrix @ probe.reshape(-1, 3).mean(0) + self.offset)
        self.scale(factor)
        self.offset = self.offset + (1 - factor) * mean

    def saturate(self, factor: float) -> None:
        mix = factor * np.eye(3) + (1 - factor) * np.outer(np.ones(3), _GREY)
        self.matrix, self.offset = mix @ self.matrix, mix @ self.offset

    def permute(self, channels: tuple[int, int, int]) -> None:
        self.matrix, self.offset = self.matrix[list(channels)], self.offset[list(channels)]

    def apply(self, image: np.ndarray) -> np.ndarray:
        if not self.offset.any() and np.array_equal(self.matrix, np.eye(3)):
            return image
        whole = np.concatenate([self.matrix, self.offset[:, None]], axis=1)
        return opencv().transform(image, whole.astype(np.float32))


def _turn_hue(image: np.ndarray, shift: float) -> np.ndarray:
    cv2 = opencv()
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(shift * 256) % 256)  # a circle of 256: it wraps
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _probe(image: np.ndarray) -> np.ndarray:
    step = max(1, int((image.shape[0] * image.shape[1] / _PROBE_PIXELS) ** 0.5))
    return np.ascontiguousarray(image[::step, ::step])
