"""Messages of other libraries: notices are hidden, warnings stay."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from thawline.cli.quiet import quiet_libraries

MARK = "\n== next ==\n"
STAND_IN = """
import logging
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning(
    "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you already "
    "`pip install kernels` and the kernels >= 0.11.1", "no module"
)
logger.warning("a warning that matters")
"""


def stderr_of(tmp_path: Path, *commands: Sequence[str], before: str = "") -> list[list[str]]:
    """Lines on stderr of each command, all run by one process: it is the imports that take long.

    `before` runs after them and stands in for what a command would import; its lines come last.
    """
    code = (
        "import sys\nfrom thawline.cli import main\n"
        f"for command in {[list(command) for command in commands]!r}:\n"
        "    for module in list(sys.modules.values()):  # each warning is shown once a process\n"
        "        vars(module).get('__warningregistry__', {}).clear()\n"
        f"    assert main(command) == 0\n    sys.stderr.write({MARK!r})\n{before}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return [part.splitlines() for part in done.stderr.split(MARK)]


def test_the_notice_of_bitsandbytes_is_hidden_and_its_warnings_are_not(tmp_path: Path) -> None:
    assert stderr_of(tmp_path, ["list"], before=STAND_IN) == [[], ["a warning that matters"]]


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
    "plain": [],
    "classifier": ["--base.head", "classifier", "--tuner", "lora"],
    "recomputing": ["--tuner", "lora", "--training.gradient_checkpointing", "true"],
    "prompt": ["--tuner", "prompt_tuning", "--tuner.args.num_virtual_tokens", "2"],
}


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """The folder that the runs of `TALKATIVE` were trained in, and what each run printed on stderr."""
    folder = tmp_path_factory.mktemp("quiet")
    rows = folder / "rows.jsonl"
    rows.write_text(
        '{"input": "a", "output": "b"}\n{"input": "b", "output": "a"}\n' * 2
        + '{"input": "a", "output": "b", "split": "test"}\n'
    )
    words = ["train", "--base", str(tiny_llama), "--data", str(rows), "--training.max_steps", "1"]
    lines = stderr_of(folder, *([*words, "--name", name, *more] for name, more in TALKATIVE.items()))
    assert lines.pop() == []  # after the last command
    return folder, dict(zip(TALKATIVE, lines, strict=True))


@pytest.mark.parametrize("name", TALKATIVE)
def test_training_prints_only_our_lines(name: str, trained: tuple[Path, dict[str, list[str]]]) -> None:
    """Also where another library says what a user can do nothing about."""
    # No bars: everything here takes less than a second, but for a slow machine's first step.
    lines = [line for line in trained[1][name] if "it/s" not in line and "s/it" not in line]
    labels = [line.split()[0] for line in lines if line.strip()]
    assert labels[0] == "run"
    assert set(labels) <= {
        "run", "base", "tuner", "objective", "data", "steps", "rate", "memory", "evaluation", "checkpoints",
        "sample", "step", "Report:",
    }  # fmt: skip
    assert labels.index("sample") < 12


def test_evaluating_and_predicting_print_nothing(trained: tuple[Path, dict[str, list[str]]]) -> None:
    folder, _ = trained
    evaluate = [["eval", f"runs/{name}"] for name in TALKATIVE if name != "plain"]
    commands = [["predict", "runs/plain", "a", "--max_new_tokens", "1"], *evaluate]
    assert stderr_of(folder, *commands) == [[]] * (len(commands) + 1)
