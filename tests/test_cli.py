"""The command line: quick to answer, strict, and one line for a mistake."""

from __future__ import annotations

import errno
import json
import re
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError

import thawline
from thawline.cli import VERBS, main
from thawline.recipe import CHOICES, section_types


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "letters.jsonl"
    lines = [
        {"input": f"{a}{b}", "output": a, "choices": ["a", "b"], "split": "test" if b == "z" else "train"}
        for a in "ab"
        for b in "wxyz"
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = main(argv)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return status, err


@pytest.mark.parametrize("words", [["--help"], ["list"], ["--version"], ["train", "--help"]])
def test_help_and_list_answer_in_half_a_second(words: list[str]) -> None:
    # Processor time: on a machine that does nothing else it is the wall time, and a busy one cannot spoil it.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "thawline", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout
    assert done.stderr == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for verb, function in VERBS.items():
        assert verb in text
        assert function.__doc__.splitlines()[0] in text


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{thawline.__version__}\n"


def test_list_shows_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == CHOICES
    assert main(["list", "tuners", "routers"]) == 0
    text = capsys.readouterr().out
    for name in (*CHOICES["tuners"], *CHOICES["routers"]):
        assert re.search(rf"\b{name}\b", text)
    assert "selections" not in text


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["trian"], 2, "Unknown command 'trian'. Available: .*Did you mean 'train'"),
        (["train"], 2, "`base.model` is missing"),
        (["train", "--config", "none.yaml"], 2, "Cannot read recipe 'none.yaml': No such file"),
        (["train", "--tuner.rank", "4"], 2, "Unknown option '--tuner.rank'. Did you mean 'tuner.r'"),
        (["train", "--training.learning_rate", "1"], 2, "Here it is called 'training.lr'"),
        (["train", "--tuner", "pacca"], 2, "Unknown tuner 'pacca'"),
        (["train", "--tuner.r", "four"], 2, "'tuner.r' takes int, got 'four'"),
        (
            ["train", "--training.save_every", "day"],
            2,
            "takes int or 'epoch', 'end', got 'day'",
        ),
        (["train", "--base", "m", "--data", "no.jsonl"], 2, "Cannot load 'm'"),
        (["predict"], 2, "No model given. Usage: thawline predict MODEL TEXT"),
        (["predict", "m", "--tokens", "3"], 2, "Unknown option '--tokens'.*Did you mean 'max_new_tokens'"),
        (["predict", "--source", "photos"], 2, "No model given. Usage: thawline predict MODEL --source"),
        (["predict", "m", "--source", "photos", "--choices", "a,b"], 2, "'choices' is for texts"),
        (["predict", "m", "x", "--tile", "640"], 2, "'tile' is for detection, which needs --source"),
        (["train", "--lean", "--seed", "3"], 2, "'--lean' needs a value"),
        (["eval"], 2, "required: model"),
        (["eval", "runs/nowhere"], 1, "No such run or model: 'runs/nowhere'"),
        (["predict", "m", "x", "--batch_size", "0"], 2, "`batch_size` must be a number of at least 1, got 0"),
        (
            ["predict", "m", "x", "--max_new_tokens", "0"],
            2,
            "`max_new_tokens` must be a number of at least 1, got 0",
        ),
        (
            ["predict", "m", "x", "--temperature", "-1"],
            2,
            "`temperature` must be a number of at least 0, got -1",
        ),
        (["train", "--base", "./m", "--data", "no.jsonl"], 2, "Cannot load './m': no such folder"),
        (["train", "--base", "m", "--data", "d", "--seed", "-1"], 2, "`seed` must be a whole number from 0"),
        (["list", "tuner"], 2, "Unknown topic 'tuner'.*Did you mean 'tuners'"),
    ],
)
def test_a_mistake_ends_in_one_line(capsys, argv: list[str], status: int, message: str) -> None:
    got, err = fails(capsys, *argv)
    assert got == status
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--data.template", "{input"], 2, "`data.template` '{input' is not a format string: expected '}'"),
        (
            ["--training.report_to", "wandbb"],
            2,
            "`training.report_to`: wandbb is not supported, only .*wandb",
        ),
        (["--training.report_to", "clearml"], 2, "`training.report_to`: .*requires .*clearml"),
        (["--folder", "/proc/nowhere"], 1, "No such file or directory: '/proc/nowhere"),
    ],
)
def test_a_mistake_found_while_building_ends_in_one_line(
    tiny_llama: Path,
    rows: str,
    tmp_path: Path,
    monkeypatch,
    capsys,
    words: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--base", str(tiny_llama), "--data", rows, *words]) == status
    err = capsys.readouterr().err
    assert re.fullmatch(f"thawline: {message}.*", err.splitlines()[-1]), err
    assert not (tmp_path / "runs").exists()


def test_texts_may_come_after_options(monkeypatch, capsys) -> None:
    asked: dict[str, object] = {}

    def answer(model: str, texts: list[str], **others: object) -> list[str]:
        asked.update(others, model=model, texts=texts)
        return texts

    monkeypatch.setattr("thawline.run.predict", answer)
    assert main(["predict", "m", "--max_new_tokens", "3", "one", "--json", "two", "--", "--three"]) == 0
    assert (asked["model"], asked["texts"]) == ("m", ["one", "two", "--three"])
    assert asked["max_new_tokens"] == 3
    assert main(["predict", "m", "one", "--temperature", "0", "--choices", "a, ,b"]) == 0
    assert "temperature" not in asked or asked["temperature"] == 0
    assert asked["choices"] == ["a", "b"]
    capsys.readouterr()


def test_a_recipes_unknown_key_names_the_file_and_the_nearest(tmp_path: Path, capsys) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("base: m\ndata: d\ntraining: {epoch: 3}\n")
    status, err = fails(capsys, "train", "--config", str(file))
    assert status == 2
    assert f"Unknown key 'training.epoch' in {file}. Did you mean 'training.epochs'?" in err


def test_print_config_is_the_recipe_under_the_command_line(tmp_path: Path, capsys) -> None:
    file, over = tmp_path / "recipe.yaml", tmp_path / "over.yaml"
    file.write_text("base: m\ndata: d\ntuner: {method: lora, r: 4, dropout: 0.1}\ntraining: {lr: 1e-3}\n")
    over.write_text("training: {epochs: 7}\n")
    words = ["train", "--config", str(file), f"--config={over}", "--print_config"]
    assert main([*words, "--tuner.r", "6", "--data=e", "--tuner.args.use_rslora", "true"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["tuner"]["r"], config["tuner"]["dropout"]) == (6, 0.1)
    assert config["tuner"]["args"] == {"use_rslora": True}
    assert (config["training"]["lr"], config["training"]["epochs"]) == (1e-3, 7)
    assert (config["data"]["path"], config["base"]["model"]) == ("e", "m")
    # A recipe's r says nothing to `frozen`: the comparison is what was asked for.
    assert main([*words, "--tuner", "frozen"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["tuner"] == {"method": "frozen"}


def test_help_of_train_groups_the_fields_of_every_objective_and_tuner(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--training.gradient_accumulation" in text
    assert "Forward passes per optimiser step." in text
    assert "--tuner for --tuner.method" in text
    for title in ("objective (match):", "data (text, match):", "data (detection):", "training (detection):"):
        assert f"\n{title}\n" in text
    groups = dict(re.findall(r"\n(tuner [^\n]*):\n(.*?)(?=\n\n|\n$)", text, re.DOTALL))
    assert "--tuner.selection" in groups["tuner (paca)"]
    assert "--tuner.n_heads" in groups["tuner (mhr, poly)"]
    assert max(map(len, text.splitlines())) <= 100
    for types in (section_types("text", "mhr"), section_types("detection", "paca")):
        for section, wanted in types.items():
            assert all(f"--{section}.{field.name} " in text.replace("\n", " ") for field in fields(wanted))


def test_help_of_predict_groups_text_and_detection(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    text = capsys.readouterr().out
    of_text, of_detection = text.split("\ntext:\n")[1].split("\ndetection (with --source):\n")
    assert "--choices" in of_text
    assert "--tile" in of_detection
    assert max(map(len, text.splitlines())) <= 100


def test_train_eval_and_predict_from_the_command_line(
    tiny_llama: Path, rows: str, tmp_path: Path, capsys
) -> None:
    runs = str(tmp_path / "runs")
    words = ["train", "--base", str(tiny_llama), "--data", rows, "--folder", runs, "--name", "one"]
    words += [
        "--training.epochs",
        "1",
        "--training.batch_size",
        "2",
        "--training.lr",
        "1e-2",
        "--tuner.r",
        "2",
    ]
    assert main([*words, "--dry_run"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert 3 < len(table) <= 12
    assert all(re.match(r"\w+ +\S", line) for line in table)
    assert main([*words, "--dry_run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["rows"]) == (3, {"train": 6, "held_out": 2})
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["steps"]) == ("finished", 3)
    folder = result["folder"]
    assert (Path(folder) / "report.html").is_file()

    status, err = fails(capsys, *words)
    assert status == 1
    assert "holds a finished run. Give this one another name: --name one-2" in err

    out = tmp_path / "predicted.jsonl"
    assert main(["eval", folder, "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == result["metrics"]
    assert len(out.read_text().splitlines()) == 2
    status, err = fails(capsys, "eval", folder, "--out", str(out))
    assert status == 2
    assert f"`out`: '{out}' already exists. Choose another name" in err
    assert len(out.read_text().splitlines()) == 2
    assert main(["eval", folder]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["task", "rows", "loss", "choice_accuracy"]
    assert table[1].split()[:2] == ["letters", "2"]

    texts = tmp_path / "texts.txt"
    texts.write_text("az\nbz\n")
    assert main(["predict", folder, "--file", str(texts), "--choices", "a,b"]) == 0
    assert set(capsys.readouterr().out.split()) <= {"a", "b"}
    assert main(["predict", folder, "az", "--json", "--max_new_tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["input"] == "az"


def test_a_plain_model_is_evaluated_on_the_rows_it_is_given(tiny_llama: Path, rows: str, capsys) -> None:
    assert main(["eval", str(tiny_llama), "--data", rows, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["letters"]["rows"] == 2
    status, err = fails(capsys, "eval", str(tiny_llama), "--data", rows, "--out", "no/where.jsonl")
    assert status == 2
    assert "`out`: no such folder: 'no'" in err
    status, err = fails(capsys, "eval", str(tiny_llama), "--qqqq", "1")
    assert status == 2
    assert err.endswith("objective, out, print_config, seed, training, tuner.\n"), err
    status, err = fails(capsys, "eval", str(tiny_llama))
    assert status == 2
    assert "Give rows: --data" in err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_ends_any_command_in_one_line(monkeypatch, capsys, error: Exception) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setitem(VERBS, "list", fail)
    assert main(["list"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("thawline: A file could not be written: ")
    assert line.endswith("Make room, and try again.\n")


def test_other_faults_of_ours_keep_their_traceback(monkeypatch) -> None:
    def fail(words: list[str]) -> int:
        raise RuntimeError("a fault")

    monkeypatch.setitem(VERBS, "list", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["list"])
