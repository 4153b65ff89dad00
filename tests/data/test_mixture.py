"""Batches of several datasets: each from one of them, whatever is mixed into its images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.collate import Collate, build_loader
from thawline.data.detection.dataset import DetectionDataset
from thawline.data.detection.mixture import MixedImages, batches_by_dataset
from thawline.data.detection.records import ImageRecord
from thawline.data.draws import Draw
from thawline.recipe.resolved import Augmentation, Window

GREYS = (60, 250)
"""Grey of all images of each dataset, whose boxes have its number as their class."""
SIZE, BATCH = 64, 3


def records(folder: Path, dataset: int, n: int) -> list[ImageRecord]:
    found = []
    for number in range(n):
        path = folder / f"{dataset}-{number}.png"
        cv2.imwrite(str(path), np.full((48, 40, 3), GREYS[dataset], np.uint8))
        box = np.array([[4, 6, 30, 40]], np.float32)
        found.append(
            ImageRecord(
                path=path,
                image_id=number,
                width=40,
                height=48,
                boxes_xyxy=box,
                labels=np.array([dataset]),
                area=np.array([884.0]),
                iscrowd=np.array([False]),
            )
        )
    return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> MixedImages:
    """Seven images of the first dataset in two batches, four of the second in three."""
    folder, always = tmp_path_factory.mktemp("mixture"), Window(0, 9)
    settings = Augmentation(
        size=SIZE, strong_epochs=always, mosaic_epochs=always, mosaic_prob=0.7,
        mixup_epochs=always, mixup_prob=0.5, copyblend_epochs=always, copyblend_prob=1.0, colour_prob=0.0,
        min_box_size=1,
    )  # fmt: skip
    parts = [
        TrainingImages(
            DetectionDataset(records(folder, number, n)),
            settings,
            seed=number,
            batch_size=BATCH,
            repeats=np.full(n, batches * BATCH / n),
        )
        for number, (n, batches) in enumerate([(7, 2), (4, 3)])
    ]
    return MixedImages(parts, batch_size=BATCH, seed=5)


def test_mosaic_mixup_and_copyblend_stay_within_a_dataset(mixed: MixedImages) -> None:
    collate = Collate(mixed.parts[0].settings)
    for epoch in range(3):
        sampler = mixed.sampler()
        sampler.set_epoch(epoch)
        seen = []
        for start in range(0, len(sampler), BATCH):
            samples = [mixed[Draw(epoch, start + place)] for place in range(BATCH)]
            (dataset,) = {sample.dataset for sample in samples}
            batch = collate(samples)
            labels = np.concatenate([target["labels"] for target in batch["targets"]])
            assert set(labels) == {dataset}
            brightest = batch["pixel_values"].amax(dim=(1, 2, 3))
            assert (brightest <= GREYS[0] if dataset == 0 else brightest > GREYS[0]).all()
            seen.append(dataset)
        assert sorted(seen) == [0, 0, 1, 1, 1]


def test_every_image_of_a_dataset_comes_as_often_as_the_next(mixed: MixedImages) -> None:
    n_epochs = 4
    for number, part in enumerate(mixed.parts):
        drawn = [
            sample.index
            for epoch in range(n_epochs)
            for position in range(len(mixed.sampler()))
            if (sample := mixed[Draw(epoch, position)]).dataset == number
        ]
        counts = np.bincount(drawn, minlength=len(part))
        expected = n_epochs * len(part.order) / len(part)
        assert np.abs(counts - expected).max() <= n_epochs
        assert counts.min() > 0


def test_a_draw_is_a_function_of_the_seed_alone(mixed: MixedImages) -> None:
    again = MixedImages(mixed.parts, batch_size=BATCH, seed=5)
    for position in (7, 0, 13):
        one, two = mixed[Draw(1, position)], again[Draw(1, position)]
        assert (one.dataset, one.index) == (two.dataset, two.index)
        np.testing.assert_array_equal(one.image, two.image)
    orders = [[mixed[Draw(epoch, place * BATCH)].dataset for place in range(5)] for epoch in range(4)]
    assert len(set(map(tuple, orders))) > 1
    other = MixedImages(mixed.parts, batch_size=BATCH, seed=6)
    assert orders != [[other[Draw(epoch, place * BATCH)].dataset for place in range(5)] for epoch in range(4)]


def test_the_loader_keeps_batches_whole(mixed: MixedImages) -> None:
    loader = build_loader(mixed, list, batch_size=BATCH, sampler=mixed.sampler())
    assert [len({sample.dataset for sample in batch}) for batch in loader] == [1] * 5


@pytest.mark.parametrize(
    ("sampling", "temperature", "expected"),
    [
        ("each", 2.0, [16, 4, 1]),
        ("size", 2.0, [16, 4, 1]),
        ("equal", 2.0, [7, 7, 7]),
        ("temperature", 2.0, [12, 6, 3]),
        ("temperature", 1.0, [16, 4, 1]),
        ("temperature", 1e9, [7, 7, 7]),
    ],
)
def test_batches_of_an_epoch(sampling: str, temperature: float, expected: list[int]) -> None:
    sizes = [64, 16, 4]
    assert batches_by_dataset(sizes, 4, sampling, temperature) == expected
    if sampling == "temperature" and temperature == 2.0:
        roots = np.sqrt(sizes)
        np.testing.assert_allclose(expected, 21 * roots / roots.sum(), atol=0.5)
