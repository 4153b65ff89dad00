"""The loader's benchmark compares like with like: the same pictures, painted two ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from thawline.bench import loader
from thawline.bench.loader import PillowFiles, PillowImages, generated_images
from thawline.data.detection import geometry, mosaic
from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.dataset import DetectionDataset
from thawline.data.detection.records import ImageRecord
from thawline.data.draws import Draw
from thawline.training.detection.schedule import published_schedule

WITH_MOSAIC, WITHOUT = 4, 250


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRecord]:
    return generated_images(tmp_path_factory.mktemp("images"), n_images=8)


def averaged_over_fractions(image: np.ndarray, width: int, height: int) -> tuple[np.ndarray, int, int]:
    return geometry.resize(image, width, height), image.shape[1], image.shape[0]


@pytest.mark.parametrize("epoch", [WITH_MOSAIC, WITHOUT])
def test_pictures_are_as_close_to_pillows_as_area_resizing_makes_them(
    records: list[ImageRecord], monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    settings = replace(published_schedule("pico", 10).settings, size=320)
    draws = [Draw(epoch, position) for position in range(8)]
    pillow = PillowImages(PillowFiles(records), settings)
    reference = [pillow[draw] for draw in draws]

    def levels_off() -> float:
        data = TrainingImages(DetectionDataset(records), settings)
        return float(
            np.mean(
                [np.abs(data[d].image.astype(int) - r.image) for d, r in zip(draws, reference, strict=True)]
            )
        )

    for draw, expected in zip(draws, reference, strict=True):
        boxes = TrainingImages(DetectionDataset(records), settings)[draw].boxes_xyxy
        # A view's visible part begins and ends at whole pixels of the picture.
        np.testing.assert_allclose(boxes, expected.boxes_xyxy, atol=1.5)
    quick = levels_off()
    monkeypatch.setattr(geometry, "shrink", averaged_over_fractions)
    monkeypatch.setattr(mosaic, "shrink", averaged_over_fractions)
    assert quick <= 1.25 * levels_off() + 0.1


def test_the_command_prints_a_table_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(published_schedule("atto", 10).settings, size=64)
    monkeypatch.setitem(loader.PUBLISHED, "atto", small)
    out = str(tmp_path / "loader.json")
    sizes = ["--images", "4", "--batch_size", "2", "--rounds", "1"]
    assert loader.main(["--variant", "atto", *sizes, "--out", out]) == 0
    results = json.loads((tmp_path / "loader.json").read_text())
    assert set(results["phases"]) == {"with Mosaic", "without Mosaic", "stage 2"}
    for chains in results["phases"].values():
        assert chains["pillow"]["times_pillow"] == 1
        assert chains["thawline"]["images_per_second"] > 0
        assert chains["thawline"]["levels_from_pillow"] < 6
    assert "| stage 2 | merged |" in capsys.readouterr().out
