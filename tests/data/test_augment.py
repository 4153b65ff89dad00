"""Augmentation: boxes follow pixels, chances are as published, a draw gives the same pixels anywhere."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from tests.support.painted import Painted, assert_boxes_follow_pixels
from thawline.data.detection import augment, mosaic
from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.geometry import View
from thawline.data.detection.photometric import Colour
from thawline.data.draws import Draw, EpochOrder
from thawline.errors import ConfigError
from thawline.recipe.resolved import Augmentation, Window

STRONG = Augmentation(size=160, strong_epochs=Window(0, 20), mosaic_epochs=Window(0, 10), colour_prob=0)
MOSAIC, NO_MOSAIC, PLAIN = 0, 10, 20  # epochs in and after the windows


@pytest.fixture(scope="module")
def images() -> Painted:
    return Painted()


def test_plain_pictures_are_the_images_resized_and_maybe_mirrored(images: Painted) -> None:
    data = TrainingImages(images, STRONG)
    mirrored = 0
    for position in range(len(images)):
        sample = data[Draw(PLAIN, position)]
        assert sample.image.shape == (160, 160, 3)
        assert len(sample.labels) == 3
        assert_boxes_follow_pixels(sample.image, sample.boxes_xyxy, sample.labels, within=1)
        before = images.pictures[sample.index][1]
        mirrored += not np.array_equal(np.argsort(before[:, 0]), np.argsort(sample.boxes_xyxy[:, 0]))
    assert 0 < mirrored < len(images)


@pytest.mark.parametrize("size", [160, (96, 160), (160, 96)])
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.3])
def test_boxes_follow_pixels_through_zoom_out_crop_and_flips(
    scale: float, size: int | tuple[int, int]
) -> None:
    data = TrainingImages(Painted(scale=scale), replace(STRONG, vertical_flip_prob=0.5, size=size))
    height, width = data.settings.height_width
    n_boxes = Counter()
    for epoch, position in itertools.product(range(10, 20), range(len(data))):
        sample = data[Draw(epoch, position)]
        n_boxes[len(sample.labels)] += 1
        assert sample.image.shape == (height, width, 3)
        assert sample.boxes_xyxy.min(initial=0) >= 0
        assert (sample.boxes_xyxy <= [width, height, width, height]).all()
        # What a crop cut out because its centre lies outside is painted and has no box.
        for label in range(3):
            chosen = sample.labels == label
            if chosen.any():
                assert_boxes_follow_pixels(
                    np.where(_only(label), sample.image, 0),
                    sample.boxes_xyxy[chosen],
                    sample.labels[chosen],
                    1.5,
                )
    assert set(n_boxes) == {1, 2, 3}


def _only(label: int) -> np.ndarray:
    return np.arange(3) == label


@pytest.mark.parametrize("size", [240, (160, 240), (240, 160)])
@pytest.mark.parametrize("merged", [False, True])
def test_boxes_follow_pixels_through_a_mosaic(
    images: Painted, merged: bool, size: int | tuple[int, int]
) -> None:
    settings = replace(STRONG, mosaic_prob=1.0, merged_mosaic=merged, vertical_flip_prob=0.5, size=size)
    data = TrainingImages(images, settings)
    for epoch, position in itertools.product(range(4), range(len(data))):
        sample = data[Draw(epoch, position)]
        assert len(sample.labels) <= 12
        assert sample.image.shape[:2] == settings.height_width
        assert_boxes_follow_pixels(sample.image, sample.boxes_xyxy, sample.labels, within=2.5)


def test_a_rectangle_with_equal_sides_is_the_square(images: Painted) -> None:
    square = replace(STRONG, vertical_flip_prob=0.5, colour_prob=0.5)
    for merged in (False, True):
        one = TrainingImages(images, replace(square, merged_mosaic=merged))
        other = TrainingImages(images, replace(square, merged_mosaic=merged, size=(160, 160)))
        for epoch, position in itertools.product((MOSAIC, NO_MOSAIC, PLAIN), range(9)):
            a, b = one[Draw(epoch, position)], other[Draw(epoch, position)]
            assert np.array_equal(a.image, b.image)
            assert np.array_equal(a.boxes_xyxy, b.boxes_xyxy)


def test_tiles_of_a_mosaic_cover_a_quarter_of_the_input() -> None:
    no_boxes = np.zeros((0, 4)), np.zeros(0, np.int64)
    for shape, expected in (((100, 300), (80, 240)), ((300, 100), (480, 160)), ((50, 100), (80, 160))):
        tile = mosaic.Tile.of(np.zeros((*shape, 3), np.uint8), *no_boxes, (80, 160))
        assert tile.image.shape[:2] == expected


def test_merged_mosaic_is_the_published_picture_up_to_interpolation(images: Painted) -> None:
    by_steps, merged = (
        TrainingImages(images, replace(STRONG, mosaic_prob=1.0, merged_mosaic=merged))[Draw(1, 2)]
        for merged in (False, True)
    )
    np.testing.assert_allclose(by_steps.boxes_xyxy, merged.boxes_xyxy, atol=1e-3)
    assert np.abs(by_steps.image.astype(int) - merged.image).mean() < 4


def test_area_is_that_of_the_finished_box(images: Painted) -> None:
    for position in range(9):
        sample = TrainingImages(images, STRONG)[Draw(NO_MOSAIC, position)]
        sides = sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2]
        np.testing.assert_allclose(sample.area, sides[:, 0] * sides[:, 1])


def test_boxes_below_the_smallest_size_are_dropped(images: Painted) -> None:
    sizes = []
    data = TrainingImages(images, replace(STRONG, min_box_size=30))
    for epoch, position in itertools.product(range(5, 15), range(9)):
        sample = data[Draw(epoch, position)]
        sizes += list((sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2]).min(1))
    assert len(sizes) > 5
    assert min(sizes) >= 30


def test_images_without_boxes_stay_without(images: Painted) -> None:
    empty = Painted(4)
    empty.pictures = [(image, boxes[:0], labels[:0]) for image, boxes, labels in empty.pictures]
    data = TrainingImages(empty, replace(STRONG, colour_prob=0.5))
    for epoch, position in itertools.product((MOSAIC, NO_MOSAIC, PLAIN), range(4)):
        sample = data[Draw(epoch, position)]
        assert sample.boxes_xyxy.shape == (0, 4)
        assert sample.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (3, set()),
        (4, {"colour", "mosaic", "zoom_out", "crop"}),
        (7, {"colour", "mosaic", "zoom_out", "crop"}),
        (8, {"colour", "zoom_out", "crop"}),
        (11, {"colour", "zoom_out", "crop"}),
        (12, set()),
    ],
)
def test_each_epoch_applies_exactly_the_listed_operations(
    images: Painted, monkeypatch: pytest.MonkeyPatch, epoch: int, expected: set[str]
) -> None:
    seen = set()

    def spy(owner: object, name: str, label: str) -> None:
        real = getattr(owner, name)

        def call(*args, **kwargs):
            seen.add(label)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    spy(View, "zoom_out", "zoom_out")
    spy(View, "crop", "crop")
    spy(augment, "compose", "mosaic")
    spy(Colour, "draw", "colour")
    settings = Augmentation(size=32, strong_epochs=Window(4, 12), mosaic_epochs=Window(4, 8))
    data = TrainingImages(images, settings)
    together = set()
    for position in range(9):
        seen.clear()
        data[Draw(epoch, position)]
        assert not ("mosaic" in seen and seen & {"zoom_out", "crop"})
        together |= seen
    assert together == expected


def test_mirroring_zooming_and_cropping_come_with_their_probabilities(
    images: Painted, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Augmentation(size=32, strong_epochs=Window(0, 400))
    assert (settings.flip_prob, settings.zoom_out_prob, settings.crop_prob) == (0.5, 0.5, 0.8)  # as published
    settings = replace(settings, flip_prob=0.3, zoom_out_prob=0.6)
    counts: Counter[str] = Counter()

    def count(name: str) -> None:
        real = getattr(View, name)

        def call(view: View, *args):
            counts[name] += 1
            counts["mirrored"] += view.hflip and name == "crop"
            return real(view, *args)

        monkeypatch.setattr(View, name, call)

    count("zoom_out")
    count("crop")
    data = TrainingImages(images, settings)
    draws = [Draw(epoch, position) for epoch in range(250) for position in range(len(data))]
    for draw in draws:
        data[draw]

    def within(found: int, of: int, prob: float) -> None:
        assert found / of == pytest.approx(prob, abs=4 * (prob * (1 - prob) / of) ** 0.5)

    within(counts["zoom_out"], len(draws), 0.6)
    within(counts["crop"], len(draws), 0.8)
    within(counts["mirrored"], counts["crop"], 0.3)


def test_mosaics_come_with_their_probability() -> None:
    lanes = mosaic.Lanes(order=EpochOrder(5, 4000), batch_size=4)
    for prob in (0.3, 0.5):
        share = np.mean([lanes.is_mosaic(Draw(7, position), prob) for position in range(4000)])
        assert share == pytest.approx(prob, abs=4 * (prob * (1 - prob) / 4000) ** 0.5)


def test_a_draw_gives_the_same_pixels_in_any_order_and_any_process(images: Painted) -> None:
    settings = replace(STRONG, colour_prob=0.5)

    def read(draws: list[Draw], workers: int) -> dict[Draw, np.ndarray]:
        data = TrainingImages(images, settings, seed=11, batch_size=2, n_lanes=2)
        loader = DataLoader(data, sampler=draws, batch_size=2, num_workers=workers, collate_fn=list)
        return {s.draw: np.concatenate([s.image.ravel(), s.boxes_xyxy.ravel()]) for b in loader for s in b}

    draws = [Draw(epoch, position) for epoch in (0, 1, 12) for position in range(9)]
    straight, shuffled = read(draws, 0), read(draws[::-1], 2)
    later = read(draws[13:], 0)  # as a resumed run would
    for draw, pixels in straight.items():
        assert np.array_equal(pixels, shuffled[draw]), draw
        assert draw not in later or np.array_equal(pixels, later[draw]), draw
    assert not np.array_equal(straight[Draw(0, 0)], straight[Draw(1, 0)])


def test_another_seed_gives_other_pictures(images: Painted) -> None:
    a, b = (TrainingImages(images, STRONG, seed=seed)[Draw(NO_MOSAIC, 0)] for seed in (0, 1))
    assert not np.array_equal(a.image, b.image)


def test_an_epoch_holds_every_image_once_in_a_new_order(images: Painted) -> None:
    data = TrainingImages(images, replace(STRONG, strong_epochs=Window(0, 0), mosaic_epochs=Window(0, 0)))
    sampler = data.sampler()
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append([data[draw].index for draw in sampler])
        assert sorted(orders[-1]) == list(range(9))
    assert len({tuple(order) for order in orders}) == 3


def test_partners_are_at_hand_where_each_worker_has_its_lanes() -> None:
    images = Painted(160)
    data = TrainingImages(images, replace(STRONG, mosaic_prob=0.5), batch_size=4, n_lanes=2)
    for position in (p for p in range(160) if p // 4 % 2 == 0):  # one worker of two
        data[Draw(0, position)]
    # 80 images of its own, and at most the fifty it filled its history up with.
    assert images.n_reads <= 80 + 50


@pytest.mark.parametrize("position", [0, 3, 5, 38, 61, 100])
def test_a_lanes_history_is_what_a_slow_walk_back_finds(position: int) -> None:
    lanes = mosaic.Lanes(order=EpochOrder(1, 200), batch_size=5, n_lanes=3)
    lane = position // 5 % 3
    walk = [p for p in range(position, -1, -1) if p // 5 % 3 == lane]
    assert lanes._before(position, n=20).tolist() == walk[:20]


def test_tiles_are_kept_up_to_the_capacity_oldest_out() -> None:
    made: list[int] = []
    cache = mosaic.TileCache(lambda index: made.append(index) or index, capacity=2)
    assert [cache[i] for i in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mosaic_prob": 1.5}, "mosaic_prob.*1.5"),
        ({"size": 0}, "size=0"),
        ({"mosaic_epochs": Window(0, 30)}, r"mosaic_epochs=\(0, 30\).*inside"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(STRONG, **settings)


def test_an_index_in_place_of_a_draw_is_refused(images: Painted) -> None:
    with pytest.raises(ConfigError, match=r"got 3.*sampler=data.sampler\(\)"):
        TrainingImages(images, STRONG)[3]  # type: ignore[index]


def test_crowds_are_refused() -> None:
    images = Painted(2)
    images.keep_crowd = True
    with pytest.raises(ConfigError, match="keep_crowd=True"):
        TrainingImages(images, STRONG)
