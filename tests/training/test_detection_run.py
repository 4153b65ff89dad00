"""Training detectors, start to end: folders, tuners on the backbone, the two stages."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.detection_runs import (
    NAMES,
    TINY,
    TINY_VIT,
    DetectionRecipes,
    assert_same,
    forget_after,
    state_of,
)
from tests.support.text_runs import strict_json
from thawline.cli import main
from thawline.domains.attach import merged_detector
from thawline.errors import ConfigError, DataError
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.published import PUBLISHED
from thawline.recipe import Lora, Paca, RunConfig
from thawline.recipe.resolved import TrainingSettings, Window
from thawline.run import evaluate, run, saved_config
from thawline.training.detection import evaluation
from thawline.training.detection import schedule as schedules
from thawline.training.detection.backbone import tune_backbone
from thawline.training.detection.trainer import DetectionTrainer
from thawline.training.objective import build_objective


@pytest.fixture
def recipe(painted_set: Path, tmp_path: Path) -> DetectionRecipes:
    return DetectionRecipes(painted_set, tmp_path / "runs")


def test_a_run_leaves_detectors_ready_to_use_and_says_how_good_they_are(
    recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(recipe())
    folder = result.folder
    assert (result.status, result.steps) == ("finished", 9)
    assert {"AP", "AP50", "AR100"} <= set(result.metrics)
    assert set(result.parts) == set(NAMES)
    for name in ("model", "best", "last"):
        detector = DEIMv2.from_pretrained(folder / name)
        assert detector.config.class_names == NAMES
        assert detector.config.image_size == (64, 64)
    # A run's folder stands for the detector in it, also as what the next run starts from.
    assert_same(
        DEIMv2.from_pretrained(folder).state_dict(), DEIMv2.from_pretrained(folder / "model").state_dict()
    )
    assert build_objective(recipe(base={"weights": str(folder)})).start == "detector"
    for name in ("plan.json", "detection_metrics.json", "pictures/training.png", "pictures/worst.png"):
        assert (folder / name).is_file(), name
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["6.png", "7.png"]
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    terms = [row for row in logged if "loss" in row]
    assert len(terms) == 9
    for row in terms:
        assert sum(value for name, value in row.items() if name.startswith("loss_")) == pytest.approx(
            row["loss"], rel=1e-4
        )
    # What is evaluated later is the detector the run ended with.
    assert evaluate(folder).metrics == pytest.approx(result.metrics)
    capsys.readouterr()
    assert main(["eval", str(folder), "--data", str(saved_config(folder).data.path)]) == 0
    assert "Left out" not in "".join(capsys.readouterr())  # a field of text's data, for one
    (evaluated,) = folder.glob("eval-*")
    for name in ("detection_metrics.json", "predictions.jsonl", "pictures/worst.png", "report.html"):
        assert (evaluated / name).is_file(), name
    assert (evaluated / "detection_metrics.json").read_bytes() == (
        folder / "detection_metrics.json"
    ).read_bytes()
    source = str(next((folder / "pictures").glob("*.png")))
    assert (
        main(["predict", str(folder), "--source", source, "--threshold", "0", "--max_detections", "1"]) == 0
    )


@pytest.mark.parametrize("eval_every", ["epoch", "end"])
@pytest.mark.parametrize("trained", [0.25, 0.5])
def test_a_run_keeps_the_better_of_averaged_and_trained_weights_and_says_which(
    recipe, monkeypatch: pytest.MonkeyPatch, eval_every: str, trained: float
) -> None:
    monkeypatch.setattr(
        DetectionTrainer, "_score", lambda trainer: trained if trainer.average is None else 0.375
    )
    result = run(recipe(eval_every=eval_every))
    state = torch.load(result.folder / "checkpoint-9/pytorch_model.bin", weights_only=True)
    average = torch.load(result.folder / "checkpoint-9/average.pt", weights_only=True)["tensors"]
    name = next(name for name in average if name.endswith("conv.weight"))
    kept = state if trained > 0.375 else average
    last = DEIMv2.from_pretrained(result.folder / "last").state_dict()
    assert torch.equal(last[name.removeprefix("detector.")], kept[name])
    said = {0.25: "0.375 after the last epoch, 3 (averaged weights; 0.250 as trained)",
            0.5: "0.500 after the last epoch, 3 (weights as trained; 0.375 averaged)"}  # fmt: skip
    assert result.ending.startswith(f"AP {said[trained]}")
    if trained > 0.375 or eval_every == "end":
        assert result.ending == f"AP {said[trained]}"
        assert_same(DEIMv2.from_pretrained(result.folder / "model").state_dict(), last)
    else:
        assert result.ending.endswith("; the best, which is kept, is 0.375 after epoch 1, 0.000 above")


def test_a_dry_run_plans_and_takes_no_step(recipe) -> None:
    result = run(recipe(), dry_run=True)
    assert result.status == "planned"
    assert [path.name for path in result.folder.iterdir()] == ["plan.json"]
    plan = json.loads((result.folder / "plan.json").read_text())
    assert (plan["steps"], plan["rows_a_step"]) == (9, 2)
    assert plan["schedule"]["windows"]["strong"] == [0, 2]
    assert plan["parameter_groups"][0]["name"] == "backbone"
    assert sum(group["parameters"] for group in plan["parameter_groups"]) == plan["trainable_parameters"]
    assert plan["first_batch"]["pixel_values"]["shape"] == [2, 3, 64, 64]
    assert set(plan["first_batch"]["boxes"]["by_class"]) <= set(NAMES)


@pytest.mark.parametrize(
    ("variant", "tuner"),
    [("atto", "frozen"), ("s", "frozen"), ("atto", "lora"), ("s", "lora"), ("atto", "paca"), ("s", "paca")],
)
def test_a_tuner_on_the_backbone_trains_resumes_and_merges_into_a_plain_detector(
    recipe, tmp_path: Path, variant: str, tuner: str
) -> None:
    start = tmp_path / "start"
    overrides = {**(TINY_VIT if variant == "s" else TINY), "class_names": NAMES}
    before = DEIMv2.from_variant(variant, **overrides)
    before.save_pretrained(start)
    # r = 4: more than the three colours that the first convolution could choose from.
    method = {"method": tuner} if tuner == "frozen" else {"method": tuner, "r": 4}
    config = recipe(
        variant=variant,
        base={"weights": str(start), "overrides": {}},
        tuner=method,
        max_steps=2,
        save_every=1,
        eval_every="end",
    )
    result = run(config)
    shutil.copytree(result.folder, result.folder.with_name("resumed"))
    forget_after(result.folder.with_name("resumed"), step=1)
    resumed = run(saved_config(result.folder.with_name("resumed")), resume=True).folder
    assert_same(*(state_of(folder / "checkpoint-2") for folder in (resumed, result.folder)))
    after = DEIMv2.from_pretrained(result.folder / "model")
    part = "backbone.dinov3." if variant == "s" else "backbone."
    changed = {
        name
        for name, value in before.state_dict().items()
        if not torch.equal(value, after.state_dict()[name])
    }
    assert changed - {name for name in changed if name.startswith("backbone.")}
    inside = {name for name in changed if name.startswith(part) and "weight" in name}
    assert bool(inside) == (tuner != "frozen")
    if variant == "s":
        assert any(name.startswith("backbone.sta.") for name in changed)
    if tuner == "frozen":
        assert not {name for name in changed if name.startswith(part)}  # batch statistics neither


@pytest.mark.parametrize("tuner", [None, Lora(method="lora", r=4), Paca(method="paca", r=4)])
def test_a_detector_is_evaluated_in_its_fused_form_unless_adapters_are_inside(
    recipe, monkeypatch: pytest.MonkeyPatch, tuner: Lora | Paca | None
) -> None:
    objective, forms = build_objective(recipe()), []
    model = objective.build_model()
    if tuner is not None:
        tune_backbone(model, tuner)
    model.register_forward_hook(lambda network, *_: forms.append(network.is_fused))
    metrics, found = objective.measure(model, 2)
    assert forms == [tuner is None]
    monkeypatch.setattr(evaluation, "_inference_form", lambda network: network)
    metrics_as_trained, found_as_trained = objective.measure(model, 2)
    assert forms[1:] == [False]
    assert metrics.statistics == pytest.approx(metrics_as_trained.statistics, nan_ok=True)
    # Sums in another order: the last bits of a float32.
    assert found.detections(0).scores == pytest.approx(found_as_trained.detections(0).scores, abs=1e-6)


def test_a_diverged_detector_is_evaluated_as_it_is(recipe) -> None:
    objective = build_objective(recipe())
    model = objective.build_model()
    next(model.parameters()).data[0] = torch.nan  # which a fused activation would make a number of
    with pytest.raises(DataError, match="has diverged"):
        objective.measure(model, 2)


def test_a_frozen_backbone_of_random_weights_is_refused(recipe) -> None:
    with pytest.raises(ConfigError, match="frozen.*random weights.*base.weights"):
        run(recipe(tuner="frozen"))


def test_the_published_run_starts_stage_2_from_the_best_of_stage_1(
    recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(
        PUBLISHED["atto"], epochs=4, stop_epoch=2, flat_epoch=1, no_aug_epochs=2, warmup_steps=2,
        strong_epochs=Window(0, 2), mosaic_epochs=Window(0, 1), matcher_change_epoch=3, ema_warmup_steps=2,
    )  # fmt: skip
    monkeypatch.setitem(schedules.PUBLISHED, "atto", short)
    config = recipe(objective={"preset": "published"}, epochs=None, keep_checkpoints=9)
    objective = build_objective(config)
    trainer = objective.build_trainer(objective.build_model())
    loaded = []
    monkeypatch.setattr(trainer, "_load_stage_1", lambda: loaded.append(trainer.epoch))
    monkeypatch.setattr(trainer, "_score", lambda *_: [0.1, 0.3, 0.2, 0.1][trainer.epoch - 1])
    trainer.train()
    # Stage 2 begins at epoch 2; its first epoch beats nothing, so the next begins there too.
    assert loaded == [2, 3]
    assert trainer.scores.best == 0.3
    assert [group["lr"] for group in trainer.optimizer.param_groups] == trainer.schedule.lr_at(12)
    saved = torch.load(trainer.folder / "stage_1.pt", weights_only=True)
    assert_same(saved["model"], torch.load(trainer.folder / "checkpoint-6/pytorch_model.bin"))
    assert_same(saved["average"], torch.load(trainer.folder / "checkpoint-6/average.pt"))


def test_going_back_to_stage_1_restores_everything_but_the_rate(
    recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(
        PUBLISHED["atto"],
        epochs=3,
        stop_epoch=1,
        flat_epoch=1,
        no_aug_epochs=1,
        strong_epochs=Window(0, 1),
        mosaic_epochs=Window(0, 1),
        warmup_steps=2,
    )
    monkeypatch.setitem(schedules.PUBLISHED, "atto", short)
    config = recipe(objective={"preset": "published"}, epochs=None, max_steps=6)
    objective = build_objective(config)
    trainer = objective.build_trainer(objective.build_model())
    trainer.train()
    saved = torch.load(trainer.folder / "stage_1.pt", weights_only=True)
    trainer._load_stage_1()
    assert_same(trainer.model.state_dict(), saved["model"])
    assert trainer.average.state_dict()["n_updates"] == saved["average"]["n_updates"] == 3
    assert trainer.optimizer.param_groups[-1]["lr"] == trainer.schedule.lr_at(6)[-1]


def test_switches_take_augmentation_away(recipe) -> None:
    def settings_of(**objective: object) -> TrainingSettings:
        built = build_objective(recipe(variant="s", objective=objective, epochs=100))
        return built.schedule.settings

    settings = settings_of()
    assert settings.mosaic_epochs.covers(10)
    assert settings.mixup_epochs.stop > settings.mixup_epochs.start
    assert settings.multi_scale_epochs.stop > 0
    settings = settings_of(dense_o2o=False, multi_scale=False)
    assert not any(map(settings.mosaic_epochs.covers, range(100)))
    assert settings.strong_epochs.covers(10)
    assert settings.mixup_epochs == settings.copyblend_epochs == (0, 0)
    assert settings.multi_scale_epochs == (0, 0)
    settings = settings_of(strong_augmentation=False)
    assert not any(map(settings.strong_epochs.covers, range(100)))


@pytest.mark.parametrize(
    "objective", [{"strong_augmentation": True}, {"mosaic_prob": 0.1}, {"colour_prob": 0.2}]
)
def test_a_short_run_has_strong_augmentation_where_the_recipe_asks_for_it(recipe, objective) -> None:
    def of(objective: dict) -> tuple[bool, dict[str, str]]:
        schedule = build_objective(recipe(objective={"strong_augmentation": None, **objective})).schedule
        return schedule.settings.strong_epochs.covers(1), schedule.reasons

    assert of({}) == (False, of({"colour_prob": 0.0})[1])
    has_strong, reasons = of(objective)
    assert has_strong
    assert "left out" not in reasons["epochs"]
    assert "left out" in of({})[1]["epochs"]


def test_a_run_that_is_made_longer_keeps_its_batches(recipe) -> None:
    config = recipe(epochs=500, batch_size=None)
    assert build_objective(config).schedule.settings.batch_size == 4
    # The rule of images and steps never gives 3.
    (config.run_folder / "checkpoint-2").mkdir(parents=True)
    (config.run_folder / "plan.json").write_text('{"rows_a_step": 3}')
    assert build_objective(config).schedule.settings.batch_size == 3


def test_a_rate_that_is_given_follows_from_no_rule(recipe) -> None:
    assert "rates" in build_objective(recipe()).schedule.reasons
    assert "rates" not in build_objective(recipe(lr=0.5)).schedule.reasons


def test_values_of_the_recipe_reach_the_settings_by_name(recipe) -> None:
    objective = {"mosaic_prob": 0.1, "colour_prob": 0.2, "vertical_flip_prob": 0.3, "min_box_size": 4}
    training = {"lr": 0.5, "backbone_lr": 0.25, "weight_decay": 0.125, "max_grad_norm": 3.0}
    config = recipe(objective={**objective, "merged_mosaic": True}, **training)
    settings = build_objective(config).schedule.settings
    for name, value in {**objective, **training, "merged_mosaic": True, "size": 64, "batch_size": 2}.items():
        assert getattr(settings, name) == value, name


@pytest.mark.parametrize(("variant", "tuner"), [("atto", "none"), ("s", "paca")])
def test_norms_of_several_gpus_change_neither_names_nor_numbers(
    recipe, tmp_path: Path, variant, tuner
) -> None:
    network = TINY_VIT if variant == "s" else TINY
    DEIMv2.from_variant(variant, **network, class_names=NAMES).save_pretrained(tmp_path / "start")
    method = {"method": tuner} if tuner == "none" else {"method": tuner, "r": 4}
    config = recipe(variant=variant, base={"weights": str(tmp_path / "start"), "overrides": {}}, tuner=method)
    objective = build_objective(config)
    alone, together = (objective.build_model() for _ in range(2))
    together = nn.SyncBatchNorm.convert_sync_batchnorm(together)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in together.modules())
    assert list(together.state_dict()) == list(alone.state_dict())
    pixels = torch.rand(2, 3, 64, 64)
    # Without a group of processes they take the statistics of what is here.
    maps = [model.train().backbone(pixels) for model in (together, alone)]
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in merged_detector(together).modules())


def test_where_nothing_is_held_out_a_share_of_the_images_is(
    recipe, painted_set: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(painted_set, alone)
    (alone / "instances_val.json").unlink()
    config = recipe()
    objective = build_objective(
        replace(config, data=replace(config.data, path=str(alone), eval_fraction=0.3))
    )
    assert (len(objective.train_rows), len(objective.held_out_rows)) == (4, 2)


def test_evaluating_on_other_classes_is_refused(recipe, painted_set: Path) -> None:
    described = {"class_names": ["red", "green", "violet"]}
    with pytest.raises(DataError, match="trained on red, green, violet"):
        build_objective(recipe(), read="held-out", described=described)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"preset": "published"}}, "epochs=3.*published run of 'atto' has 500"),
        ({"objective": {"preset": "published"}, "epochs": None, "eval_every": 2}, "once an epoch"),
        ({"gradient_accumulation": 3}, "batch_size=2.*multiple of 3"),
        ({"best_metric": "AP51"}, "best_metric: AP51.*Available: AP, AP50"),
        ({"base": {"size": 100}}, "base.size=100`: sides must be multiples of 32"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_step_1(recipe, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(recipe(**changes))


def test_losses_that_are_not_finite_end_the_run_or_are_said(recipe, caplog) -> None:
    broken = {"lr": 1e18, "max_grad_norm": 0, "eval_every": "end"}
    config = recipe(**broken)
    with pytest.raises(ConfigError, match=r"the loss was nan at step \d \(epoch .*training.lr"):
        run(config)
    assert not list(config.run_folder.glob("checkpoint-*"))
    caplog.clear()
    config = recipe("on", **broken, on_broken_loss="warn")
    with pytest.raises(DataError, match="Detections contain NaN or infinity"):
        run(config)
    assert caplog.text.count("the loss was nan at step") == 1
    rows = strict_json(config.run_folder / "metrics.jsonl")
    assert None in [row["loss"] for row in rows]
    assert rows[-1]["step"] == 9


def test_the_published_scores_of_s_start_again_where_its_log_does(shared: Path) -> None:
    from thawline.training.detection.scores import Scores

    logs = json.loads((shared / "fixtures/deimv2/published_runs.json").read_text())["dinov3_s"]
    scores, losses = Scores(), logs["epoch_mean_loss"]
    # Three decimals leave open which of two equal epochs is better.
    behind_the_decimals = {122: 1e-4, 127: -1e-4, 131: -1e-4}
    again = []
    for epoch in range(132):
        score = logs["coco_ap"][str(epoch)] + behind_the_decimals.get(epoch, 0)
        scores.note(score, step=epoch, is_stage_2=epoch >= 120)
        if scores.start_again:
            again.append(epoch + 1)
    # Training from stage 1's weights shows in the loss, which jumps up.
    jumps = [e for e in range(121, 132) if losses[str(e)] > losses[str(e - 1)] + 0.3]
    assert [epoch for epoch in again if epoch < 132] == jumps == [124, 128]
    assert scores.best_step == logs["best_stat"]["epoch"]


def test_images_with_rare_classes_come_several_times_an_epoch_and_resuming_repeats_it(
    recipe, tmp_path
) -> None:
    data = shutil.copytree(recipe.data, tmp_path / "rare")
    content = json.loads((data / "instances_train.json").read_text())
    # Every image shows all three classes; blue (30) is kept in the first image alone.
    content["annotations"] = [
        a for a in content["annotations"] if a["category_id"] < 30 or a["image_id"] == 0
    ]
    (data / "instances_train.json").write_text(json.dumps(content))

    def config(name: str) -> RunConfig:
        plain = recipe(name, save_every=4, keep_checkpoints=9)
        sampled = replace(plain.data, path=str(data), sampling="repeat", sampling_threshold=1.0)
        return replace(plain, data=sampled)

    straight = run(config("straight"))
    # √(1 / (1/6)) = 2.45 times the first image, once the five others: 7 draws, of which 6 make 3 steps.
    plan = json.loads((straight.folder / "plan.json").read_text())
    assert plan["sampling"] == {"draws": 7, "images": 6, "repeats": {"blue": 2.449}}
    assert "; an epoch draws 7 of 6 images (blue × 2.4)" in plan["overview"]["steps"]
    assert plan["rows"]["train"] == 6
    assert straight.steps == 9
    resumed = straight.folder.with_name("resumed")
    shutil.copytree(straight.folder, resumed)
    forget_after(resumed, step=4)
    run(saved_config(resumed), resume=True)
    assert_same(state_of(resumed / "checkpoint-9"), state_of(straight.folder / "checkpoint-9"))


def test_a_threshold_of_sampling_is_a_share(recipe) -> None:
    with pytest.raises(ConfigError, match=r"`data.sampling_threshold` must be a share of the images.*got 5"):
        replace(recipe().data, sampling="repeat", sampling_threshold=5)


def test_a_run_applies_an_augmentation_of_ones_own_and_evaluating_does_not_import_it(
    recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "dark_images.py"
    module.write_text("def dark(sample, rng):\n    sample.image = sample.image // 2\n    return sample\n")
    plain = {"strong_augmentation": False}
    config = recipe(objective={**plain, "augmentation": "dark_images:dark"}, epochs=1)
    bright, dark = (
        build_objective(c).first_batch()["pixel_values"] for c in (recipe(objective=plain, epochs=1), config)
    )
    assert torch.equal(dark, bright // 2)
    folder = run(config).folder
    module.write_text("raise RuntimeError('imported')")
    monkeypatch.delitem(sys.modules, "dark_images")
    assert evaluate(folder).metrics
    with pytest.raises(ConfigError, match="cannot import 'dark_images:dark': RuntimeError: imported"):
        build_objective(config).first_batch()


def cut(best: Path) -> None:
    weights = best / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def test_a_run_whose_best_detector_is_lost_resumes_and_keeps_the_best_of_what_follows(recipe, caplog) -> None:
    whole = run(recipe()).folder
    before_last, last = sorted(int(one.name.split("-")[1]) for one in whole.glob("checkpoint-*"))
    for damage in (shutil.rmtree, cut, lambda best: (best / "config.json").write_text("{")):
        copy = whole.with_name("damaged")
        shutil.copytree(whole, copy)
        forget_after(copy, step=before_last)
        damage(copy / "best")
        caplog.clear()
        result = run(saved_config(copy), resume=True)
        assert "The run's best detector is lost" in caplog.text
        assert result.steps == last
        found, kept = (DEIMv2.from_pretrained(copy / name).state_dict() for name in ("model", "last"))
        assert_same(found, kept)
        shutil.rmtree(copy)
