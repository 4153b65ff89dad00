"""Augmentations of a user's own: seeded, checked, found by import path; boxes follow the pixels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.painted import Painted, assert_boxes_follow_pixels
from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.collate import build_loader
from thawline.data.detection.custom import CustomAugmentation, load_augmentation
from thawline.data.detection.dataset import Sample
from thawline.data.draws import Draw
from thawline.errors import ConfigError
from thawline.recipe import RunConfig, load_recipe
from thawline.recipe.resolved import Augmentation, Window

PLAIN = Augmentation(size=96, flip_prob=0)
STRONG = Augmentation(size=96, strong_epochs=Window(0, 9), mosaic_epochs=Window(0, 9), mosaic_prob=0.5)


def mirror(sample: Sample, rng: np.random.Generator) -> Sample:
    """Mirror half of the images."""
    if rng.random() < 0.5:
        width = sample.image.shape[1]
        sample.image = sample.image[:, ::-1]
        sample.boxes_xyxy = np.stack(
            [width - sample.boxes_xyxy[:, 2], sample.boxes_xyxy[:, 1], width - sample.boxes_xyxy[:, 0],
             sample.boxes_xyxy[:, 3]], axis=1,
        )  # fmt: skip
    return sample


def darken(sample: Sample, rng: np.random.Generator) -> Sample:
    sample.image = (sample.image * rng.uniform(0.2, 1)).astype(np.uint8)
    return sample


def crop_to_half(sample: Sample, rng: np.random.Generator) -> Sample:
    """Keep the upper half, in another size than the input's."""
    height = sample.image.shape[0] // 2
    return replace(sample, image=sample.image[:height])


class Compose:
    """Stand-in with the interface of Albumentations' Compose: mirrors, by its own random state."""

    def __init__(self, format: str = "pascal_voc", fields: tuple[str, ...] = ("labels",)) -> None:
        self.processors = {
            "bboxes": SimpleNamespace(params=SimpleNamespace(format=format, label_fields=fields))
        }

    def set_random_seed(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *, image: np.ndarray, bboxes: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        sample = Sample(
            image=image,
            boxes_xyxy=bboxes,
            labels=labels,
            area=labels,
            iscrowd=labels,
            index=0,
            orig_size=(0, 0),
        )
        done = mirror(sample, self.rng)
        # As Albumentations 1.4 returns them: lists.
        return {
            "image": done.image,
            "bboxes": [tuple(b) for b in done.boxes_xyxy],
            "labels": list(done.labels),
        }


def pixels_of(data: TrainingImages, draws: list[Draw], workers: int = 0) -> list[np.ndarray]:
    loader = build_loader(data, list, batch_size=1, sampler=draws, workers=workers)  # type: ignore[arg-type]
    return [
        np.concatenate([s.image.ravel(), s.boxes_xyxy.ravel(), s.labels]) for batch in loader for s in batch
    ]


@pytest.mark.parametrize("augment", [mirror, Compose()], ids=["function", "pipeline"])
def test_boxes_follow_and_the_same_draw_gives_the_same_pixels_anywhere(augment: Any) -> None:
    data = TrainingImages(Painted(), PLAIN, seed=3, custom=CustomAugmentation(augment))
    plain = TrainingImages(Painted(), PLAIN, seed=3)
    draws = [Draw(epoch, position) for epoch in (0, 4) for position in range(9)]
    mirrored = 0
    for draw in draws:
        sample, without = data[draw], plain[draw]
        assert_boxes_follow_pixels(sample.image, sample.boxes_xyxy, sample.labels, within=1.5)
        is_mirrored = not np.array_equal(sample.image, without.image)
        assert np.array_equal(sample.image, without.image[:, ::-1] if is_mirrored else without.image)
        mirrored += is_mirrored
    assert 3 < mirrored < 15
    straight = pixels_of(data, draws)
    assert all(map(np.array_equal, straight, pixels_of(data, draws, workers=2)))
    assert all(map(np.array_equal, straight[::-1], pixels_of(data, draws[::-1])))
    other = TrainingImages(Painted(), PLAIN, seed=4, custom=CustomAugmentation(augment))
    assert not all(map(np.array_equal, straight, pixels_of(other, draws)))


def test_mosaics_are_augmented_as_a_whole_and_the_rest_draws_what_it_drew() -> None:
    data = TrainingImages(Painted(), STRONG, custom=CustomAugmentation(darken))
    plain = TrainingImages(Painted(), STRONG)
    for position in range(9):
        sample, without = data[Draw(1, position)], plain[Draw(1, position)]
        assert np.array_equal(sample.boxes_xyxy, without.boxes_xyxy)
        assert sample.image.mean() < without.image.mean()
        assert sample.draw == Draw(1, position)


def test_another_size_is_fitted_to_the_input_with_its_boxes() -> None:
    sample = TrainingImages(Painted(), PLAIN, custom=CustomAugmentation(crop_to_half))[Draw(0, 0)]
    without = TrainingImages(Painted(), PLAIN)[Draw(0, 0)]
    assert sample.image.shape == (96, 96, 3)
    expected = np.clip(without.boxes_xyxy * [1, 2, 1, 2], 0, 96)
    inside = expected[:, 3] - expected[:, 1] >= 1
    assert sample.boxes_xyxy == pytest.approx(expected[inside])
    assert np.array_equal(sample.labels, without.labels[inside])
    assert sample.area == pytest.approx((sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2]).prod(1))
    assert len(sample.iscrowd) == len(sample.labels)


