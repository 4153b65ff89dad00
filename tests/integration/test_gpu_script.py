"""benchmarks/gpu.sh without a GPU: what it calls exists, needs no more than it says, and ends in time."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PARTS = re.findall(r"^(part|bench|study) (\d+) ", SCRIPT.read_text(), re.MULTILINE)
needs_port = pytest.mark.skipif(
    not hasattr(transformers, "Deimv2Config"), reason="this transformers has no DEIMv2"
)


def run_script(folder: Path, python3: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script with a stand-in for python3."""
    stand_in = folder / "bin" / "python3"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/usr/bin/env bash\n{python3}\n")
    stand_in.chmod(0o755)
    env = os.environ | {"PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"} | environment
    return subprocess.run(["bash", SCRIPT], env=env, text=True, capture_output=True, timeout=60)


def test_every_part_is_a_command_its_bench_understands(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    done = run_script(tmp_path, f'echo "$@" >> {calls}', OUT="results")
    assert done.returncode == 0, done.stdout
    lines = [shlex.split(line) for line in calls.read_text().splitlines()]
    assert lines[0] == ["-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    outs = []
    for line in lines[1:]:
        # `-m thawline.bench.NAME …` or `benchmarks/NAME.py …`
        module, arguments = (line[1], line[2:]) if line[0] == "-m" else (Path(line[0]).stem, line[1:])
        options = importlib.import_module(module)._parser().parse_args(arguments)
        assert options.device == "cuda"
        outs.append(str(options.out))
    assert len(set(outs)) == len(outs) == len(PARTS) - 1
    assert all(out.startswith("results/") and out.endswith("-gpu.json") for out in outs)


def test_the_shares_of_all_parts_make_up_the_ten_minutes() -> None:
    assert sum(int(part[1]) for part in PARTS) == 100
    assert "BUDGET=${BUDGET:-590}" in SCRIPT.read_text()


def test_a_part_that_hangs_is_stopped_and_the_others_run(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    start = time.monotonic()
    hanging = (
        f'echo "$@" >> {calls}; [[ "$*" == *reference* && "$*" == *8b-blocks* ]] && exec sleep 50; exit 0'
    )
    done = run_script(tmp_path, hanging, BUDGET="10", OUT="results")
    assert time.monotonic() - start < 20  # and not 50
    assert done.returncode == 1
    assert len(calls.read_text().splitlines()) == len(PARTS)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("stopped: python3 -m thawline.bench.tuners")
    assert "8b-blocks" in last


@pytest.mark.parametrize(
    ("benches", "absent"),
    [
        ("tuners,vision", "scipy,PIL,pytest"),
        pytest.param("detector,train_step,backbone", "pytest", marks=needs_port),
    ],
)
def test_benches_run_where_only_what_the_script_names_is_installed(benches: str, absent: str) -> None:
    env = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'benchmarks'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests" / "support" / "bare_benches.py"), benches, absent]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr
