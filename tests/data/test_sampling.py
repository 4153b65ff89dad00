"""Repeat-factor sampling: the factors by LVIS' closed form, and how often each image comes."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support.painted import Painted
from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.collate import Collate, build_loader
from thawline.data.detection.records import ImageRecord
from thawline.data.detection.sampling import class_repeats, image_repeats
from thawline.data.draws import ORDER, Draw, EpochOrder, rng_for
from thawline.recipe.resolved import Augmentation, Window


def record(*labels: int, crowd: tuple[int, ...] = ()) -> ImageRecord:
    every = np.array([*labels, *crowd], np.int64)
    n = len(every)
    return ImageRecord(
        image_id=0, path=Path("a.png"), width=9, height=7, boxes_xyxy=np.zeros((n, 4)), labels=every,
        iscrowd=np.arange(n) >= len(labels), area=np.zeros(n),
    )  # fmt: skip


RECORDS = [
    record(0, 0, 1),
    record(0),
    record(0),
    record(),
    record(0, 2, crowd=(3,)),
    record(0),
    record(1),
    record(0),
]


@pytest.mark.parametrize("threshold", [0.001, 0.2, 0.5, 1.0])
def test_factors_are_those_of_the_closed_form(threshold: float) -> None:
    shares = [6 / 8, 2 / 8, 1 / 8]
    of_class = [max(1, math.sqrt(threshold / share)) for share in shares]
    found = class_repeats(RECORDS, 4, threshold)
    assert found == pytest.approx([*of_class, 1])  # class 3 is in a crowd alone: it is not learned
    of_image = [max([1.0, *(of_class[c] for c in r.labels[~r.iscrowd])]) for r in RECORDS]
    assert image_repeats(RECORDS, found) == pytest.approx(of_image)


def test_every_epoch_draws_an_image_as_often_as_its_factor_rounded_up_or_down() -> None:
    repeats = np.array([1, 3.2, 1, 1.5, 1, 1, 2, 1.01, 1])
    order = EpochOrder(7, 9, repeats)
    assert len(order) == round(12.71)
    expected = repeats * 13 / repeats.sum()
    total = np.zeros(9)
    for epoch in range(2000):
        drawn = np.bincount(order(epoch), minlength=9)
        assert drawn.sum() == 13
        assert (np.floor(expected) <= drawn).all()
        assert (drawn <= np.ceil(expected)).all()
        total += drawn
    # The mean of 2,000 draws of a value that is one of two neighbours: four standard errors.
    assert total / 2000 == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(2000))
    assert not np.array_equal(order(0), order(1))
    assert np.array_equal(EpochOrder(7, 9, repeats)(5), order(5))
    assert np.array_equal(pickle.loads(pickle.dumps(order))(5), order(5))
    assert not np.array_equal(EpochOrder(8, 9, repeats)(5), order(5))


def test_without_repeats_an_epoch_is_the_permutation_of_the_seed() -> None:
    expected = rng_for(3, Draw(4, 0), ORDER).permutation(50)
    assert np.array_equal(EpochOrder(3, 50)(4), expected)
    assert sorted(EpochOrder(3, 50, np.ones(50))(4)) == list(range(50))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_draws_the_repeats_whatever_the_workers(workers: int) -> None:
    repeats = np.array([1, 1, 4.0, 1, 2])
    data = TrainingImages(Painted(5), Augmentation(size=32), batch_size=3, repeats=repeats)
    loader = build_loader(data, lambda samples: [s.index for s in samples], batch_size=3, workers=workers)
    loader.sampler.set_epoch(1)
    drawn = [index for batch in loader for index in batch]
    assert Counter(drawn) == {0: 1, 1: 1, 2: 4, 3: 1, 4: 2}
    assert drawn == data.order(1).tolist()
    mosaics = Augmentation(size=32, strong_epochs=Window(0, 9), mosaic_epochs=Window(0, 9), mosaic_prob=1.0)
    data = TrainingImages(Painted(5), mosaics, batch_size=3, repeats=repeats)
    loader = build_loader(data, Collate(mosaics), batch_size=3, workers=workers)
    assert [batch["pixel_values"].shape for batch in loader] == [(3, 3, 32, 32)] * 3
