"""An adapter of a folder takes the place of a loaded one, in place."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import thawline
from tests.support.paca import IN, B, Net, T, same, train, trainable, weights, wrap
from thawline import CheckpointError, ConfigError

FILE = "adapter_model.safetensors"


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def folder(base, tmp_path):
    """Another adapter, trained, with other columns and another scale."""
    model = wrap(base, seed=7, alpha=6.0)
    train(model)
    model.save_pretrained(tmp_path / "other")
    expected = model(inputs()).detach()
    model.unload()
    return tmp_path / "other", expected


def inputs() -> torch.Tensor:
    return torch.randn(B, T, IN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_the_folders_adapter_replaces_the_loaded_one(base, folder, mode):
    path, expected = folder
    original = weights(base)
    model = wrap(base, mode=mode, init_weights=False)
    parameters = trainable(model)
    before = model(inputs())
    thawline.hotswap(model, path)
    found = model(inputs())
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, expected)
    assert all(a is b for a, b in zip(trainable(model), parameters, strict=True))
    train(model)
    model.save_pretrained(path)
    assert json.loads((path / "adapter_config.json").read_text())["alpha"] == 6.0
    assert same(weights(model.unload()), original)


def test_a_compiled_model_is_not_compiled_again(base, folder):
    path, expected = folder
    counter = CompileCounter()
    model = wrap(base, init_weights=False).eval()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(inputs())
        thawline.hotswap(compiled, path)
        torch.testing.assert_close(compiled(inputs()), expected)
    assert counter.frame_count == 1


def damage(path, fault) -> None:
    tensors = load_file(path / FILE)
    index, delta = (next(key for key in tensors if key.endswith(end)) for end in ("indices", "delta"))
    if fault == "missing":
        del tensors[delta]
    elif fault == "more":
        tensors["base_model.model.head.weight"] = torch.zeros(3, 7)
    elif fault == "shape":
        tensors[delta] = tensors[delta][:, :2].contiguous()
    elif fault == "outside":
        tensors[index] = tensors[index] + 100
    elif fault == "repeated":
        tensors[index] = torch.zeros_like(tensors[index])
    save_file(tensors, path / FILE)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("missing", "lacks '.*first.thawline_paca_delta', unlike adapter 'default'"),
        ("more", "has 'base_model.model.head.weight'"),
        ("shape", r"is \(10, 2\), and of adapter 'default' \(10, 4\)"),
        ("outside", "column 10. of 'first', which has 12 input features"),
        ("repeated", "indices of 'first' repeat"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_nothing_is_changed(base, folder, fault, match):
    path, _ = folder
    damage(path, fault)
    model = wrap(base, init_weights=False)
    before = weights(model)
    with pytest.raises(CheckpointError, match=match):
        thawline.hotswap(model, path)
    assert same(weights(model), before)
    assert model.peft_config["default"].alpha is None


def test_other_methods_merged_and_unknown_adapters_are_refused(base, folder, tmp_path):
    path, _ = folder
    lora = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))
    lora.save_pretrained(tmp_path / "lora")
    model = wrap(base)
    with pytest.raises(CheckpointError, match="holds a LORA adapter"):
        thawline.hotswap(model, tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        thawline.hotswap(model, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no adapter 'secnd'"):
        thawline.hotswap(model, path, "secnd")
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        thawline.hotswap(model, path)
