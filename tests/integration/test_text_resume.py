"""Text runs that crash or are interrupted go on as if they had never stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.support.text_runs import LORA, TextRecipes, logged, stop_at_batch, weights, write_first_letters
from thawline.errors import CheckpointError, ConfigError
from thawline.run import run
from thawline.training.checkpoints import newest_checkpoint, remove_half_written, seal_checkpoint


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_first_letters(tmp_path / "first.jsonl")


@pytest.fixture
def recipe(tiny_llama: Path, rows: str, tmp_path: Path) -> TextRecipes:
    return TextRecipes(tiny_llama, rows, tmp_path / "runs")


@pytest.mark.parametrize("tuner", [LORA, {"method": "paca", "r": 3}, "none"], ids=["lora", "paca", "none"])
def test_resuming_after_a_crash_equals_never_having_stopped(recipe, monkeypatch, tuner) -> None:
    straight = run(recipe("straight", tuner))

    def crash() -> None:
        raise RuntimeError("the machine went away")

    with monkeypatch.context() as patch:
        # In step 7: past the checkpoint at 4, and with step 6 logged already.
        stop_at_batch(patch, 9, crash)
        with pytest.raises(RuntimeError, match="went away"):
            run(recipe("crashed", tuner))
    with pytest.raises(CheckpointError, match="stands at checkpoint-4. Add --resume"):
        run(recipe("crashed", tuner))
    resumed = run(recipe("crashed", tuner), resume=True)
    assert resumed.metrics == straight.metrics
    assert logged(resumed.folder) == logged(straight.folder)
    for name, value in weights(straight.folder).items():
        assert torch.equal(weights(resumed.folder)[name], value), name
    assert len(json.loads((resumed.folder / "env.json").read_text())) == 2


def test_ctrl_c_ends_after_the_step_with_a_checkpoint_to_go_on_from(recipe, monkeypatch) -> None:
    # A shell's background job starts with SIGINT ignored; a terminal's, which this is about, does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    straight = run(recipe("straight"))
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 7, lambda: signal.raise_signal(signal.SIGINT))
        stopped = run(recipe("stopped"))
    assert (stopped.status, stopped.steps, stopped.signal) == ("interrupted", 5, signal.SIGINT)
    assert (stopped.folder / "checkpoint-5").is_dir()
    assert not (stopped.folder / "result.json").exists()
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    resumed = run(recipe("stopped"), resume=True)
    assert resumed.metrics == straight.metrics
    for name, value in weights(straight.folder).items():
        assert torch.equal(weights(resumed.folder)[name], value), name


def test_a_torn_checkpoint_is_passed_over_and_removed(tmp_path: Path) -> None:
    for step, state in ((8, "{}"), (12, '{"global_step": 1'), (16, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    seal_checkpoint(tmp_path / "checkpoint-8")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    remove_half_written(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_a_resumed_run_must_be_the_same_run(recipe, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(recipe("same")).status == "interrupted"
    with pytest.raises(ConfigError, match=r"has training.lr=0.01, not 0.02: resuming must not change it"):
        run(recipe("same", lr=2e-2), resume=True)
    with pytest.raises(CheckpointError, match=r"Nothing to resume: .*Available: same. Did you mean 'same'"):
        run(recipe("sane"), resume=True)
    assert run(recipe("same", keep_checkpoints=1), resume=True).status == "finished"
