"""Runs that are made longer or shorter, and runs that stop early."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.detection_runs import DetectionRecipes, assert_same, forget_after, state_of
from tests.support.text_runs import TextRecipes, logged, weights, write_first_letters
from thawline.errors import ConfigError
from thawline.recipe import RunConfig
from thawline.run import evaluate, run, saved_config
from thawline.training.callbacks import Patience


@pytest.fixture
def text(tiny_llama: Path, tmp_path: Path) -> TextRecipes:
    return TextRecipes(tiny_llama, write_first_letters(tmp_path / "first.jsonl"), tmp_path / "runs")


@pytest.fixture
def detection(painted_set: Path, tmp_path: Path) -> DetectionRecipes:
    return DetectionRecipes(painted_set, tmp_path / "runs")


def changed(config: RunConfig, **training: Any) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def rates(folder: Path) -> dict[int, float]:
    return {row["step"]: row["learning_rate"] for row in logged(folder) if "learning_rate" in row}


def starts(folder: Path) -> list[dict]:
    return json.loads((folder / "env.json").read_text())


@pytest.mark.parametrize("length", [{"epochs": 6}, {"max_steps": 18}])
def test_a_finished_text_run_goes_on_at_the_rates_of_the_longer_one(text, length: dict, caplog) -> None:
    short = run(text("run", log_every=1))
    before = logged(short.folder)
    longer = text("run", log_every=1, **length)
    planned = run(longer, resume=True, dry_run=True)
    steps = json.loads((planned.folder / "plan.json").read_text())["overview"]["steps"]
    was = "training.epochs 4.0" if "epochs" in length else "training.max_steps None"
    assert steps.endswith(f"; a new stage of them from step 12 on (was: {was})")
    assert (short.folder / "result.json").is_file()
    with caplog.at_level("INFO"):
        result = run(longer, resume=True)
    assert "The rate goes from 0 to 0.0035 here." in caplog.text
    assert (result.status, result.steps) == ("finished", 18)
    assert logged(result.folder)[: len(before)] == before
    straight = run(text("straight", log_every=1, **length))
    expected = rates(straight.folder)
    assert {step: rate for step, rate in rates(result.folder).items() if step > 12} == {
        step: rate for step, rate in expected.items() if step > 12
    }
    assert starts(result.folder)[1]["from_step"] == 12
    name = "training.epochs" if "epochs" in length else "training.max_steps"
    assert list(starts(result.folder)[1]["changed"]) == [name]
    assert saved_config(result.folder).training == longer.training
    assert evaluate(result.folder).metrics == result.metrics
    # Once it has finished, so has the longer run.
    assert run(longer, resume=True) == result


def test_a_new_stage_that_is_killed_goes_on_to_the_same_bits(text) -> None:
    run(text("run", keep_checkpoints=9))
    whole = run(text("run", epochs=6, keep_checkpoints=9), resume=True).folder
    for step in (12, 16):  # before the new stage's first checkpoint, and after it
        copy = whole.with_name(f"killed-{step}")
        shutil.copytree(whole, copy)
        forget_after(copy, step=step)
        again = run(saved_config(copy), resume=True)
        assert_same(weights(again.folder), weights(whole))
        assert logged(again.folder) == logged(whole)


@pytest.mark.parametrize("epochs", [2, 3, 5])
def test_a_detector_stops_earlier_or_later_by_the_schedule_derived_for_that_length(
    detection, epochs: int
) -> None:
    folder = run(detection("run")).folder
    assert (folder / "checkpoint-6").is_dir()
    if epochs < 3:
        forget_after(folder, step=6)  # a run that stands at the end of its second epoch
    before = logged(folder)
    result = run(detection("run", epochs=epochs), resume=True)
    assert result.steps == 3 * epochs
    plan = json.loads((folder / "plan.json").read_text())
    if epochs == 3:
        assert "stage" not in plan
        return
    assert plan["stage"]["changed"] == {"training.epochs": [3, epochs]}
    assert plan["schedule"]["epochs"] == epochs
    if epochs == 5:
        assert logged(folder)[: len(before)] == before
        straight = rates(run(detection("straight", epochs=5)).folder)
        assert {s: r for s, r in rates(folder).items() if s > 9} == {
            s: r for s, r in straight.items() if s > 9
        }
        assert state_of(folder / "checkpoint-15")["scores"]["best_step"] > 0
    assert load_file(folder / "model" / "model.safetensors")


def test_less_than_is_done_is_refused(text, detection) -> None:
    folder = run(text("run")).folder
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    with pytest.raises(
        ConfigError, match=r"`training.epochs: 2.0` makes 6 steps, and the run has done 12. Give"
    ):
        run(text("run", epochs=2), resume=True)
    with pytest.raises(ConfigError, match=r"`training.max_steps: 3` makes 3 steps"):
        run(text("run", max_steps=3), resume=True)
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
    assert run(text("run", max_steps=12), resume=True).steps == 12
    run(detection("boxes"))
    with pytest.raises(ConfigError, match=r"`training.epochs: 1` makes 3 steps, and the run has done 9"):
        run(detection("boxes", epochs=1), resume=True)


def test_patience_counts_evaluations_since_the_best() -> None:
    def log(*values: float) -> list[dict]:
        rows = [{"step": 10 * (i + 1), "eval_AP": value} for i, value in enumerate(values)]
        return [
            row for pair in zip(rows, [{"step": 0, "loss": 1.0}] * len(rows), strict=True) for row in pair
        ]

    nan = float("nan")
    for values, n, smaller, since, over in [
        ((0.1, 0.2, 0.2, 0.1), 2, False, 0, True), ((0.1, 0.2, 0.2, 0.1), 3, False, 0, False),
        ((0.1, 0.2, 0.1, 0.3), 2, False, 0, False), ((0.3, 0.2, 0.1), 2, True, 0, False),
        ((0.1, 0.2, 0.3), 2, True, 0, True), ((0.5, 0.1, 0.2, 0.1), 2, False, 20, False),
        ((0.5, nan, nan), 2, False, 0, True), ((nan, 0.1), 1, False, 0, False), ((), 1, False, 0, False),
    ]:  # fmt: skip
        patience = Patience("AP", n, smaller_is_better=smaller)
        patience.since = since
        assert patience.is_over(log(*values)) is over, (values, n)
        assert bool(patience.stopped) is over
    patience = Patience("AP", 2, smaller_is_better=False)
    patience.is_over(log(0.1, 0.4, 0.2, 0.4))
    assert patience.stopped == "AP has not improved in 2 evaluations since step 20"


def test_a_text_run_stops_early_says_so_and_keeps_the_best(text, caplog) -> None:
    settings = {"best_metric": "loss", "patience": 2, "lr": 0.5, "epochs": 20}
    result = run(text("run", **settings))
    losses = {row["step"]: row["eval_loss"] for row in logged(result.folder) if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert result.steps == best + 8 < 60
    assert result.stopped == f"loss has not improved in 2 evaluations since step {best}"
    assert f"Stopping at step {result.steps}: {result.stopped}." in caplog.text
    assert json.loads((result.folder / "result.json").read_text())["stopped"] == result.stopped
    assert result.metrics["loss"] == pytest.approx(losses[best])
    assert run(text("run", **settings), resume=True) == result
    # Killed before its result was written, it takes no further step.
    (result.folder / "result.json").unlink()
    again = run(text("run", **settings), resume=True)
    assert (again.steps, again.stopped, again.metrics) == (result.steps, result.stopped, result.metrics)
    # A new patience begins a new stage, whose evaluations alone count.
    more = run(text("run", **{**settings, "patience": 3}), resume=True)
    assert more.steps >= result.steps + 12


def test_a_detector_stops_early_and_saves_a_checkpoint_there(detection, caplog) -> None:
    # A rate of next to nothing: no evaluation improves on the first.
    result = run(detection("run", epochs=9, patience=2, lr=1e-12, backbone_lr=1e-12, save_every="end"))
    assert (result.steps, result.stopped) == (9, "AP has not improved in 2 evaluations since step 3")
    assert (result.folder / "checkpoint-9" / "manifest.json").is_file()
    assert "Stopping at step 9: AP has not improved" in caplog.text


@pytest.mark.parametrize(
    "training",
    [{"patience": 2}, {"patience": 2, "best_metric": "loss", "eval_every": "end"}, {"patience": 0}],
)
def test_patience_needs_a_metric_and_evaluations(text, training: dict) -> None:
    with pytest.raises(ConfigError, match="training.patience"):
        text("run", **training)


def test_patience_needs_held_out_images(detection) -> None:
    config = detection("run", patience=2)
    data = dataclasses.replace(
        config.data, path=str(Path(config.data.path) / "instances_train.json"), eval_fraction=0
    )
    with pytest.raises(ConfigError, match="training.patience"):
        run(dataclasses.replace(config, data=data))
