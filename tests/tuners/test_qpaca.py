"""QPaCA: columns are written into a dequantised copy of a quantised weight, for each product."""

from __future__ import annotations

import copy
import json
import logging
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import thawline
from tests.support.models import tiny_llama
from tests.support.paca import tokens, train, trainable, wrap
from tests.support.quantised import Hqq, bnb_layer, hqq_layer, torchao_layer
from thawline import ConfigError
from thawline.bench.quantised import ReferenceLinear
from thawline.measure import saved_bytes
from thawline.ops.dequantised_linear import dequantised_linear
from thawline.tuners.paca import PacaLinear
from thawline.tuners.paca.quantised import BITSANDBYTES, dequantise, merge_and_dequantise

IN, OUT = 128, 64


@pytest.fixture(params=["hqq", "nf4", "int8", "torchao", "hqq itself"])
def base(request) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(IN, OUT), nn.Linear(OUT, IN)]
    others = {"hqq": Hqq, "torchao": torchao_layer, "hqq itself": hqq_layer}
    make = others.get(request.param) or partial(bnb_layer, kind=request.param)
    return nn.Sequential(make(layers[0]), nn.Tanh(), make(layers[1]))


def adapt(base: nn.Module, **fields) -> PeftModel:
    return wrap(base, target_modules=["0", "2"], **fields)


def dense(model: PeftModel) -> nn.Module:
    """The same network with plain weights, columns written by hand."""
    plain = copy.deepcopy(model).merge_and_unload().float()
    for name, layer in model.base_model.model.named_children():
        if isinstance(layer, PacaLinear):
            weight = dequantise(layer.base_layer).float()
            plain.get_submodule(name).weight.data = weight + layer.get_delta_weight("default")
            plain.get_submodule(name).bias.data = layer.base_layer.bias.data.float()
    return plain


def test_the_start_is_the_quantised_base_in_training_and_evaluation(base):
    x = torch.randn(4, 3, IN)
    expected = base.train()(x.clone().requires_grad_()).detach()
    # torchao multiplies with the scales after the sum, the others before.
    atol = 1e-5 if isinstance(base[0], nn.Linear) and "torchao" in type(base[0].weight).__module__ else 0
    model = adapt(base)
    for module in (model.train(), model.eval()):
        torch.testing.assert_close(module(x), expected, rtol=0, atol=atol)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=atol)


def test_gradients_are_those_of_the_dequantised_weight(base):
    model = adapt(base, init_weights=False, alpha=6)
    plain = dense(model)
    plain.requires_grad_(True)
    x = torch.randn(4, 3, IN, requires_grad=True)
    model(x).square().sum().backward()
    ours, x.grad = x.grad, None
    plain(x).square().sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-4, atol=1e-4)
    for name in ("0", "2"):
        layer = model.base_model.model.get_submodule(name)
        index = layer.thawline_paca_indices["default"]
        expected = plain.get_submodule(name).weight.grad[:, index] * layer.scaling["default"]
        torch.testing.assert_close(layer.thawline_paca_delta["default"].grad, expected, rtol=1e-4, atol=1e-4)


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    weight = torch.randn(5, 7, dtype=torch.float64)
    columns = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 6])

    def run(x: Tensor, columns: Tensor) -> Tensor:
        return dequantised_linear(x, None, weight.clone, [columns], [index], [0.5])

    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, columns))
    assert torch.equal(weight, weight.clone())


def test_all_linear_reaches_layers_of_any_quantisation(base):
    holder = nn.ModuleDict({"inner": base, "head": nn.Linear(IN, 2)})
    layers = wrap(holder, target_modules="all-linear").base_model.model["inner"]
    assert [isinstance(layer, PacaLinear) for layer in layers] == [True, False, True]


def test_all_linear_leaves_a_quantised_output_head_out():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Hqq(nn.Linear(IN, OUT)), Hqq(nn.Linear(OUT, IN))

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = wrap(Model(), target_modules="all-linear").base_model.model
    assert isinstance(model.inner, PacaLinear)
    assert isinstance(model.head, Hqq)


def test_nothing_of_full_weight_size_is_kept(base):
    model = adapt(base, r=4)
    x = torch.randn(8, IN, requires_grad=True)
    kept = saved_bytes(lambda: model(x).square().sum(), model.parameters())
    itself = sum(buffer.nbytes for buffer in model.buffers())
    assert kept <= 8 * 4 * (2 * 4 + OUT + IN) + itself + 64, kept


def test_a_merged_model_is_plain_and_equal_to_bf16(base):
    model = adapt(base, init_weights=False)
    expected = dense(model).bfloat16()
    with pytest.raises(ConfigError, match="'0' is quantised: merging into it would round.*merge_and_unload"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="'0' holds no columns"):
        thawline.pack_columns(model)
    merged = model.merge_and_unload()
    assert [type(layer) for layer in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor)


def test_a_merged_model_has_one_type_and_runs(base):
    network = nn.Sequential(base[0], nn.LayerNorm(OUT), base[2], nn.Linear(IN, 3))
    merged = adapt(network).merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert merged(torch.randn(4, IN).bfloat16()).dtype is torch.bfloat16


def test_training_moves_columns_and_saves_them(base, tmp_path):
    model, x = adapt(copy.deepcopy(base), selection="weight_norm"), torch.randn(8, IN)
    before = model(x).square().mean().item()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    for _ in range(10):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert model.eval()(x).square().mean() < before
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


