"""Columns applied beside the weight: equal to columns inside it, and for weights that must not be written."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import thawline
from tests.support.models import VOCAB, tiny_llama
from tests.support.paca import Net, same, tokens, train, trainable, weights, wrap
from thawline import ConfigError, PacaConfig
from thawline.tuners.paca import PacaLayer


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16,
            n_layer=1,
            n_head=2,
            vocab_size=VOCAB,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 16, 3, groups=2, stride=2),
        nn.Conv2d(16, 32, 3, groups=16, padding="same"),
    )


BASES = {
    "linear": (net, {}, lambda: torch.randn(2, 5, 12)),
    "llama": (tiny_llama, {}, tokens),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}, tokens),
    "conv2d": (conv_net, {"target_modules": ["0", "1", "2"], "r": 3}, lambda: torch.randn(2, 4, 9, 8)),
}


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of the adapter."""
    y = model(x)
    y = getattr(y, "logits", y)
    y.square().mean().backward()
    return y.detach(), [p.grad for p in trainable(model)]


@pytest.mark.parametrize("base", BASES)
def test_outputs_and_gradients_equal_those_of_resident_columns(base):
    make, fields, inputs = BASES[base]
    resident = wrap(make().double(), init_weights=False, alpha=6, mode="resident", **fields)
    torch.manual_seed(1)
    additive = wrap(make().double(), init_weights=False, alpha=6, mode="additive", **fields)
    additive.load_state_dict(resident.state_dict())
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    (y, grads), (expected, expected_grads) = run(additive, x), run(resident, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12)
    assert same(weights(additive.unload()), weights(make().double()))


def test_the_gradient_of_the_input_is_that_of_the_changed_weight():
    resident = wrap(net().double(), init_weights=False)
    additive = wrap(net().double(), init_weights=False, mode="additive")
    additive.load_state_dict(resident.state_dict())
    grads = []
    for model in (resident, additive):
        x = torch.ones(3, 12, dtype=torch.float64, requires_grad=True)
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_at_the_start_the_output_is_the_bases_own_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_llama().to(dtype)
        with torch.no_grad():
            expected = base(tokens()).logits
            assert torch.equal(wrap(base, mode="additive")(tokens()).logits, expected)


def test_training_saves_loads_merges_and_converts_like_any_adapter(tmp_path):
    model = wrap(tiny_llama(), mode="additive")
    train(model)
    with torch.no_grad():
        expected = model.eval()(tokens()).logits
        model.save_pretrained(tmp_path / "a")
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
        assert torch.equal(again(tokens()).logits, expected)
        thawline.to_lora(model, tmp_path / "lora")
        lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
        torch.testing.assert_close(lora(tokens()).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, expected, rtol=0, atol=1e-5)


def test_two_models_share_one_base():
    base = tiny_llama()
    before = weights(base)
    models = [wrap(copy.copy(base), mode="additive", seed=seed) for seed in (0, 1)]
    for model in models:
        train(model)
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items() if key in before)


def test_tied_weights_are_adapted_beside_and_not_merged(caplog):
    llama = tiny_llama(tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING, "thawline"):
        model = wrap(llama, target_modules=["lm_head", "q_proj"])
    assert "1 of 3 adapted layers add their columns beside the weight" in caplog.text
    assert r"tied to ['model.embed_tokens']" in caplog.text
    embeddings = llama.model.embed_tokens.weight.clone()
    train(model)
    assert torch.equal(llama.model.embed_tokens.weight, embeddings)
    state = weights(model)
    with pytest.raises(ConfigError, match=r"'lm_head' cannot be merged. Its weight is tied.*to_lora works"):
        model.merge_and_unload()
    assert same(weights(model), state)


