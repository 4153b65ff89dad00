"""PEFT's own PaCA: its folders are read and written exactly, and its config trains our layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import load_file, save_file
from torch import Tensor

import thawline
from tests.support.models import tiny_llama
from tests.support.paca import Net, loss_of, tokens, train, weights, wrap
from thawline import CheckpointError, ConfigError, PacaConfig
from thawline.tuners import use_for_peft_paca
from thawline.tuners._peft import TunerType
from thawline.tuners.paca import PacaLinear
from thawline.tuners.paca.peft_paca import PeftPacaConfig, PeftPacaModel

PREFIX = "base_model.model."


def peft_folder(folder: Path, base: Any, r: int = 3, alpha: float = 6, seed: int = 0, **fields: Any) -> Path:
    """A folder as PEFT 0.22 writes it: made by hand, from the public layout."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            tensors[f"{PREFIX}{name}.paca_delta"] = (
                torch.randn(module.out_features, r, generator=generator) / 9
            )
            drawn = torch.randperm(module.in_features, generator=generator)[:r]
            tensors[f"{PREFIX}{name}.paca_indices"] = drawn.sort().values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "PACA", "r": r, "paca_alpha": alpha, "target_modules": ["q_proj", "down_proj"],
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "random_seed": 1234,
        "init_weights": True, "modules_to_save": None, "task_type": "CAUSAL_LM", "peft_version": "0.22.0",
        "base_model_name_or_path": None, "inference_mode": True, "revision": None, "auto_mapping": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


def expected_logits(folder: Path, r: int = 3, alpha: float = 6) -> Tensor:
    """The base with W[:, I] + alpha / r · δ written by hand."""
    base, tensors = tiny_llama(), load_file(folder / WEIGHTS)
    with torch.no_grad():
        for key, delta in tensors.items():
            if key.endswith(".paca_delta"):
                index = tensors[key.replace("paca_delta", "paca_indices")]
                weight = base.get_submodule(key.removeprefix(PREFIX).removesuffix(".paca_delta")).weight
                weight[:, index] += alpha / r * delta
    return logits(base)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def test_a_folder_of_peft_is_read_and_written_back_exactly(tmp_path):
    folder = peft_folder(tmp_path / "theirs", tiny_llama())
    model = thawline.from_peft_paca(tiny_llama(), folder)
    torch.testing.assert_close(logits(model), expected_logits(folder), rtol=0, atol=1e-6)
    assert isinstance(model.peft_config["default"], PacaConfig)
    thawline.to_peft_paca(model, tmp_path / "back")
    theirs, back = load_file(folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert theirs.keys() == back.keys()
    assert all(torch.equal(theirs[key], back[key]) and theirs[key].dtype == back[key].dtype for key in theirs)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["paca_alpha"]) == ("PACA", 3, 6)


def test_a_trained_adapter_comes_back_equal(tmp_path):
    model = wrap(tiny_llama(), target_modules=["o_proj", "up_proj"], modules_to_save=["lm_head"], alpha=7)
    train(model)
    thawline.to_peft_paca(model, tmp_path)
    assert torch.equal(logits(thawline.from_peft_paca(tiny_llama(), tmp_path)), logits(model))


def test_several_adapters_are_a_subfolder_each(tmp_path):
    peft_folder(tmp_path, tiny_llama())
    other = peft_folder(tmp_path / "other", tiny_llama(), r=2, seed=1)
    peft_folder(tmp_path / "checkpoint-10", tiny_llama(), seed=2)
    model = thawline.from_peft_paca(tiny_llama(), tmp_path)
    assert list(model.peft_config) == ["default", "other"]
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), expected_logits(other, r=2), rtol=0, atol=1e-6)
    thawline.to_peft_paca(model, tmp_path / "back")
    thawline.to_peft_paca(model, tmp_path / "one", adapter_name="other")
    for folder in (tmp_path / "back" / "other", tmp_path / "one"):
        assert load_file(folder / WEIGHTS).keys() == load_file(other / WEIGHTS).keys()


