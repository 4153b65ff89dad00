"""README tells the truth: each command and Python block runs, offline, in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_command_and_python_block_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for command in commands():
        if command == "make test":
            continue
        # `make demo` is `thawline demo` once there is an environment. README uses the folder of its first
        # part; the others take longer and have tests of their own.
        command = re.sub(r"^make demo$", "thawline demo columns", command)
        command = re.sub(r"^thawline\b", f"{sys.executable} -m thawline", command)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=180
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if " demo " in f"{command} ":
            accuracy = dict(re.findall(r"^(frozen|lora|paca) +[\d,]+ +(\d\.\d\d)", done.stdout, re.MULTILINE))
            assert float(accuracy["paca"]) > float(accuracy["frozen"]) + 0.2, done.stdout
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=env, check=True, timeout=180)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README))))
def test_every_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