def fails(sample: Sample, rng: np.random.Generator) -> Sample:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda s, rng: None, "must return a Sample, it returned NoneType"),
        (lambda s, rng: replace(s, image=s.image / 255), r"image of uint8 \(height, width, 3\), got float64"),
        (lambda s, rng: replace(s, image=s.image[..., 0]), r"got uint8 \(96, 96\)"),
        (
            lambda s, rng: replace(s, boxes_xyxy=s.boxes_xyxy[1:]),
            "returned 2 boxes of four numbers and 3 labels",
        ),
        (
            lambda s, rng: replace(s, labels=s.labels + 5),
            "returned labels from 5 to 7: expected .* from 0 to 2",
        ),
        (lambda s, rng: replace(s, labels=s.labels - 1), "returned labels from -1 to 1"),
        (fails, r"'fails' failed with KeyError: 'no such thing' \(test_custom.py, line \d+\)"),
    ],
)
def test_what_is_no_sample_is_refused_in_one_line(augment: Callable, message: str) -> None:
    data = TrainingImages(Painted(), PLAIN, custom=CustomAugmentation(augment, n_classes=3))
    with pytest.raises(ConfigError, match=message) as caught:
        data[Draw(0, 0)]
    assert "\n" not in str(caught.value)


def test_a_pipeline_must_carry_boxes_and_take_a_seed() -> None:
    for wrong in (Compose("coco"), Compose(fields=("names",))):
        with pytest.raises(
            ConfigError,
            match="augmentation 'Compose' must carry boxes and labels along: give its Compose bbox_p",
        ):
            CustomAugmentation(wrong)
    with pytest.raises(ConfigError, match="must carry boxes"):
        CustomAugmentation(SimpleNamespace(processors={}))
    old = SimpleNamespace(processors=Compose().processors)
    with pytest.raises(ConfigError, match=r"cannot be seeded, .* albumentations 1\.4\.21"):
        CustomAugmentation(old)


def test_albumentations_itself() -> None:
    albumentations = pytest.importorskip("albumentations")
    pipeline = albumentations.Compose(
        [albumentations.HorizontalFlip(p=0.5), albumentations.RandomBrightnessContrast(p=0.5)],
        bbox_params=albumentations.BboxParams("pascal_voc", label_fields=["labels"]),
    )
    data = TrainingImages(Painted(), STRONG, custom=CustomAugmentation(pipeline))
    draws = [Draw(epoch, position) for epoch in (0, 9) for position in range(9)]
    straight = pixels_of(data, draws)
    assert all(map(np.array_equal, straight, pixels_of(data, draws[::-1], workers=2)[::-1]))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `own_augmentations` in the current folder."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own_augmentations.py"
    file.write_text("def same(sample, rng):\n    return sample\n\n\nNUMBER = 3\n")
    yield file
    sys.modules.pop("own_augmentations", None)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_augmentations", 'expected "module:name"'),
        ("own_augmentations:sane", "cannot import 'own_augmentations:sane': .*no attribute 'sane'"),
        ("no_such_module:same", "No module named 'no_such_module'"),
        ("own_augmentations:NUMBER", "is a int, no function or pipeline"),
    ],
)
def test_an_import_path_is_found_in_the_current_folder(module, path: str, message: str) -> None:
    assert load_augmentation("own_augmentations:same")(1, 2) == 1
    assert str(module.parent) not in sys.path
    with pytest.raises(ConfigError, match=message):
        load_augmentation(path)


def test_a_function_in_a_recipe_is_its_import_path() -> None:
    base = {"objective": "detection", "data": "set"}
    config = load_recipe(base, objective={"augmentation": mirror})
    assert config.objective.augmentation == f"{__name__}:mirror"
    assert RunConfig.from_mapping(config.to_mapping()) == config
    for unnamed in (lambda sample, rng: sample, Compose()):
        with pytest.raises(
            ConfigError, match="'objective.augmentation': .* has no import path.*Put it into a module"
        ):
            load_recipe(base, objective={"augmentation": unnamed})