def test_an_offloaded_base_is_adapted_beside_its_weights(tmp_path):
    resident = wrap(tiny_llama(), init_weights=False)
    resident.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(
        cpu_offload(tiny_llama(), torch.device("cpu")), tmp_path, is_trainable=True
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, resident(tokens()).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(run(model, tokens())[1], run(resident, tokens())[1])


class ForwardOnly(nn.Module):
    """A quantised linear layer whose kernel runs forward, and whose weight nothing else can read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().mul(64).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) / 64)


def test_a_layer_that_only_runs_forward_is_adapted():
    base = nn.Sequential(ForwardOnly(nn.Linear(12, 10)), nn.Tanh(), ForwardOnly(nn.Linear(10, 3)))
    x = torch.randn(4, 12)
    with torch.no_grad():
        expected = base(x)
    model = wrap(base, target_modules=["0", "2"])
    assert torch.equal(model(x), expected)
    run(model, x)
    assert all(p.grad.abs().sum() > 0 for p in trainable(model))
    with pytest.raises(ConfigError, match="'0' cannot be merged. It is a ForwardOnly, which has no weight"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="The weight of '0' holds no columns"):
        thawline.pack_columns(model)
    with pytest.raises(ConfigError, match="'0' cannot be adapted with mode='resident'. It is a ForwardOnly"):
        wrap(model.unload(), target_modules=["0"], mode="resident")


# Rows of a batch with an adapter each.


def two_adapters(base: nn.Module, **fields: Any) -> PeftModel:
    model = wrap(base, init_weights=False, **fields)
    targets = list(model.peft_config["default"].target_modules)
    model.add_adapter("b", PacaConfig(r=3, init_weights=False, seed=1, target_modules=targets))
    return model.eval()


def one_at_a_time(model: PeftModel, names: list[str], call: Any) -> list[Tensor]:
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(call(model, slice(i, i + 1)))
        else:
            model.set_adapter(name)
            rows.append(call(model, slice(i, i + 1)))
    return rows


@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("base", ["llama", "conv2d"])
def test_each_row_runs_with_its_own_adapter(mode, base):
    make, fields, inputs = BASES[base]
    model = two_adapters(make(), mode=mode, **fields)
    x = torch.cat([inputs(), inputs()])
    names = ["b", "__base__", "default", "b"]

    def call(model, rows, **kwargs):
        y = model(x[rows], **kwargs) if base == "llama" else model.base_model(x[rows])
        return getattr(y, "logits", y)

    with torch.no_grad():
        expected = torch.cat(one_at_a_time(model, names, call))
        with model._enable_peft_forward_hooks(adapter_names=names):
            found = call(model, slice(None))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        model.set_adapter("default")
        again = call(model, slice(0, 1))
    assert torch.equal(again, one_at_a_time(model, ["default"], torch.no_grad()(call))[0]), (
        "rows are forgotten"
    )


def test_rows_have_their_own_adapter_where_several_are_active():
    model = two_adapters(net(), target_modules=["first"])
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        expected = torch.cat(one_at_a_time(model, ["b", "default"], lambda model, rows: model(x[rows])))
        model.base_model.set_adapter(["default", "b"])
        found = model(x, adapter_names=["b", "default"])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate_answers_each_row_with_its_own_adapter(kind, beams):
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, vocab_size=VOCAB)
        config.decoder_start_token_id = 0
        base: nn.Module = T5ForConditionalGeneration(config)
    else:
        base = tiny_llama()
    model = two_adapters(base)
    x, names = tokens().repeat(2, 1), ["b", "__base__", "default", "b"]

    def call(model, rows, **kwargs):
        return model.generate(
            input_ids=x[rows], max_new_tokens=6, min_new_tokens=6, num_beams=beams, do_sample=False, **kwargs
        )

    expected = torch.cat(one_at_a_time(model, names, call))
    assert torch.equal(call(model, slice(None), adapter_names=names), expected)


def test_rows_that_cannot_be_told_apart_are_refused():
    model = two_adapters(Net(), target_modules=["first"])
    for names, x, message in (
        (["b", "c"], torch.randn(2, 5, 12), "no adapter 'c'"),
        (["b", "__base__"], torch.randn(3, 5, 12), r"2 rows, but 'first' gets inputs \(3, 5, 12\)"),
        (["b", "__base__"], torch.randn(4, 12), r"cannot be told which row"),
    ):
        with pytest.raises(ConfigError, match=message):
            model(x, adapter_names=names)
    with pytest.raises(ConfigError, match=r"model is in training mode. Call model.eval\(\)"):
        model.train()(torch.randn(2, 12), adapter_names=["b", "__base__"])
    model.eval().merge_adapter()
    with pytest.raises(ConfigError, match="adapters are merged. Unmerge"):
        model(torch.randn(2, 12), adapter_names=["b", "__base__"])
    assert all(layer._state.rows is None for layer in model.modules() if isinstance(layer, PacaLayer))


def test_the_mode_is_a_choice():
    with pytest.raises(ConfigError, match="Unknown mode='inside'. Available: additive, auto, resident"):
        PacaConfig(mode="inside")
