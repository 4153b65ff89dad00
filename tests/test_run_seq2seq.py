"""An encoder-decoder learns tasks with and without choices, and turns to a new one by its routing alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.text import LETTERS, save_tiny_t5, write_tasks
from thawline.cli import main
from thawline.run import predict


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that both phases share."""
    folder = tmp_path_factory.mktemp("seq2seq")
    (folder / "tasks").mkdir()
    return [
        "--base", str(save_tiny_t5(folder / "t5")), "--data", str(write_tasks(folder / "tasks")),
        "--folder", str(folder / "runs"), "--data.sampling", "equal", "--training.batch_size", "8",
        "--training.eval_every", "end", "--training.save_every", "end", "--training.lr", "2e-2", "--json",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(words: list[str]) -> Path:
    tuner = ["--tuner", "mhr", "--tuner.r", "2", "--tuner.n_skills", "3", "--tuner.n_heads", "4"]
    tasks = ["--data.tasks", "[first, last, swap]", "--training.max_steps", "60"]
    assert main(["train", *words, *tuner, *tasks, "--name", "skills"]) == 0
    return Path(words[words.index("--folder") + 1]) / "skills"


def test_choices_are_ranked_and_other_answers_written(pretrained: Path, capsys) -> None:
    capsys.readouterr()
    assert main(["eval", str(pretrained), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {task: set(part) - {"rows", "loss"} for task, part in found["parts"].items()} == {
        "first": {"choice_accuracy"}, "last": {"choice_accuracy"}, "swap": {"exact_match", "rouge_l"},
    }  # fmt: skip
    rows = [json.loads(line) for line in (pretrained / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        if row["task"] == "swap":
            # Two letters and the end token are the longest held-out answer, so no answer can be longer.
            assert row["exact_match"] == float(row["prediction"] == row["answer"])
            assert len(row["prediction"]) <= 3
        else:
            assert row["choice"] in LETTERS
    logged = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < 0.75 * losses[0]  # measured 0.62
    assert found["metrics"] == pytest.approx(json.loads((pretrained / "result.json").read_text())["metrics"])


def test_what_is_said_of_a_row_is_the_models_own(pretrained: Path) -> None:
    # The same by transformers alone: the loss of one row, and greedy answers, with ids given by hand.
    from peft import PeftModel
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    import thawline

    base = json.loads((pretrained / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(T5ForConditionalGeneration.from_pretrained(base), pretrained / "model")
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in (pretrained / "predictions.jsonl").read_text().splitlines()]
    for task in ("first", "swap"):
        thawline.set_task_ids(model, task)
        for letter, row in zip(LETTERS, (row for row in rows if row["task"] == task), strict=True):
            asked = tokenizer(f"{letter}{letter}\n", return_tensors="pt")
            labels = tokenizer(row["answer"], return_tensors="pt").input_ids
            loss = model(**asked, labels=labels).loss.item()
            assert row["log_likelihood"] / row["n_tokens"] == pytest.approx(-loss, rel=1e-4)
            if task == "swap":
                written = model.generate(**asked, max_new_tokens=3, do_sample=False)[0]
                assert row["prediction"] == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_a_new_task_is_reached_by_its_routing_alone(words: list[str], pretrained: Path, capsys) -> None:
    adapt = ["--tuner", "mhr", "--tuner.start_from", str(pretrained), "--tuner.adapt", "z"]
    shots = ["--data.tasks", "[least]", "--data.shots", "8", "--training.max_steps", "20"]
    capsys.readouterr()
    assert main(["train", *words, *adapt, *shots, "--name", "least-z"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["start"]["name"] == "zero-shot"
    before, after = (load_file(run / "model/adapter_model.safetensors") for run in
                     (pretrained, Path(result["folder"])))  # fmt: skip
    skills = [name for name in before if "mhr_A" in name or "mhr_B" in name]
    assert {name.split(".block")[0].split(".")[-1] for name in skills} == {"encoder", "decoder"}
    assert all(torch.equal(before[name], after[name]) for name in skills)
    assert any(not torch.equal(before[name][:1], after[name]) for name in set(before) - set(skills))
    assert main(["eval", result["folder"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(result["metrics"])
    # Zero-shot is what the average of the skills says, by either phase's folder.
    zero_shot = ["--tuner.adapt", "mu", "--data.tasks", "[least]", "--json"]
    assert main(["eval", str(pretrained), *zero_shot]) == 0
    average = json.loads(capsys.readouterr().out)["metrics"]
    # Fresh rows lie within 1e-3 of the average.
    assert result["start"]["metrics"]["loss"] == pytest.approx(average["loss"], rel=2e-3)
    assert set(predict(result["folder"], ["ab", "ba"])) <= set(LETTERS)
    assert all(
        len(text) <= 2 for text in predict(pretrained, ["ab"], task="swap", max_new_tokens=2, num_beams=2)
    )
