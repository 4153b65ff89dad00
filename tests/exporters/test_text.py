"""Text runs leave for serving: merged checkpoints and stock LoRAs that answer as the run does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.text import write_tasks
from thawline.cli import main
from thawline.errors import ConfigError
from thawline.jobs import evaluate, export
from thawline.recipe import RunConfig
from thawline.run import load_tuned, run
from thawline.tuners.mhr import set_task_ids


@pytest.fixture(scope="module")
def tuned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs of two tasks by tuner."""
    root = tmp_path_factory.mktemp("text")
    data = write_tasks(tmp_path_factory.mktemp("tasks"))
    tuners = {
        "mhr": {"method": "mhr", "r": 2, "n_skills": 3},
        "paca": {"method": "paca", "r": 2},
        "lora": {"method": "lora", "r": 2},
    }

    def build(name: str) -> Path:
        if not (root / name).exists():
            run(RunConfig.from_mapping({
                "name": name, "folder": str(root), "base": str(tiny_llama), "tuner": tuners[name],
                "data": {"path": str(data), "tasks": ["first", "last"]},
                "training": {"max_steps": 4, "batch_size": 4, "lr": 1e-1},
            }))  # fmt: skip
        return root / name

    return build


IDS = torch.tensor([[5, 9, 13, 7]])


def own_logits(folder: Path, task: str) -> torch.Tensor:
    _, model = load_tuned(folder)
    if folder.name == "mhr":
        set_task_ids(model, task)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["mhr", "paca", "lora"])
@pytest.mark.parametrize("format", ["lora", "merged", "gguf-ready"])
def test_exports_answer_as_the_run_does(
    name: str, format: str, tuned, tiny_llama: Path, tmp_path: Path
) -> None:
    task = "all" if name == "mhr" else None
    folders = export(tuned(name), tmp_path / "out", format=format, task=task)
    assert [folder.name for folder in folders] == (["first", "last"] if task else ["out"])
    for folder in folders:
        if format == "lora":
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            assert model.dtype == torch.bfloat16
            assert AutoTokenizer.from_pretrained(folder).pad_token_id is not None
        with torch.no_grad():
            found = model.eval()(input_ids=IDS).logits.float()
        expected = own_logits(tuned(name), folder.name)
        assert (found - expected).abs().max() < (
            1e-5 if format == "lora" else 0.05
        ) * expected.abs().max() + 1e-5


def test_a_task_must_be_chosen_among_several(tuned, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="Available: all, first, last"):
        export(tuned("mhr"), format="merged")
    assert main(["export", str(tuned("mhr")), "--format", "lora", "--task", "frist"]) == 2
    assert "Did you mean 'first'" in capsys.readouterr().err


def test_detector_options_are_refused_for_text(tuned) -> None:
    with pytest.raises(ConfigError, match="`opset` is for detectors"):
        export(tuned("lora"), format="merged", opset=17)
    with pytest.raises(ConfigError, match="`variant` is for detectors"):
        export(tuned("lora"), format="merged", variant="s")
    with pytest.raises(ConfigError, match="`task` is for the formats of text"):
        export("atto", weights="random", task="first")


def test_an_export_replaces_nothing_but_an_earlier_one(tuned, tiny_llama: Path, tmp_path: Path) -> None:
    before = (tiny_llama / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is in use. Give a new or empty folder"):
        export(tuned("lora"), tiny_llama, format="merged")
    assert (tiny_llama / "model.safetensors").read_bytes() == before
    for _ in range(2):
        export(tuned("lora"), tmp_path / "out", format="lora")
    with pytest.raises(ConfigError, match="out' is in use"):
        export(tuned("lora"), tmp_path / "out", format="merged")


def test_an_evaluation_of_a_text_run_refuses_another_tuner(tuned) -> None:
    with pytest.raises(ConfigError, match=r"`tuner.r`: the model of .* is evaluated as it was trained"):
        evaluate(tuned("lora"), **{"tuner.r": 7})
