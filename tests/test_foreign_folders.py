"""Folders that others made, or that moved: PEFT's Poly, other methods, bases at relative paths."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.models import tiny_llama as tiny
from tests.support.text_runs import TextRecipes, write_first_letters
from thawline.errors import CheckpointError, ConfigError, RoutingError
from thawline.recipe import Lora, Mhr, Paca
from thawline.run import evaluate, predict, run
from thawline.tuners.build import attach_tuner


def save_poly(base: Path, folder: Path, n_tasks: int, n_splits: int = 1) -> Path:
    config = PolyConfig(
        task_type="CAUSAL_LM",
        r=4,
        n_tasks=n_tasks,
        n_skills=2,
        n_splits=n_splits,
        target_modules=["q_proj", "v_proj"],
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("n_splits", [1, 2])
def test_predict_reads_a_poly_adapter_of_peft_and_asks_for_one_of_its_numbered_tasks(
    tiny_llama, tmp_path, caplog, n_splits
) -> None:
    folder = save_poly(tiny_llama, tmp_path / "poly", n_tasks=2, n_splits=n_splits)
    with caplog.at_level("INFO"), pytest.raises(RoutingError, match="Which task .*Available: 0, 1"):
        predict(folder, ["ab"])
    assert "read by thawline.from_poly" in caplog.text
    with pytest.raises(RoutingError, match="no task '7'. Available: 0, 1"):
        predict(folder, ["ab"], task="7")
    one, other = (predict(folder, ["ab"], task=task, max_new_tokens=8) for task in "01")
    assert one != other
    alone = save_poly(tiny_llama, tmp_path / "alone", n_tasks=1)
    assert len(predict(alone, ["ab", "cd"], max_new_tokens=2)) == 2


@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_training_goes_on_from_a_poly_adapter_of_peft(tiny_llama, tmp_path, method) -> None:
    folder = save_poly(tiny_llama, tmp_path / "poly", n_tasks=2)
    rows = write_first_letters(tmp_path / "first.jsonl")
    recipe = TextRecipes(tiny_llama, rows, tmp_path / "runs")
    with pytest.raises(
        RoutingError, match="No routing for task 'first': the model was trained on tasks '0', '1'"
    ):
        run(recipe("kept", {"method": method, "start_from": str(folder)}), dry_run=True)
    tuner = {"method": method, "start_from": str(folder), "adapt": "z"}
    result = run(recipe("adapted", tuner, max_steps=2))
    assert result.status == "finished"
    assert len(predict(result.folder, ["ab"])) == 1


def test_an_adapter_of_another_method_is_refused_by_type_with_what_to_set(tiny_llama, tmp_path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    lora = str(tmp_path / "lora")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        lora
    )
    poly = str(save_poly(tiny_llama, tmp_path / "poly", n_tasks=1))
    for settings, message in (
        (
            Paca(start_from=lora),
            "type LORA, which `tuner.method: paca` does not read: set `tuner.method: lora`",
        ),
        (Mhr(start_from=lora), "type LORA, .*set `tuner.method: lora`"),
        (Lora(start_from=poly), "type POLY, .*set `tuner.method: poly`"),
    ):
        with pytest.raises(CheckpointError, match=message):
            attach_tuner(base, settings)


@pytest.mark.parametrize("settings", [Lora(r=2), Paca(r=2), Mhr(r=2)], ids=lambda one: one.method)
def test_an_adapter_that_does_not_fit_or_is_not_whole_is_refused_in_one_line(tmp_path, settings) -> None:
    folder = tmp_path / "adapter"
    attach_tuner(tiny(), settings).save_pretrained(str(folder))
    again = dataclasses.replace(settings, start_from=str(folder))
    attach_tuner(tiny(), again)
    for changes, message in (
        ({"num_hidden_layers": 1}, r"layers\.1\."),
        ({"intermediate_size": 48}, "does not fit LlamaForCausalLM: .*(gate|down)_proj"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            attach_tuner(tiny(**changes), again)
        assert "\n" not in str(error.value)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(
        CheckpointError, match="does not fit LlamaForCausalLM, which finds in it no '.*layers"
    ):
        attach_tuner(tiny(), again)
    weights.unlink()
    with pytest.raises(CheckpointError, match="holds no weights .no adapter_model.safetensors"):
        attach_tuner(tiny(), again)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot read the adapter in .*peft_type"):
        attach_tuner(tiny(), again)


def test_pefts_own_paca_is_not_taken_for_ours(tiny_llama, tmp_path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "PACA", "base_model_name_or_path": str(tiny_llama), "r": 4}))
    with pytest.raises(CheckpointError, match="cannot read .*PACA|type PACA, which .* PEFT's own"):
        predict(tmp_path, ["ab"])


def test_an_adapter_that_does_not_name_its_base_says_so(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="does not say what it is.*base_model_name_or_path"):
        predict(tmp_path, ["ab"])


@pytest.fixture
def project(tiny_llama, tmp_path, monkeypatch) -> Path:
    """A directory with a base and rows, and a run made there with relative paths."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_llama, folder / "models/base")
    rows = write_first_letters(folder / "first.jsonl")
    monkeypatch.chdir(folder)
    run(TextRecipes(Path("models/base"), rows, Path("runs"))("here", max_steps=1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_a_run_and_its_adapter_find_a_base_at_a_relative_path_from_any_directory(project) -> None:
    folder = project / "runs/here"
    assert len(predict(folder, ["ab"], choices="abcd")) == 1
    assert len(predict(folder / "model", ["ab"], choices="abcd")) == 1
    assert evaluate(folder).metrics["loss"] > 0
    assert predict("../project/runs/here", ["ab"], choices="abcd")


def test_a_base_that_is_nowhere_is_told_with_the_directory_it_was_looked_for(project, tmp_path) -> None:
    shutil.rmtree(project / "models")
    with pytest.raises(
        ConfigError, match=f"Cannot load 'models/base': no such folder in '{tmp_path}/elsewhere'"
    ):
        predict(project / "runs/here", ["ab"])
