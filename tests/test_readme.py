"""README tells the truth: each command and Python block runs, offline, in an empty folder."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from thawline.cli import main
from thawline.demo import columns, shapes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = {"make demo", "make test"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_set_up_is_two_commands() -> None:
    assert set(commands()) >= SET_UP


def test_every_command_and_python_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other in one folder, and in this process: each import of torch would take seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    told: set[str] = set()
    # Half the words and few measurements: enough for PaCA to pass the frozen base by far.
    for name, value in (("N_TRAIN", 200), ("N_TEST", 25)):
        monkeypatch.setattr(columns, name, value)
    monkeypatch.setattr(columns, "run", partial(columns.run, pretraining_steps=150, rounds=1))
    for command in commands():
        if command == "make test" or command.startswith("pip install"):
            continue
        # `make demo` is `thawline demo` once there is an environment. README uses the folders of two of its
        # parts; the detector's, which takes longer, is made from fewer and smaller pictures here.
        program, *arguments = shlex.split("thawline demo columns" if command == "make demo" else command)
        assert program == "thawline"
        assert main(arguments) == 0, f"{command}\n{capsys.readouterr().err}"
        printed = capsys.readouterr().out
        if arguments[0] == "demo":
            for name, value in (("N_TRAIN", 8), ("N_VAL", 2), ("SIZE", 64)):
                monkeypatch.setattr(shapes, name, value)
            shapes.run(Path("runs/demo/shapes"), epochs=1)
            accuracy = dict(re.findall(r"^(frozen|lora|paca) +[\d,]+ +(\d\.\d\d)", printed, re.MULTILINE))
            assert float(accuracy["paca"]) > float(accuracy["frozen"]) + 0.2, printed
            # That it learns is seen; what is trained from its recipe is only to run.
            config = Path("runs/demo/columns/paca/config.yaml")
            text = config.read_text()
            assert text.count("epochs: 4.0") == 1
            config.write_text(text.replace("epochs: 4.0", "epochs: 0.5"))
            told = {line.strip() for line in printed.partition("Next:\n")[2].splitlines()}
    assert len(told) == 3
    assert told <= set(commands()), "what the demo tells to type next is typed here"
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks("python"):
        shorter = block.replace('"max_steps": 50', '"max_steps": 5')
        assert shorter != block or "thawline.train(" not in block
        block = shorter
        exec(compile(block, "README.md", "exec"), names)
    assert names["answer"][0] in list("aeiou")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README))))
def test_every_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
