"""An adapter as stock LoRA: loaded by PEFT alone, it changes the base in the same way."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import thawline
from tests.support.models import VOCAB, tiny_llama
from tests.support.paca import IN, B, Net, T, tokens, train, wrap
from thawline import ConfigError, PacaConfig


def logits(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(*inputs)
    return getattr(out, "logits", out)


def reloaded(base: nn.Module, folder) -> PeftModel:
    model = PeftModel.from_pretrained(base, folder)
    assert type(model.base_model).__name__ == "LoraModel"
    return model


def test_a_trained_llama_equals_its_lora(tmp_path):
    model = wrap(tiny_llama(), alpha=6, rank_pattern={"down_proj": 7})
    train(model)
    thawline.to_lora(model, tmp_path)
    torch.testing.assert_close(
        logits(reloaded(tiny_llama(), tmp_path), tokens()), logits(model, tokens()), rtol=0, atol=1e-6
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 4
    assert set(config["rank_pattern"].values()) == {4, 7}
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_conv1d(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=16)
    base = GPT2LMHeadModel(config)
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = get_peft_model(
        base, PacaConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"], init_weights=False)
    )
    thawline.to_lora(model, tmp_path)
    fresh = GPT2LMHeadModel(config)
    fresh.load_state_dict(state)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        lora = reloaded(fresh, tmp_path)
    torch.testing.assert_close(logits(lora, tokens()), logits(model, tokens()), rtol=0, atol=1e-6)


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(5, 6, (3, 2), stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))


def test_a_convolution_takes_r_times_its_kernel(tmp_path):
    x = torch.randn(2, 5, 9, 8)
    model = get_peft_model(
        conv_net(), PacaConfig(r=2, alpha=6, target_modules=["0", "2"], init_weights=False)
    )
    thawline.to_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {"0": 12, "2": 2}
    torch.testing.assert_close(logits(reloaded(conv_net(), tmp_path), x), logits(model, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "conv"),
    [
        ("groups=2", nn.Conv2d(4, 6, 3, groups=2)),
        ("dilation=(2, 1)", nn.Conv2d(4, 6, 3, dilation=(2, 1))),
        ("padding_mode=reflect", nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
    ],
)
def test_a_convolution_that_lora_cannot_express_is_refused(tmp_path, field, conv):
    model = get_peft_model(nn.Sequential(conv), PacaConfig(r=1, target_modules=["0"]))
    with pytest.raises(ConfigError) as error:
        thawline.to_lora(model, tmp_path)
    assert field in str(error.value)
    assert "merge_and_unload" in str(error.value)


@pytest.mark.parametrize("bias", ["none", "all", "paca_only"])
def test_modules_saved_whole_and_biases_come_along(tmp_path, bias):
    torch.manual_seed(0)
    base = Net()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = wrap(base, modules_to_save=["head"], bias=bias)
    train(model)
    thawline.to_lora(model, tmp_path)
    fresh = Net()
    fresh.load_state_dict(state)
    x = torch.randn(B, T, IN)
    torch.testing.assert_close(logits(reloaded(fresh, tmp_path), x), logits(model, x), rtol=0, atol=1e-6)


def test_a_namesake_elsewhere_stays_out(tmp_path):
    def make() -> nn.ModuleDict:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})
        return nn.ModuleDict({"fc": nn.Linear(4, 4), "inner": inner})

    model = get_peft_model(make(), PacaConfig(r=2, target_modules="^fc$", init_weights=False))
    thawline.to_lora(model, tmp_path)
    lora = reloaded(make(), tmp_path)
    assert [n for n, m in lora.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.fc"]


def test_from_a_model_with_injected_adapters_and_by_name(tmp_path):
    base = Net()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = inject_adapter_in_model(
        PacaConfig(r=2, target_modules=["first"], init_weights=False), base, "mine"
    )
    thawline.to_lora(model, tmp_path, adapter_name="mine")
    fresh = Net()
    fresh.load_state_dict(state)
    x = torch.randn(B, IN)
    torch.testing.assert_close(logits(reloaded(fresh, tmp_path), x), logits(model, x), rtol=0, atol=1e-6)


def test_of_two_adapters_the_active_or_the_named_one(tmp_path):
    torch.manual_seed(0)
    base = Net()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = wrap(base, init_weights=False)
    model.add_adapter("other", PacaConfig(r=3, target_modules=["first"], init_weights=False))
    thawline.to_lora(model, tmp_path / "active")
    thawline.to_lora(model, tmp_path / "named", adapter_name="other")
    x = torch.randn(B, IN)
    for folder, name in (("active", "default"), ("named", "other")):
        fresh = Net()
        fresh.load_state_dict(state)
        model.set_adapter(name)
        torch.testing.assert_close(
            logits(reloaded(fresh, tmp_path / folder), x), logits(model, x), rtol=0, atol=1e-6
        )


def test_mistakes_are_named(tmp_path):
    model = wrap(Net())
    with pytest.raises(ConfigError, match=r"no adapter 'defualt'.*Did you mean 'default'"):
        thawline.to_lora(model, tmp_path, adapter_name="defualt")
    with pytest.raises(ConfigError, match=r"task='x': a PaCA adapter serves one task"):
        thawline.to_lora(model, tmp_path, task="x")
    lora = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(ConfigError, match=r"type LORA.*save_pretrained"):
        thawline.to_lora(lora, tmp_path)


def test_pefts_own_conversion_agrees():
    from peft import convert_to_lora

    torch.manual_seed(0)
    model = wrap(Net(), init_weights=False)
    _, state = convert_to_lora(model, rank=4)
    for part in ("first", "second"):
        layer = getattr(model.base_model.model, part)
        b, a = (state[f"base_model.model.{part}.lora_{x}.weight"] for x in "BA")
        torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), rtol=0, atol=1e-6)
