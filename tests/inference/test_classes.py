"""Classes as users give them: names, numbers, lists, texts, names with commas."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from thawline.cli import main
from thawline.errors import ConfigError
from thawline.inference import Detector
from thawline.inference.classes import class_ids
from thawline.models.deimv2 import DEIMv2

NAMES = ("person", "cat, wild", "dog", "traffic light", "cat", "7", 'a "b"', "x,y,z", "y")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0,2", [0, 2]),
        ("dog", [2]),
        (2, [2]),
        (["0", "dog"], [0, 2]),
        ([0, np.int64(2)], [0, 2]),
        (np.array([1, 3]), [1, 3]),
        (torch.tensor([1]), [1]),
        ("traffic light", [3]),
        ("traffic light,person", [3, 0]),
        ("cat, wild", [1]),
        ("cat, wild,dog", [1, 2]),
        ("dog, cat, wild ,0", [2, 1, 0]),
        ("cat,dog", [4, 2]),
        ('"cat, wild",dog', [1, 2]),
        ("'traffic light', 2", [3, 2]),
        ("7", [5]),  # a name first, then a number
        (7, [7]),
        ('a "b"', [6]),
        ("x,y,z,y", [7, 8]),
        (("cat, wild", "2"), [1, 2]),
        ("dog,", [2]),
    ],
)
def test_names_numbers_and_texts_of_both(given: object, expected: list[int]) -> None:
    assert class_ids(given, NAMES) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dgo", "Unknown class 'dgo'.*Did you mean 'dog'"),
        ("dog,wolf", "Unknown class 'wolf'"),
        ("12", "Class 12: the model has classes 0 to 8"),
        ([-1], "Class -1"),
        ("", "names no class"),
        ([], "names no class"),
    ],
)
def test_what_is_no_class_is_named(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        class_ids(given, NAMES)


def test_the_command_takes_the_option_again_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = DEIMv2.from_variant("atto", class_names=NAMES, image_size=(64, 64), num_queries=9)
    model.save_pretrained(tmp_path / "model")
    cv2.imwrite(str(tmp_path / "a.png"), np.full((40, 60, 3), 90, np.uint8))
    words = ["predict", str(tmp_path / "model"), "--source", str(tmp_path / "a.png"), "--threshold", "0"]
    for options, expected in (
        (["--classes", "0,2"], {"person", "dog"}),
        (["--classes", "cat, wild", "--classes", "traffic light"], {"cat, wild", "traffic light"}),
        (["--classes=7", "--classes", "8"], {"7", "y"}),
    ):
        capsys.readouterr()
        assert main([*words, *options, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {entry["category_name"] for entry in found} == expected
    assert main([*words, "--classes", "wolf"]) == 2
    assert "Unknown class 'wolf'" in capsys.readouterr().err


def test_other_names_for_a_detector_rename_its_classes(tmp_path: Path) -> None:
    model = DEIMv2.from_variant("atto", class_names=("rot", "gelb"), image_size=(64, 64), num_queries=9)
    model.save_pretrained(tmp_path)
    image = np.full((40, 60, 3), 90, np.uint8)
    found = Detector.from_pretrained(tmp_path, device="cpu", threshold=0)(image)
    # Another language in another order: the first name is still that of class 0.
    renamed = Detector.from_pretrained(tmp_path, class_names=("gelb", "rot"), device="cpu", threshold=0)
    assert renamed(image).class_id.tolist() == found.class_id.tolist()
    assert renamed.class_names == ("gelb", "rot")
