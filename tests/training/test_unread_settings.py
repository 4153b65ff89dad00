"""Settings of a detector's recipe that nothing would read are refused, with the place where they belong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.support.detection_runs import DetectionRecipes
from thawline.errors import ConfigError
from thawline.jobs import evaluation_recipe
from thawline.models.deimv2.model import DEIMv2
from thawline.recipe import RunConfig
from thawline.training.objective import build_objective


@pytest.fixture
def recipe(painted_set: Path, tmp_path: Path) -> DetectionRecipes:
    return DetectionRecipes(painted_set, tmp_path / "runs")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": [64, 128]}, "`image_size`: `base.size` does"),
        ({"num_classes": 3}, "`num_classes`: the classes of the data do"),
        ({"class_names": ["a"]}, "`class_names`: the classes of the data do"),
        ({"variant": "s"}, "`variant`: `base.variant` does"),
        ({"class_loss": "vfl"}, "`class_loss`: `objective.class_loss` does"),
        ({"criterion": {"class_loss": "vfl"}}, "`class_loss`: `objective.class_loss` does"),
        (
            {"criterion": {"gamma": 2, "matcher_change_epoch": 3}},
            "`matcher_change_epoch`: `training.epochs` does",
        ),
    ],
)
def test_overrides_that_other_fields_decide(overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"`base.overrides` cannot set {message}"):
        RunConfig.from_mapping({"objective": "detection", "data": "x", "base": {"overrides": overrides}})


@pytest.mark.parametrize("spelling", [{"gamma": 2.5}, {"criterion": {"gamma": 2.5}}])
def test_overrides_of_the_criterion_stand_beside_what_the_recipe_sets(recipe, spelling: dict) -> None:
    config = build_objective(
        recipe(base={"overrides": spelling}, objective={"class_loss": "focal"})
    ).load_base().config.criterion  # fmt: skip
    assert (config.gamma, config.class_loss) == (2.5, "focal")


@pytest.mark.parametrize(
    ("variant", "overrides", "message"),
    [
        ("atto", {"fgl_weight": 0.3}, "`fgl_weight=0.3`: nothing reads it, since `local=False`"),
        ("n", {"local": False, "criterion": {"ddf_weight": 2.0}}, "`ddf_weight=2.0`: nothing reads it"),
        ("n", {"num_denoising": 0, "box_noise": 0.5}, "`box_noise=0.5`: .*`num_denoising=0`"),
        ("n", {"rope_rescale": 2.0}, "'n' has no setting 'rope_rescale'"),
        ("pico", {"position_order": "row_column"}, "no setting 'position_order'"),
    ],
)
def test_settings_of_a_part_that_is_off_or_absent(variant: str, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DEIMv2.from_variant(variant, **overrides)
    DEIMv2.from_variant("n", num_denoising=0, label_noise=0.5)  # the value that it has anyway


@pytest.mark.parametrize(
    ("variant", "objective", "message"),
    [
        ("atto", {"mixup_prob": 0.5}, "mixup_prob=0.5`: .*'atto' is trained without it"),
        ("pico", {"copyblend_prob": 0.5}, "copyblend_prob=0.5`: .*'pico' is trained without it"),
        ("n", {"mixup_prob": 0.5, "dense_o2o": False}, "mixup_prob=0.5`: .*`objective.dense_o2o` is off"),
        ("n", {"mosaic_prob": 0.3, "strong_augmentation": False}, "mosaic_prob.*strong_augmentation` is off"),
        ("n", {"merged_mosaic": True, "dense_o2o": False}, "merged_mosaic=True"),
        ("n", {"colour_prob": 0.2, "strong_augmentation": False}, "colour_prob=0.2"),
        ("n", {"mixup_prob": 0.5}, None),
        ("n", {"mixup_prob": 0.0, "dense_o2o": False}, None),
        ("atto", {"mosaic_prob": 0.5}, None),
        ("atto", {"colour_prob": 0.0, "dense_o2o": False}, None),
        ("atto", {"colour_prob": 0.2, "dense_o2o": False}, None),
    ],
)
def test_settings_of_augmentation_without_effect(
    recipe, variant: str, objective: dict, message: str | None
) -> None:
    built = build_objective(recipe(variant=variant, base={"overrides": {}}, objective=objective))
    if message is None:
        assert built.schedule
        return
    with pytest.raises(ConfigError, match=message):
        assert built.schedule


def test_lean_where_the_network_has_nothing_for_it(recipe) -> None:
    with pytest.raises(ConfigError, match="`lean`: '.*' has nothing that can be lean. Leave it out"):
        build_objective(dataclasses.replace(recipe(), lean=True)).build_model()


@pytest.mark.parametrize(
    "overrides",
    [
        {"base.weights": "other.pth"},
        {"base": {"variant": "s"}},
        {"base.overrides.num_queries": 9},
        {"tuner": "lora"},
    ],
)
def test_an_evaluation_refuses_what_only_training_reads(
    overrides: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.from_mapping({"objective": "detection", "data": "x"})
    monkeypatch.setattr("thawline.run.saved_config", lambda model: config)
    with pytest.raises(ConfigError, match="is evaluated as it was trained"):
        evaluation_recipe("runs/x", "", overrides)
    kept = evaluation_recipe("runs/x", "", {"base.size": 64, "data": "y", "training.eval_batch_size": 2})
    assert (kept.base.size, kept.data.path, kept.training.eval_batch_size) == (64, "y", 2)
