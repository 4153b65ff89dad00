"""The deployment guide tells the truth: each of its commands runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.text import write_tasks
from thawline.cli import main
from thawline.recipe import RunConfig
from thawline.run import run

GUIDE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.mark.slow
def test_every_command_runs(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    run(RunConfig.from_mapping({
        "name": "demo-text", "base": str(tiny_llama), "tuner": {"method": "mhr", "r": 2, "n_skills": 3},
        "data": {"path": str(write_tasks(tmp_path / "tasks")), "tasks": ["first", "last"]},
        "training": {"max_steps": 2, "batch_size": 4},
    }))  # fmt: skip
    for command in commands():
        program, *words = shlex.split(command)
        assert program == "thawline"
        assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"
    for name in ("atto.onnx", "atto.xml", "atto.pt2", "web.onnx"):
        assert (tmp_path / "deployed" / f"{name}.report.json").is_file()
        assert (tmp_path / "deployed" / name).is_file()
