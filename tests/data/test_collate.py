"""Batches: MixUp, CopyBlend and multi-scale, held to closed forms and the authors' log; the loader."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.support.painted import Painted
from thawline.data.detection import collate
from thawline.data.detection.augment import TrainingImages, TrainingSample
from thawline.data.detection.collate import Collate, build_loader, multi_scale_sizes, to_float
from thawline.data.draws import Draw
from thawline.errors import ConfigError
from thawline.recipe.resolved import Augmentation, Window

SIZE = 96
BOTH = Augmentation(
    size=SIZE,
    mixup_epochs=Window(2, 5), mixup_prob=0.5,
    copyblend_epochs=Window(2, 8), copyblend_prob=0.5,
    multi_scale_repeat=2, stop_epoch=9,
)  # fmt: skip


@pytest.fixture(scope="module")
def samples() -> list[TrainingSample]:
    data = TrainingImages(Painted(5), Augmentation(size=SIZE))
    return [data[Draw(0, position)] for position in range(5)]


def at(samples: list[TrainingSample], epoch: int, position: int = 0) -> list[TrainingSample]:
    return [replace(s, draw=Draw(epoch, position + i)) for i, s in enumerate(samples)]


def test_a_plain_batch_is_the_samples_and_their_boxes_as_shares(samples: list[TrainingSample]) -> None:
    batch = Collate()(samples)
    pixels = batch["pixel_values"]
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (5, 3, SIZE, SIZE))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(pixels[3].permute(1, 2, 0).numpy(), samples[3].image)
    for sample, target in zip(samples, batch["targets"], strict=True):
        centre, size = target["boxes"].split(2, dim=1)
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=1) * SIZE
        torch.testing.assert_close(corners, torch.from_numpy(sample.boxes_xyxy), rtol=0, atol=1e-4)
        assert target["labels"].tolist() == sample.labels.tolist()


def test_mixup_blends_each_image_with_the_one_before_and_keeps_both_sets_of_boxes() -> None:
    rng = np.random.default_rng(0)
    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 100, 250)])
    boxes = [np.full((n, 4), n, np.float32) for n in (1, 2, 3)]
    labels = [np.full(n, n) for n in (1, 2, 3)]
    mixed, new_boxes, new_labels = collate.mix_up(images, boxes, labels, rng)
    own = np.random.default_rng(0).uniform(0.45, 0.55)
    expected = [(1 - own) * 250, own * 100, own * 250 + (1 - own) * 100]
    assert np.abs(mixed[:, 0, 0, 0] - np.array(expected)).max() <= 0.5
    assert [b[:, 0].tolist() for b in new_boxes] == [[1, 3, 3, 3], [2, 2, 1], [3, 3, 3, 2, 2]]
    assert [x.tolist() for x in new_labels] == [[1, 3, 3, 3], [2, 2, 1], [3, 3, 3, 2, 2]]


def test_copyblend_pastes_at_most_three_whole_objects_inside_each_image(
    samples: list[TrainingSample],
) -> None:
    for position in range(20):
        rng = np.random.default_rng(position)
        images = np.stack([s.image for s in samples])
        boxes, labels = [s.boxes_xyxy for s in samples], [s.labels for s in samples]
        sizes = {tuple(np.round(b[2:] - b[:2]).astype(int)) for of_image in boxes for b in of_image}
        new_boxes, new_labels = collate.copy_blend(images, boxes, labels, rng)
        for before, after, classes in zip(boxes, new_boxes, new_labels, strict=True):
            assert np.array_equal(after[: len(before)], before)
            copies = after[len(before) :]
            assert len(copies) == 3
            assert len(classes) == len(after)
            assert copies.min() >= 0
            assert copies.max() <= SIZE
            for width, height in copies[:, 2:] - copies[:, :2]:
                assert any(abs(width - w) <= 2 and abs(height - h) <= 2 for w, h in sizes)


def test_copyblend_blends_the_copied_pixels_in() -> None:
    images = np.zeros((2, 50, 50, 3), np.uint8)
    images[0, 5:25, 10:20] = 200
    boxes = [np.array([[10, 5, 20, 25]], np.float32), np.zeros((0, 4), np.float32)]
    new_boxes, new_labels = collate.copy_blend(
        images, boxes, [np.array([7]), np.array([], int)], np.random.default_rng(3)
    )
    ((x0, y0, x1, y1),) = new_boxes[1].astype(int)
    assert (x1 - x0, y1 - y0) == (10, 20)
    assert new_labels[1].tolist() == [7]
    below = np.random.default_rng(3).uniform(0.45, 0.55)
    assert np.abs(images[1, y0:y1, x0:x1] - (1 - below) * 200).max() <= 0.5
    images[1, y0:y1, x0:x1] = 0
    assert images[1].sum() == 0  # the border it brought along was black


def test_batches_of_a_rectangle_paste_inside_and_give_boxes_as_shares_of_each_side() -> None:
    settings = replace(BOTH, size=(64, 160), mixup_prob=0.0, copyblend_prob=1.0)
    data = TrainingImages(Painted(5), settings)
    samples = [data[Draw(2, position)] for position in range(5)]
    shapes = set()
    for position in range(12):
        batch = Collate(settings)(at(samples, 2, position))
        shapes.add(tuple(batch["pixel_values"].shape[-2:]))
        for sample, target in zip(samples, batch["targets"], strict=True):
            centre, size = target["boxes"].split(2, dim=1)
            corners = torch.cat([centre - size / 2, centre + size / 2], dim=1)
            assert corners.min() >= -1e-6
            assert corners.max() <= 1 + 1e-6
            own = corners[: len(sample.labels)] * torch.tensor([160, 64, 160, 64])
            torch.testing.assert_close(own, torch.from_numpy(sample.boxes_xyxy), rtol=0, atol=1e-4)
            assert len(target["labels"]) == len(sample.labels) + 3
    assert shapes == {(64, 128), (64, 160), (64, 192)}


def test_copyblend_leaves_small_objects_alone() -> None:
    images = np.full((2, 50, 50, 3), 9, np.uint8)
    boxes = [np.array([[10, 5, 19.9, 15]], np.float32), np.array([[0, 0, 9, 11]], np.float32)]
    new_boxes, _ = collate.copy_blend(images, boxes, [np.array([0]), np.array([1])], np.random.default_rng(0))
    assert [len(b) for b in new_boxes] == [1, 1]
    assert (images == 9).all()


def test_mixup_comes_first_and_copyblend_for_half_of_the_rest(samples: list[TrainingSample]) -> None:
    n_own = [len(s.labels) for s in samples]

    settings = replace(BOTH, multi_scale_repeat=None)

    def kind(epoch: int, position: int) -> str:
        numbers = [len(t["labels"]) for t in Collate(settings)(at(samples, epoch, position))["targets"]]
        if numbers == n_own:
            return "none"
        return "copyblend" if numbers == [n + 3 for n in n_own] else "mixup"

    samples = [replace(s, labels=s.labels[: 1 + i % 2], boxes_xyxy=s.boxes_xyxy[: 1 + i % 2])
               for i, s in enumerate(samples)]  # fmt: skip
    n_own = [len(s.labels) for s in samples]
    kinds = {epoch: [kind(epoch, position) for position in range(200)] for epoch in (2, 4, 5, 7)}
    for epoch in (2, 4):
        shares = [kinds[epoch].count(name) / 200 for name in ("mixup", "copyblend", "none")]
        assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.14)
    for epoch in (5, 7):
        assert "mixup" not in kinds[epoch]
        assert kinds[epoch].count("copyblend") / 200 == pytest.approx(0.5, abs=0.14)
    for epoch in (1, 8):
        assert {kind(epoch, position) for position in range(20)} == {"none"}


def test_multi_scale_sizes_are_those_of_the_authors_log(shared: Path) -> None:
    notes = json.loads((shared / "fixtures/deimv2/published_runs.json").read_text())["dinov3_s"]["notes"]
    (line,) = [note for note in notes if note.startswith("Multi-scales@")]
    published = json.loads(line.removeprefix("Multi-scales@"))
    assert list(multi_scale_sizes((640, 640), 20)) == [(side, side) for side in published]
    assert len(multi_scale_sizes((640, 640), 3)) == 13


def test_multi_scale_keeps_the_shape_of_a_rectangle() -> None:
    sizes = multi_scale_sizes((320, 640), 2)
    assert [width for _, width in sizes] == [width for width, _ in multi_scale_sizes((640, 640), 2)]
    assert all(height % 32 == 0 and abs(height / width - 0.5) < 0.034 for height, width in sizes)
    assert sizes.count((320, 640)) == 2
    assert [size[::-1] for size in sizes] == list(multi_scale_sizes((640, 320), 2))
    assert set(multi_scale_sizes((32, 160), 1)) == {(32, 96), (32, 128), (32, 160), (32, 192)}


def test_multi_scale_draws_each_size_as_often_as_it_is_listed_and_stops(
    samples: list[TrainingSample],
) -> None:
    only = Augmentation(size=128, multi_scale_repeat=2, stop_epoch=9)
    sides = [Collate(only)(at(samples[:1], 8, i))["pixel_values"].shape[-1] for i in range(400)]
    shares = [sides.count(side) / 400 for side in (96, 128, 160)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.1)
    assert {Collate(only)(at(samples[:1], 9, i))["pixel_values"].shape[-1] for i in range(20)} == {SIZE}


def test_published_multi_scale_takes_the_nearest_pixel_as_torch_does(samples: list[TrainingSample]) -> None:
    plain = Collate()(samples)["pixel_values"]
    for size in (64, 128, 75):
        nearest = Collate(Augmentation(multi_scale_repeat=1, stop_epoch=1, published=True))
        nearest.sizes = ((size, size),)
        batch = nearest(samples)
        expected = F.interpolate(plain.float(), size=size, mode="nearest").to(torch.uint8)
        assert torch.equal(batch["pixel_values"], expected)
        assert torch.equal(batch["targets"][0]["boxes"], Collate()(samples)["targets"][0]["boxes"])


def test_a_batch_follows_from_its_draws(samples: list[TrainingSample]) -> None:
    a, b, c = (Collate(BOTH, seed=seed)(at(samples, 3, 40)) for seed in (0, 0, 1))
    assert torch.equal(a["pixel_values"], b["pixel_values"])
    same_size = a["pixel_values"].shape == c["pixel_values"].shape
    assert not (same_size and torch.equal(a["pixel_values"], c["pixel_values"]))


@pytest.mark.parametrize("normalised", [False, True])
def test_bytes_become_the_networks_input(samples: list[TrainingSample], normalised: bool) -> None:
    pixels = Collate()(samples)["pixel_values"]
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if normalised else (None, None)
    expected = pixels.double() / 255
    if mean and std:
        expected = (expected - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    floats = to_float(pixels, mean=mean, std=std)
    assert floats.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(floats.double(), expected, rtol=0, atol=1e-6)


def test_the_loader_turns_epochs_and_leaves_out_the_short_batch() -> None:
    data = TrainingImages(Painted(5), Augmentation(size=32), batch_size=2)
    loader = build_loader(data, Collate(), batch_size=2)
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch["pixel_values"] for batch in loader])
    assert [len(pixels) for pixels in epochs[0]] == [2, 2]
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert len(build_loader(data, Collate(), batch_size=9)) == 1


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="mixup_prob.*-1"):
        Augmentation(mixup_prob=-1)


def test_workers_are_forked_from_a_process_without_threads_of_opencv() -> None:
    before = collate.opencv().getNumThreads()
    try:
        collate.opencv().setNumThreads(2)
        build_loader(TrainingImages(Painted(4), Augmentation(size=SIZE)), Collate(), batch_size=2, workers=1)
        assert collate.opencv().getNumThreads() == 1
    finally:
        collate.opencv().setNumThreads(before)