def test_a_model_of_transformers_is_quantised_adapted_and_exported_plain(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantised = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised)
    model = wrap(base, target_modules=["q_proj", "down_proj"])
    train(model, steps=2)
    with torch.no_grad():
        expected = model.eval()(tokens()).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens()).logits, expected.float(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_reference_in_torch_stores_what_bitsandbytes_stores(kind):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    ours = ReferenceLinear(linear, kind).dequantize()
    theirs = dequantise(bnb_layer(linear, kind))
    # bitsandbytes quantises the scales again, by up to a percent; int8 rounds in half precision first.
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_reference_in_torch_is_near_the_weight(kind):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    layer, x = ReferenceLinear(linear, kind), torch.randn(3, IN)
    apart = (layer.dequantize() - linear.weight).norm() / linear.weight.norm()
    assert apart < {"nf4": 0.12, "int8": 0.01}[kind], apart
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantize(), linear.bias))
    second = ReferenceLinear(nn.Linear(OUT, IN), kind)
    model = adapt(nn.Sequential(layer, nn.Tanh(), second), init_weights=False)
    torch.testing.assert_close(model(x), dense(model)(x))


def test_requantising_in_place_is_asked_for_by_name_and_says_what_it_changes(base, caplog):
    x, original = torch.randn(5, IN), copy.deepcopy(base)
    model = adapt(base, init_weights=False).eval()
    if type(original[0]._parameters.get("weight")).__name__ not in BITSANDBYTES:
        kind = type(original[0]).__name__
        with pytest.raises(ConfigError, match=f"'0' is a {kind}: only layers of bitsandbytes"):
            model.merge_and_requantise({"input": x})
        return
    expected = model(x)
    with caplog.at_level(logging.WARNING):
        merged = model.merge_and_requantise({"input": x})
    assert [type(layer) for layer in merged] == [type(layer) for layer in original]
    assert not any(isinstance(layer, PacaLinear) for layer in merged.modules())
    found = nn.functional.linear(x, dequantise(merged[0]).float(), merged[0].bias)
    found = nn.functional.linear(torch.tanh(found), dequantise(merged[2]).float(), merged[2].bias)
    change = (found - expected).abs().max().item()
    said = float(caplog.text.split("by up to ")[1].split(";")[0])
    assert change > 0
    assert said == pytest.approx(change, rel=0.05)
    apart = (found - expected).norm() / expected.norm()
    assert apart < 0.2, apart


def test_requantising_needs_quantised_layers():
    with pytest.raises(ConfigError, match="no adapted layer is quantised"):
        adapt(nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))).merge_and_requantise({})


def test_lora_on_a_quantised_base_is_merged_into_a_plain_model(base):
    x = torch.randn(5, IN)
    if isinstance(base[0], Hqq):
        base = nn.Sequential(*(ReferenceLinear(nn.Linear(*size), "nf4") for size in ((IN, OUT), (OUT, IN))))
    names = [str(number) for number, layer in enumerate(base) if hasattr(layer, "in_features")]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()
    weights = [
        dequantise(layer.base_layer).float() + layer.get_delta_weight("default")
        for layer in model.base_model.model
        if hasattr(layer, "lora_A")
    ]
    merged = merge_and_dequantise(model)
    plain = [layer for layer in merged if type(layer) is nn.Linear]
    for layer, weight in zip(plain, weights, strict=True):
        assert torch.equal(layer.weight, weight.bfloat16())
    assert merged(x.bfloat16()).dtype is torch.bfloat16


def test_dora_on_a_quantised_base_is_refused():
    base = nn.Sequential(ReferenceLinear(nn.Linear(IN, OUT), "nf4"))
    config = LoraConfig(r=4, target_modules=["0"])
    model = get_peft_model(base, config)
    model.base_model.model[0].lora_variant["default"] = object()
    with pytest.raises(ConfigError, match="'0' is quantised, and its adapter a variant of LoRA"):
        merge_and_dequantise(model)


def test_a_base_quantised_in_an_unknown_way_is_adapted_beside_the_weight_or_refused_by_name(caplog):
    class Unknown(Hqq):
        dequantize = None

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, Hqq.dequantize(self), self.bias)

    torch.manual_seed(0)
    base = nn.Sequential(Unknown(nn.Linear(IN, OUT)), nn.Tanh(), Unknown(nn.Linear(OUT, IN)))
    x = torch.randn(4, IN)
    expected = base(x)
    with caplog.at_level(logging.WARNING):
        model = adapt(copy.deepcopy(base))
    assert "2 of 2 adapted layers add their columns beside the weight" in caplog.text
    assert torch.equal(model(x), expected)
    with pytest.raises(ConfigError, match="'0' cannot be adapted with mode='resident'. It is a Unknown"):
        adapt(copy.deepcopy(base), mode="resident")
    plain = nn.Linear(IN, OUT)
    plain.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.uint8), requires_grad=False)
    broken = nn.Sequential(plain, nn.Tanh(), nn.Linear(OUT, IN))
    with pytest.raises(ConfigError, match="'0' is Parameter of torch.uint8: quantised, in a Linear"):
        adapt(broken)
    assert type(broken[0]) is nn.Linear
