"""Messages of other libraries: notices are hidden, warnings stay."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thawline.cli.quiet import quiet_libraries

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
        "run", "base", "tuner", "objective", "data", "steps", "rate", "memory", "evaluation", "checkpoints",
        "sample", "step", "Report:",
    }  # fmt: skip
    assert labels.index("sample") < 12
    assert stderr_of(tmp_path, "predict", "runs/one", "a", "--max_new_tokens", "1") == []


def report(*rows: tuple[str, str]) -> str:
    lines = [f"{key} | \033[31m{status}\033[0m | " for key, status in rows]
    table = [
        "\033[1mLlamaForSequenceClassification LOAD REPORT\033[0m from: base",
        "Key | Status | ",
        "----+---+-",
        *lines,
    ]
    return "\n".join([*table, "Notes:", "- MISSING:\tthose params were newly initialized."])


@pytest.mark.parametrize(
    ("rows", "is_hidden"),
    [
        ([("score.weight", "MISSING")], True),
        ([("classifier.out_proj.{weight, bias}", "MISSING"), ("cls.predictions.bias", "UNEXPECTED")], True),
        ([("score.weight", "MISSING"), ("model.layers.{0, 1}.mlp.up_proj.weight", "MISSING")], False),
        ([("score.weight", "MISMATCH")], False),
        ([("lm_head.weight", "CONVERSION")], False),
    ],
)
def test_a_new_head_is_no_news_and_any_other_missing_weight_is(rows: list, is_hidden: bool) -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    before = list(logger.filters)
    quiet_libraries()
    record = logger.makeRecord(logger.name, logging.WARNING, "file", 1, report(*rows), (), None)
    hidden = not logger.filter(record)
    logger.filters[:] = before
    assert hidden is is_hidden


def test_the_advice_of_onnxruntimes_quantiser_is_hidden_and_other_words_of_the_root_logger_are_not() -> None:
    root = logging.getLogger()
    before = list(root.filters)
    quiet_libraries()
    shown = [
        root.filter(root.makeRecord("root", logging.WARNING, "file", 1, text, (), None))
        for text in ("Please consider to run pre-processing before quantization. Refer to", "Please consider")
    ]
    root.filters[:] = before
    assert [bool(one) for one in shown] == [False, True]


# What makes other libraries speak: a new head, recomputed activations, a learned prompt.
TALKATIVE = {
    "classifier": ["--base.head", "classifier", "--tuner", "lora"],
    "recomputing": ["--tuner", "lora", "--training.gradient_checkpointing", "true"],
    "prompt": ["--tuner", "prompt_tuning", "--tuner.args.num_virtual_tokens", "2"],
}


@pytest.mark.parametrize("name", TALKATIVE)
def test_what_a_user_can_do_nothing_about_is_not_printed(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"input": "a", "output": "b"}\n{"input": "b", "output": "a"}\n' * 2
        + '{"input": "a", "output": "b", "split": "test"}\n'
    )
    words = [
        "--base.model",
        str(tiny_llama),
        "--data",
        str(rows),
        "--name",
        "one",
        "--training.max_steps",
        "1",
    ]
    lines = [line for line in stderr_of(tmp_path, "train", *words, *TALKATIVE[name]) if line.strip()]
    ours = {
        "run",
        "base",
        "tuner",
        "objective",
        "data",
        "steps",
        "rate",
        "memory",
        "evaluation",
        "checkpoints",
    }
    foreign = [line for line in lines if line.split()[0] not in ours | {"sample", "step", "Report:"}]
    assert [line for line in foreign if "it/s" not in line and "s/it" not in line] == []
    assert stderr_of(tmp_path, "eval", "runs/one") == []
