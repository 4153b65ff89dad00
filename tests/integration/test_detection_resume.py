"""Detection runs that stop or are killed go on to the same bits and leave whole files."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.detection_runs import DetectionRecipes, assert_same, forget_after, state_of
from thawline.recipe import RunConfig
from thawline.run import run, saved_config


@pytest.fixture
def recipe(painted_set: Path, tmp_path: Path) -> DetectionRecipes:
    return DetectionRecipes(painted_set, tmp_path / "runs")


# Amid an epoch; at its end; at its end, just before its evaluation.
@pytest.mark.parametrize(("step", "eval_every"), [(2, 4), (3, 4), (3, "epoch")])
def test_resuming_equals_never_having_stopped_bit_for_bit(recipe, step: int, eval_every: object) -> None:
    straight = run(
        recipe("straight", save_every=step, eval_every=eval_every, keep_checkpoints=9, max_steps=6)
    ).folder
    resumed = straight.with_name("resumed")
    shutil.copytree(straight, resumed)
    forget_after(resumed, step=step)
    run(saved_config(resumed), resume=True)
    for later in range(2 * step, 7, step):
        assert_same(state_of(resumed / f"checkpoint-{later}"), state_of(straight / f"checkpoint-{later}"))
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (resumed, straight)]
    for row, expected in zip(*(map(json.loads, lines[i]) for i in (0, 1)), strict=True):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}


@contextmanager
def at_every_write(moment: Callable[[], None]) -> Iterator[None]:
    """Call `moment` before every file or folder that appears, moves or goes, and amid every torch.save."""
    with pytest.MonkeyPatch.context() as patch:

        def before(owner: Any, name: str) -> None:
            call = getattr(owner, name)

            def hooked(*args: Any, **kwargs: Any) -> Any:
                moment()
                return call(*args, **kwargs)

            patch.setattr(owner, name, hooked)

        def save(what: Any, file: str | Path, *args: Any, **kwargs: Any) -> None:
            whole = io.BytesIO()
            torch_save(what, whole, *args, **kwargs)
            with open(file, "wb") as out:
                out.write(whole.getvalue()[: len(whole.getvalue()) // 2])
                out.flush()
                moment()
                out.write(whole.getvalue()[len(whole.getvalue()) // 2 :])

        torch_save = torch.save
        patch.setattr(torch, "save", save)
        for owner, names in (
            (Path, ("replace", "rename", "rmdir", "write_text")),
            (shutil, ("rmtree", "copytree")),
        ):
            for name in names:
                before(owner, name)
        yield


def whole_detectors(folder: Path) -> set[str]:
    """Names of the detectors that lie in a run's folder; each can be read."""
    there = {name for name in ("best", "last", "model") if (folder / name).is_dir()}
    for name in there:
        json.loads((folder / name / "config.json").read_text())
        assert load_file(folder / name / "model.safetensors")
    return there


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits_and_leaves_whole_files(recipe) -> None:
    def again(name: str) -> RunConfig:
        return recipe(name, save_every=2, eval_every=2, max_steps=4, keep_checkpoints=9)

    moments: list[set[str]] = [set()]

    def look() -> None:
        moments.append(whole_detectors(again("straight").run_folder))
        assert moments[-2] <= moments[-1], "a detector went away"

    with at_every_write(look):
        straight = run(again("straight")).folder
    for part in (0.55, 0.9):  # amid the last checkpoint, after it
        killed = again(f"killed-{part}")
        child = os.fork()
        if child == 0:
            left = iter(range(round(part * len(moments)), -1, -1))
            with at_every_write(lambda left=left: next(left) or os.kill(os.getpid(), signal.SIGKILL)):
                run(killed)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        whole_detectors(killed.run_folder)
        resumed = run(saved_config(killed.run_folder), resume=True).folder
        for step in (2, 4):
            assert_same(state_of(resumed / f"checkpoint-{step}"), state_of(straight / f"checkpoint-{step}"))
        for name in ("best", "last", "model"):
            theirs, ours = (load_file(path / name / "model.safetensors") for path in (straight, resumed))
            assert_same(theirs, ours, name)