def test_peft_itself_loads_such_a_folder_and_saves_one(tmp_path):
    folder = peft_folder(tmp_path / "theirs", tiny_llama())
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    assert isinstance(model.base_model, PeftPacaModel)
    torch.testing.assert_close(logits(model), expected_logits(folder), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "back")
    theirs, back = load_file(folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert theirs.keys() == back.keys()
    assert all(torch.equal(theirs[key], back[key]) for key in theirs)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["peft_type"] == "PACA"


def test_where_peft_has_its_own_ours_is_used_on_request(monkeypatch, tmp_path):
    class TheirConfig(PeftPacaConfig):
        """Stand-in of PEFT's own config."""

    theirs = TunerType("PACA")
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, theirs, TheirConfig)
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, theirs, object)
    use_for_peft_paca()
    model = get_peft_model(tiny_llama(), TheirConfig(r=4, paca_alpha=4, target_modules=["q_proj"]))
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, PacaLinear)
    before = loss_of(model).item()
    train(model, steps=5, lr=0.05)
    assert loss_of(model).item() < before
    model.save_pretrained(tmp_path)
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / WEIGHTS)} == {"paca_delta", "paca_indices"}
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def damage(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if key.endswith("layers.0.self_attn.q_proj.paca_indices"))
    change(tensors, key)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: t.pop(key), r"lacks paca_indices of 'model.layers.0.self_attn.q_proj'"),
        (lambda t, key: t.pop(key.replace("indices", "delta")), r"lacks paca_delta of '.*q_proj'"),
        (lambda t, key: t.update({key: t[key].flip(0)}), r"indices of '.*q_proj' are not sorted"),
        (
            lambda t, key: t.update({key: torch.tensor([1, 1, 2])}),
            r"indices of '.*q_proj' are not sorted, repeat",
        ),
        (lambda t, key: t.update({key: torch.tensor([0, 1, 999])}), r"leave 0 to 23"),
        (lambda t, key: t.update({key: torch.tensor([0, 1])}), r"expected \(24, 3\) and \(3,\)"),
        (
            lambda t, key: t.update({f"{PREFIX}model.layers.9.q_proj.paca_delta": torch.ones(2)}),
            "has columns for",
        ),
        (
            lambda t, key: t.update({f"{PREFIX}lm_head.weight": torch.ones(2)}),
            "has '.*lm_head.weight', neither columns",
        ),
    ],
)
def test_a_damaged_folder_is_refused_and_the_base_left_alone(tmp_path, change, message):
    folder, base = peft_folder(tmp_path, tiny_llama()), tiny_llama()
    before = weights(base)
    damage(folder, change)
    with pytest.raises(CheckpointError, match=message):
        thawline.from_peft_paca(base, folder)
    assert weights(base).keys() == before.keys()
    assert not any("thawline" in type(module).__module__ for module in base.modules())


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json"):
        thawline.from_peft_paca(tiny_llama(), tmp_path)
    folder = peft_folder(tmp_path / "a", tiny_llama(), rank_pattern={"q_proj": 2})
    with pytest.raises(CheckpointError, match=r"rank_pattern=\{'q_proj': 2\}, which is not known"):
        thawline.from_peft_paca(tiny_llama(), folder)
    folder = peft_folder(tmp_path / "b", tiny_llama(), peft_type="LORA")
    with pytest.raises(CheckpointError, match="holds a LORA adapter; expected PACA"):
        thawline.from_peft_paca(tiny_llama(), folder)


def test_what_the_layout_cannot_say_is_refused(tmp_path):
    for model, message in (
        (wrap(tiny_llama(), rank_pattern={"q_proj": 2}), r"'.*' has r=.*no rank_pattern"),
        (wrap(Net(), bias="all"), r"bias='all', which PEFT's PaCA has not"),
        (wrap(torch.nn.Sequential(torch.nn.Conv2d(8, 2, 1)), target_modules=["0"]), "'0' is a Conv2d"),
    ):
        with pytest.raises(ConfigError, match=message):
            thawline.to_peft_paca(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
