"""The deployment guide tells the truth: each of its commands runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.text import write_tasks
from thawline.cli import main
from thawline.demo.toy_images import write_shapes
from thawline.models.deimv2 import DEIMv2
from thawline.recipe import RunConfig
from thawline.run import run

GUIDE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line]


def test_every_command_runs(
    tmp_path: Path, tiny_llama: Path, lite: DEIMv2, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DEIMv2, "from_variant", lambda variant: lite)
    write_shapes(tmp_path / "my-images", 4, 2)
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
    for name in ("atto.onnx", "atto.xml", "atto.pt2", "web.onnx", "int8.onnx"):
        assert (tmp_path / "deployed" / f"{name}.report.json").is_file()
        assert (tmp_path / "deployed" / name).is_file()
