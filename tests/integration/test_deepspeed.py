"""Runs that accelerate launches with DeepSpeed, on two processes of a CPU: they train what one process would.

Skipped where DeepSpeed is not installed (`DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`; it
compiles one operation at its first start, for which ninja must be on the path).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SHARED = Path(__file__).parents[3] / "shared"
RECIPES = Path(__file__).parents[2] / "recipes" / "distributed"

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    rows = [{"prompt": f"Tom saw {i} cats.", "completion": f" He gave {i % 7} fish."} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"objective: text\nbase: {{model: {SHARED}/models/stories260K}}\ntuner: {{method: paca, r: 4}}\n"
        f"data: {{path: {folder}/rows.jsonl, max_length: 64}}\nfolder: {folder}/runs\n"
        "training: {max_steps: 4, batch_size: 2, precision: fp32, log_every: 1, eval_every: end}\n"
    )
    return folder / "recipe.yaml"


def train(recipe: Path, name: str, launcher: list[str], *options: str) -> tuple[Path, str]:
    command = ["-m", "thawline", "train", "--config", str(recipe), "--name", name, *options]
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "runs" / name, done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    return train(recipe, "alone", [], "--training.batch_size", "4")[0]


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_processes_train_what_one_would(recipe: Path, alone: Path, name: str) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{name}.yaml")]
    launcher += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", port]
    run, said = train(recipe, name, launcher)
    # Columns cannot be written into partitioned weights: the default mode adds them instead.
    assert ("add their columns beside the weight" in said) == (name == "zero3")
    found, expected = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (run, alone))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
    assert any(tensor.is_floating_point() and tensor.abs().max() > 1e-4 for tensor in found.values())
