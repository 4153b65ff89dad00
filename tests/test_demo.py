"""The demo's parts run from end to end, and what they tell to type next fits what they made."""

from __future__ import annotations

import random
import re
import shlex
from pathlib import Path

import pytest

from thawline.cli import main
from thawline.demo import PARTS, run_demo, shapes, skills
from thawline.demo.toy_tasks import REWRITES, make_rewrites
from thawline.errors import ConfigError
from thawline.run import RunResult


def next_commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.partition("Next:\n")[2].splitlines() if line.strip()]


def test_skills_compares_on_seen_and_unseen_tasks_and_says_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("N_TRAIN", 40), ("N_TEST", 4)):
        monkeypatch.setattr(skills, name, value)
    text = skills.run(tmp_path / "skills", pretraining_steps=5, steps=2, adaptation_steps=1)
    lines = text.splitlines()
    assert lines[0].split() == ["six", "tasks", "at", "once", *skills.UNSEEN, "trained", "for", "these"]
    assert [line.split()[0] for line in lines[1:5]] == ["lora", "poly", "mhr", "mhr-z"]
    assert set(skills.UNSEEN) < set(REWRITES)
    assert len(skills.SEEN) == 6
    for half in {half for task in skills.UNSEEN for half in task.split("-")}:
        assert any(half in task.split("-") for task in skills.SEEN)
    program, *arguments = next_commands(text)[0]  # the others are verbs with tests of their own
    assert program == "thawline"
    assert main(arguments) == 0
    assert capsys.readouterr().out
    for _, *arguments in next_commands(text):
        for path in re.findall(rf"{re.escape(str(tmp_path))}\S+", " ".join(arguments)):
            assert Path(path).exists()


def test_shapes_learns_evaluates_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_processors", lambda: 1)
    for name, value in (("N_TRAIN", 12), ("N_VAL", 4), ("SIZE", 64)):
        monkeypatch.setattr(shapes, name, value)
    text = shapes.run(tmp_path / "shapes", epochs=2)
    lines = text.splitlines()
    assert lines[0].split() == ["class", "boxes", "AP", "AP50", "precision", "recall"]
    assert [line.split()[0] for line in lines[1:5]] == ["circle", "square", "triangle", "all"]
    for path in re.findall(r"^(?:Pictures|Report): +(\S+)", text, re.MULTILINE):
        assert Path(path).stat().st_size > 0
    assert len(next_commands(text)) == 3


def test_ctrl_c_in_a_run_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = RunResult(folder=tmp_path, status="interrupted", trainable=1)
    monkeypatch.setattr(shapes, "run_recipe", lambda config: stopped)
    monkeypatch.setattr(shapes, "N_TRAIN", 2)
    with pytest.raises(KeyboardInterrupt):
        shapes.run(tmp_path / "shapes")


def test_parts_have_folders_of_their_own_beside_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(folder: Path) -> str:
        folder.mkdir(parents=True)
        return folder.name

    for part in PARTS:
        monkeypatch.setattr(f"thawline.demo.{part}.run", made)
    assert run_demo(tmp_path / "demo").split() == list(PARTS)
    assert run_demo(tmp_path / "demo", ["skills"]) == "skills"
    assert {path.name for path in (tmp_path / "demo-2").iterdir()} == {"skills", "demo.txt"}
    with pytest.raises(ConfigError, match="no part 'skill'.*Did you mean 'skills'"):
        run_demo(tmp_path / "other", ["skill"])
    assert not (tmp_path / "other").exists()


def test_rewrites_are_halves_put_together() -> None:
    written = {}
    for task in REWRITES:
        row = make_rewrites(task, 1, 0, random.Random(4))[0]
        written[task] = row["input"], row["output"]
    word = written["plain-plural"][0]
    assert {given for given, _ in written.values()} == {word}
    assert written["plain-plural"][1] == f"{word}s"
    assert written["round-plural"][1] == f"{written['round-whole'][1]}s"
    assert written["hard-short"][1] == written["hard-whole"][1][:2]
    assert set(written["round-whole"][1][1::2]) == {"o"}
    assert written["round-whole"][1][::2] == word[::2]
