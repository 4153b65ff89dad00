"""Messages of other libraries: notices are hidden, warnings stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STAND_IN = """
import logging
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning(
    "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you already "
    "`pip install kernels` and the kernels >= 0.11.1", "no module"
)
logger.warning("a warning that matters")
"""


def stderr_of(tmp_path: Path, *words: str, before: str = "") -> list[str]:
    """Lines on stderr of a command run after `before`, which stands in for what the command would import."""
    code = f"from thawline.cli import main\nmain({list(words)!r})\n{before}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ
    )
    return done.stderr.splitlines()


def test_the_notice_of_bitsandbytes_is_hidden_and_its_warnings_are_not(tmp_path: Path) -> None:
    assert stderr_of(tmp_path, "list", before=STAND_IN) == ["a warning that matters"]


def test_training_and_predicting_print_only_our_lines(tiny_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"input": "a", "output": "b"}\n' * 4 + '{"input": "a", "output": "b", "split": "test"}\n'
    )
    words = ["--base", str(tiny_llama), "--data", str(rows), "--name", "one", "--training.max_steps", "1"]
    # No bars: everything here takes less than a second, but for a slow machine's first step.
    lines = [
        line for line in stderr_of(tmp_path, "train", *words) if "it/s" not in line and "s/it" not in line
    ]
    labels = [line.split()[0] for line in lines if line.strip()]
    assert labels[0] == "run"
    assert set(labels) <= {
        "run", "base", "tuner", "objective", "data", "steps", "rate", "evaluation", "checkpoints", "sample",
        "step", "Report:",
    }  # fmt: skip
    assert labels.index("sample") < 12
    assert stderr_of(tmp_path, "predict", "runs/one", "a", "--max_new_tokens", "1") == []
