"""Views, resizing and affine maps, held to slow loops, Pillow, and the published distributions."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from PIL import Image

from thawline.data.detection.geometry import View, affine_boxes, random_affine, resize, shrink


def slow_crop(
    rng: np.random.Generator, width: int, height: int, boxes: np.ndarray
) -> tuple[int, int, int, int] | None:
    """SSD's crop, try by try."""
    while True:
        wanted = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)[rng.integers(7)]
        if wanted >= 1:
            return None
        for _ in range(40):
            w, h = (int(side * (0.3 + 0.7 * rng.random())) for side in (width, height))
            if not 0.5 <= w / h <= 2:
                continue
            x, y = int((width - w) * rng.random()), int((height - h) * rng.random())
            best = -1.0
            for x0, y0, x1, y1 in boxes:
                cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
                if x < cx < x + w and y < cy < y + h:
                    shared = max(0, min(x1, x + w) - max(x0, x)) * max(0, min(y1, y + h) - max(y0, y))
                    best = max(best, shared / ((x1 - x0) * (y1 - y0) + w * h - shared))
            if best >= wanted:
                return x, y, w, h


def test_crops_are_distributed_as_the_slow_loop() -> None:
    boxes = np.array([[10.0, 20, 60, 90], [100, 5, 190, 70]])
    whole = View(left=0, top=0, width=200, height=150)
    mine, slow = np.random.default_rng(0), np.random.default_rng(1)
    n = 1500
    crops = [whole.crop(mine, boxes) for _ in range(n)]
    numbers = np.array([(v.left, v.top, v.width, v.height) for v in crops if v != whole], float)
    expected = np.array([c for c in (slow_crop(slow, 200, 150, boxes) for _ in range(n)) if c], float)
    assert len(numbers) / n == pytest.approx(len(expected) / n, abs=4 * (0.25 / n) ** 0.5 * 2**0.5)
    for i in range(4):
        error = 4 * expected[:, i].std() * (1 / len(numbers) + 1 / len(expected)) ** 0.5
        assert numbers[:, i].mean() == pytest.approx(expected[:, i].mean(), abs=error)
        assert numbers[:, i].std() == pytest.approx(expected[:, i].std(), rel=0.15)


def test_a_crop_holds_a_centre_and_stays_in_the_view() -> None:
    rng = np.random.default_rng(2)
    view = View(left=-30, top=-10, width=200, height=150)
    boxes = np.array([[10.0, 20, 20, 30]])
    for _ in range(100):
        crop = view.crop(rng, boxes)
        assert crop.holds_centre(boxes).all()
        assert crop.left >= -30
        assert crop.left + crop.width <= 170
        assert crop.top >= -10
        assert crop.top + crop.height <= 140


def test_no_boxes_no_crop() -> None:
    view = View(left=0, top=0, width=20, height=15)
    assert view.crop(np.random.default_rng(0), np.zeros((0, 4))) == view


def test_zooming_out_is_uniform_in_side_and_place() -> None:
    rng, view = np.random.default_rng(3), View(left=0, top=0, width=1000, height=800)
    zoomed = [view.zoom_out(rng, 4.0) for _ in range(3000)]
    side = np.array([z.width / 1000 for z in zoomed])
    place = np.array([-z.left / max(1, z.width - 1000) for z in zoomed])
    assert side.min() >= 1
    assert side.max() <= 4
    assert side.mean() == pytest.approx(2.5, abs=4 * 3 / 12**0.5 / 3000**0.5)
    assert place.mean() == pytest.approx(0.5, abs=0.03)
    assert abs(np.array([z.height / 800 for z in zoomed]) - side).max() < 0.002


def test_beyond_the_image_it_is_black_and_inside_it_is_the_image() -> None:
    image = np.full((50, 40, 3), 200, np.uint8)
    view = View(left=-40, top=-50, width=120, height=100)
    picture, boxes = view.render(image, np.array([[0.0, 0, 40, 50]]), (60, 60))
    assert boxes.tolist() == [[20, 30, 40, 60]]
    assert (picture[30:, 20:40] == 200).all()
    assert picture.sum() == 200 * 3 * 30 * 20


