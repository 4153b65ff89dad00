"""Colours: held to Pillow's own operations one after the other, and to the published chances."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from thawline.data.detection.photometric import Colour


def gentle(shape: tuple[int, int] = (40, 56)) -> np.ndarray:
    """Values that no change carries beyond 0–255, so that the order of cutting cannot matter."""
    return np.random.default_rng(0).integers(90, 160, (*shape, 3), dtype=np.uint8)


def by_pillow(image: np.ndarray, colour: Colour) -> np.ndarray:
    picture = Image.fromarray(image)
    if colour.brightness is not None:
        picture = ImageEnhance.Brightness(picture).enhance(colour.brightness)
    if colour.contrast is not None and colour.contrast_first:
        picture = ImageEnhance.Contrast(picture).enhance(colour.contrast)
    if colour.saturation is not None:
        picture = ImageEnhance.Color(picture).enhance(colour.saturation)
    if colour.hue is not None:
        hsv = np.array(picture.convert("HSV"))
        hsv[..., 0] += np.uint8(int(colour.hue * 255) % 256)
        picture = Image.fromarray(hsv, "HSV").convert("RGB")
    if colour.contrast is not None and not colour.contrast_first:
        picture = ImageEnhance.Contrast(picture).enhance(colour.contrast)
    return np.asarray(picture)[..., list(colour.channels)]


@pytest.mark.parametrize(
    ("colour", "within"),
    [
        (Colour(brightness=1.1), 1),
        (Colour(contrast=0.6), 1),
        (Colour(contrast=1.4, contrast_first=False), 1),
        (Colour(saturation=0.5), 1),
        (Colour(saturation=1.3), 1),
        (Colour(channels=(2, 0, 1)), 0),
        (Colour(brightness=0.9, contrast=1.2, saturation=0.7, channels=(1, 2, 0)), 3),
        # Both work on hues of 8 bits, OpenCV and Pillow rounding differently.
        (Colour(hue=0.04), 6),
        (Colour(hue=-0.05), 6),
        (Colour(brightness=0.9, contrast=1.1, saturation=1.2, hue=0.03, contrast_first=False), 8),
    ],
)
def test_changes_equal_pillows_one_after_the_other(colour: Colour, within: int) -> None:
    image = gentle()
    difference = np.abs(colour.apply(image).astype(int) - by_pillow(image, colour))
    assert difference.max() <= within
    assert np.array_equal(image, gentle())


def test_contrast_turns_about_the_grey_of_the_whole_image() -> None:
    whole = np.full((60, 60, 3), 50, np.uint8)
    whole[:30] = 150
    part = Colour(contrast=0.5).apply(whole[:30], whole)
    assert np.abs(part.astype(int) - 125).max() <= 1


def test_no_change_is_no_work() -> None:
    image = gentle()
    assert Colour().apply(image) is image


def test_changes_come_with_their_chance_and_range() -> None:
    rng = np.random.default_rng(0)
    drawn = [Colour.draw(rng, 0.5) for _ in range(3000)]
    for name, low, high in (
        ("brightness", 0.875, 1.125), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("hue", -0.05, 0.05),
    ):  # fmt: skip
        values = np.array([v for v in (getattr(colour, name) for colour in drawn) if v is not None])
        assert len(values) / 3000 == pytest.approx(0.5, abs=0.04)
        assert values.min() >= low
        assert values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=(high - low) * 0.04)
    assert np.mean([colour.contrast_first for colour in drawn]) == pytest.approx(0.5, abs=0.04)
    # One permutation of six is the identity.
    assert np.mean([colour.channels != (0, 1, 2) for colour in drawn]) == pytest.approx(5 / 12, abs=0.04)
    assert all(Colour.draw(rng, 0.0).apply(gentle()) is not None for _ in range(3))
    assert Colour.draw(rng, 0.0).brightness is None
