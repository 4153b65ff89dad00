"""Rectangular inputs: `base.size: [height, width]` from the recipe to the boxes of a prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.support.detection_runs import DetectionRecipes, assert_same
from thawline.cli import main
from thawline.errors import ConfigError
from thawline.inference import Detector
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.variants import VARIANTS
from thawline.recipe import RunConfig
from thawline.run import evaluate, run, saved_config
from thawline.training.detection.schedule import derive_schedule
from thawline.training.objective import build_objective


@pytest.fixture
def recipe(painted_set: Path, tmp_path: Path) -> DetectionRecipes:
    return DetectionRecipes(painted_set, tmp_path / "runs")


@pytest.mark.parametrize("variant", ["atto", "s"])
def test_a_run_trains_evaluates_resumes_and_predicts_at_its_rectangle(
    recipe, variant: str, monkeypatch: pytest.MonkeyPatch, painted_set: Path
) -> None:
    seen = []
    forward = DEIMv2.forward

    def spy(self: DEIMv2, pixels: torch.Tensor, *args: object) -> object:
        seen.append((self.training, tuple(pixels.shape[-2:])))
        return forward(self, pixels, *args)

    monkeypatch.setattr(DEIMv2, "forward", spy)
    result = run(recipe(variant=variant, base={"size": [64, 160]}))
    trained = {size for is_training, size in seen if is_training}
    # S has batches of several sizes, all of one shape.
    assert trained == {(64, 160)} if variant == "atto" else (64, 160) in trained
    assert all(abs(width / height - 2.5) <= 0.5 for height, width in trained)
    assert {size for is_training, size in seen if not is_training} == {(64, 160)}
    for name in ("model", "best", "last"):
        assert DEIMv2.from_pretrained(result.folder / name).config.image_size == (64, 160)
    plan = json.loads((result.folder / "plan.json").read_text())
    assert plan["first_batch"]["pixel_values"]["shape"][-2:] == [64, 160]
    assert saved_config(result.folder).base.size == [64, 160]
    assert evaluate(result.folder).metrics == pytest.approx(result.metrics)
    seen.clear()
    detector = Detector.from_pretrained(result.folder, device="cpu", threshold=0.0)
    image = cv2.imread(str(painted_set / "6.png"))
    assert (detector(image).xyxy[:, [1, 3]] <= image.shape[0]).all()
    assert {size for _, size in seen} == {(64, 160)}


def test_equal_sides_are_the_square_bit_for_bit(recipe) -> None:
    folders = [
        run(recipe(name, base={"size": size})).folder
        for name, size in (("square", 64), ("rectangle", [64, 64]))
    ]
    states = [DEIMv2.from_pretrained(folder / "last").state_dict() for folder in folders]
    assert_same(*states)
    first, second = ([json.loads(x)["loss"] for x in (f / "metrics.jsonl").read_text().splitlines()
                      if "loss" in x and "eval_AP" not in x] for f in folders)  # fmt: skip
    assert first == second


def test_the_command_takes_the_size_as_a_list(recipe, tmp_path: Path, painted_set: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps(recipe().to_mapping()))
    words = ["train", "--config", str(config), "--name", "wide", "--training.max_steps", "1"]
    assert main([*words, "--base.size", "[64, 128]"]) == 0
    folder = tmp_path / "runs" / "wide"
    assert json.loads((folder / "model" / "config.json").read_text())["image_size"] == [64, 128]
    assert "size:\n  - 64\n  - 128" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    "size", [[100, 640], 300, [64], [64, 64, 64], "640x480", [0, 64], [64.0, 64], "wide"]
)
def test_sizes_that_cannot_be_are_refused_with_the_nearest_ones(size: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping({"objective": "detection", "data": "x", "base": {"size": size}})
    message = str(caught.value)
    assert "base.size" in message
    if size == [100, 640]:
        assert "multiples of 32" in message
        assert "Nearest: [96, 640] or [128, 640]." in message
    if size == 300:
        assert "Nearest: 288 or 320." in message


def test_a_network_names_the_sizes_it_takes() -> None:
    with pytest.raises(ConfigError, match=r"Nearest: \[64, 96\] or \[64, 128\]"):
        DEIMv2.from_variant("atto", image_size=(64, 100))
    with pytest.raises(ConfigError, match=r"`pixel_values=\[32, 40\]`.*Nearest: \[32, 32\] or \[32, 64\]"):
        DEIMv2.from_variant("atto")(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ConfigError, match=r"size=\(64, 100\)"):
        derive_schedule(3, variant="s", n_images=5, size=(64, 100))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_and_columns_keep_their_meaning_in_every_size(
    variant: str, painted_set: Path, tmp_path: Path
) -> None:
    def order(size: object, **overrides: object) -> str | None:
        base = {"variant": variant, "size": size, "overrides": {"decoder": {"num_layers": 1}, **overrides}}
        mapping = {"objective": "detection", "data": str(painted_set), "base": base}
        config = build_objective(RunConfig.from_mapping(mapping)).load_base().config
        assert config.image_size == ((64, 64) if size == 64 else (64, 96))
        return getattr(config.encoder, "position_order", None)

    if VARIANTS[variant].config.encoder.kind == "lite":
        assert order([64, 96]) is None
        return
    assert (order(64), order([64, 96])) == ("as_trained", "row_column")
    if variant == "n":
        assert order([64, 96], encoder={"position_order": "as_trained"}) == "as_trained"
        assert order([64, 96], position_order="as_trained") == "as_trained"


def test_the_limit_of_small_boxes_is_measured_at_the_rectangle(painted_set: Path, recipe) -> None:
    objective = build_objective(recipe(base={"size": [64, 256]}, objective={"min_box_size": None}))
    sides = [
        (record.boxes_xyxy[:, 2:] - record.boxes_xyxy[:, :2])
        / [record.width, record.height] * [256, 64]
        for record in objective.records
    ]  # fmt: skip
    smallest = np.quantile(np.concatenate(sides).min(axis=1), 0.05)
    assert objective.schedule.settings.min_box_size == max(1, min(12, int(smallest)))
    assert objective.schedule.settings.size == (64, 256)


def test_published_runs_take_a_rectangle_too(recipe) -> None:
    objective = build_objective(
        recipe(variant="s", base={"size": [64, 160]}, objective={"preset": "published"}, epochs=None)
    )
    settings = objective.schedule.settings
    assert (settings.published, settings.size) == (True, (64, 160))
    assert set(objective.collate.sizes) == {(32, 96), (64, 128), (64, 160), (64, 192)}
    assert replace(settings, size=[96, 96]).size == 96