def test_colour_leaves_what_lies_beyond_the_image_black() -> None:
    image = np.full((50, 40, 3), 100, np.uint8)
    for view in (View(left=-40, top=0, width=80, height=50), View(left=-4, top=0, width=8, height=5)):
        picture, _ = view.render(image, np.zeros((0, 4)), (16, 16), lambda pixels: 255 - pixels)
        assert (picture[:, :8] == 0).all()
        assert (picture[:, 8:] == 155).all()


@pytest.mark.parametrize(("hflip", "vflip"), [(True, False), (False, True), (True, True)])
def test_flips_are_exact(hflip: bool, vflip: bool) -> None:
    image = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    view = View(left=0, top=0, width=24, height=24, hflip=hflip, vflip=vflip)
    picture, boxes = view.render(image, np.array([[2.0, 3, 10, 20]]), (24, 24))
    expected = image[:: -1 if vflip else 1, :: -1 if hflip else 1]
    assert np.array_equal(picture, expected)
    x = [14, 22] if hflip else [2, 10]
    y = [4, 21] if vflip else [3, 20]
    assert boxes.tolist() == [[x[0], y[0], x[1], y[1]]]


def _photo() -> np.ndarray:
    """Detail of every size, as photographs have."""
    rng = np.random.default_rng(0)
    layers = [cv2.resize(rng.normal(0, 1, (h, h * 4 // 3, 3)), (640, 480), interpolation=cv2.INTER_CUBIC)
              for h in (6, 24, 96, 384)]  # fmt: skip
    image = sum(layer * amount for layer, amount in zip(layers, (60, 30, 15, 8), strict=True))
    return np.clip(image + 128, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "size", [(640, 640), (427, 320), (320, 320), (240, 240), (201, 150), (90, 66), (33, 47)]
)
def test_quick_shrinking_is_about_as_close_to_pillow_as_area_averaging(size: tuple[int, int]) -> None:
    image = _photo()
    pillow, bilinear = Image.fromarray(image), Image.Resampling.BILINEAR
    area = np.abs(resize(image, *size).astype(int) - np.asarray(pillow.resize(size, bilinear))).mean()
    small, width, height = shrink(image, *size)
    quick = np.abs(
        small.astype(int) - np.asarray(pillow.resize(size, bilinear, (0, 0, width, height)))
    ).mean()
    assert quick <= 1.5 * area + 0.5


def test_shrinking_tells_which_pixels_it_used() -> None:
    image = np.zeros((47, 101, 3), np.uint8)
    small, width, height = shrink(image, 25, 15)
    assert small.shape == (15, 25, 3)
    assert (width, height) == (100, 45)


def test_affine_maps_turn_scale_and_shift_about_the_centre() -> None:
    rng = np.random.default_rng(0)
    maps = [random_affine(rng, 300, 200) for _ in range(2000)]
    angles = np.array([math.degrees(math.atan2(m[1, 0], m[0, 0])) for m in maps])
    scales = np.array([np.linalg.det(m[:, :2]) ** 0.5 for m in maps])
    shifts = np.array([m[:, :2] @ [150, 100] + m[:, 2] - [150, 100] for m in maps])
    for values, low, high in (
        (angles, -10, 10),
        (scales, 0.5, 1.5),
        (shifts[:, 0], -30, 30),
        (shifts[:, 1], -20, 20),
    ):
        assert values.min() >= low - 1e-9
        assert values.max() <= high + 1e-9
        assert values.mean() == pytest.approx((low + high) / 2, abs=4 * (high - low) / 12**0.5 / 2000**0.5)
        assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.05)
    np.testing.assert_allclose(shifts, np.round(shifts), atol=1e-9)


def test_affine_boxes_enclose_the_moved_corners() -> None:
    quarter_turn = np.array([[0.0, -1, 10], [1, 0, 0]])
    assert affine_boxes(np.array([[1.0, 2, 4, 8]]), quarter_turn).tolist() == [[2, 1, 8, 4]]
