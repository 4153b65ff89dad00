"""PaCA on experts that transformers keeps in one weight: Mixtral, Qwen3-MoE, gpt-oss."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import thawline
from tests.support.models import SIZES, gpt_oss, mixtral
from tests.support.paca import tokens, trainable
from thawline import ConfigError, MHRConfig, PacaConfig
from thawline.measure import saved_bytes
from thawline.ops.grouped import add_grouped_columns, grouped_product, tap_grouped_columns
from thawline.tuners.experts import join_experts, split_experts


def qwen3_moe() -> nn.Module:
    sizes = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 6}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))


BUILDERS = [mixtral, qwen3_moe, gpt_oss]
WEIGHTS = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]


@pytest.fixture(params=BUILDERS, ids=lambda build: build.__name__)
def base(request) -> nn.Module:
    torch.manual_seed(0)
    base = request.param()
    for name, parameter in base.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.2)
    return base


def adapt(base: nn.Module, **fields) -> PeftModel:
    return get_peft_model(copy.deepcopy(base), PacaConfig(**{"r": 3, "target_modules": ["experts"]} | fields))


def layers(model: PeftModel) -> dict[str, nn.Module]:
    return {name: model.base_model.model.get_submodule(name) for name in WEIGHTS}


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(), labels=tokens()).loss


def merged(base: nn.Module, model: PeftModel) -> nn.Module:
    """The base with the changes written by hand."""
    plain = copy.deepcopy(base)
    for name, layer in layers(model).items():
        plain.get_parameter(name).data += layer.get_delta_weight("default")
    return plain


def test_the_start_is_the_base_bit_for_bit(base):
    model = adapt(base)
    assert sorted(model.base_model.targeted_module_names) == sorted(WEIGHTS)
    assert torch.equal(logits(model), logits(base))
    base.config._experts_implementation = "eager"
    torch.testing.assert_close(logits(model), logits(base))


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_gradients_are_slices_of_the_dense_ones(base, mode):
    model = adapt(base, init_weights=False, alpha=6, mode=mode)
    plain = merged(base, model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    loss(model).backward()
    plain.config._experts_implementation = "eager"  # a loop over experts, for comparison
    loss(plain).backward()
    for name, layer in layers(model).items():
        dense = layer.columns_of(plain.get_parameter(name).grad)
        index, delta = layer.thawline_paca_indices["default"], layer.thawline_paca_delta["default"]
        assert delta.grad.abs().sum() > 0
        expected = dense[:, index] * layer.scaling["default"]
        torch.testing.assert_close(delta.grad, expected, rtol=1e-4, atol=1e-6)


def test_an_expert_without_tokens_gets_no_gradient_and_double_precision_works():
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 4, dtype=torch.float64)
    columns = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    index, ends = torch.tensor([0, 3]), torch.tensor([4, 4, 7], dtype=torch.int32)

    def beside(x: Tensor, columns: Tensor) -> Tensor:
        return add_grouped_columns(grouped_product(x, weight, ends), x[:, index], columns, ends, 0.5)

    assert torch.autograd.gradcheck(beside, (x, columns))
    inside = weight.index_add(1, index, columns.detach(), alpha=0.5)
    y = tap_grouped_columns(grouped_product(x, inside, ends), x, columns, index, ends, 0.5)
    target = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, columns), target)
    expected = torch.autograd.grad(beside(x, columns), (x, columns), target)
    torch.testing.assert_close(found, expected)
    assert not found[1][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_by_one_kernel_equal_those_of_a_loop(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(9, 16, dtype=dtype), torch.randn(3, 8, 16, dtype=dtype).transpose(1, 2)
    ends = torch.tensor([2, 2, 9], dtype=torch.int32)
    expected = torch.cat([x[:2] @ weight[0], x[2:] @ weight[2]])
    torch.testing.assert_close(grouped_product(x, weight, ends), expected)
    columns = torch.zeros(3, 3, 8, requires_grad=True)
    y = tap_grouped_columns(expected, x, columns, torch.tensor([1, 5, 9]), ends)
    grad = torch.randn_like(y)
    y.backward(grad)
    for expert, rows in enumerate((slice(0, 2), slice(0, 0), slice(2, 9))):
        found = columns.grad[expert].to(dtype)
        torch.testing.assert_close(found, x[rows][:, [1, 5, 9]].t() @ grad[rows])


def test_nothing_of_the_inputs_is_kept_but_the_columns():
    torch.manual_seed(0)
    base = qwen3_moe()
    model = adapt(base)
    experts = base.model.layers[0].mlp.experts
    ours = model.base_model.model.model.layers[0].mlp.experts
    x = torch.randn(40, 24, requires_grad=True)
    chosen, weights = torch.randint(0, 4, (40, 2)), torch.rand(40, 2, requires_grad=True)
    experts.requires_grad_(False)
    floor = saved_bytes(lambda: experts(x, chosen, weights).sum(), experts.parameters())
    kept = saved_bytes(lambda: ours(x, chosen, weights).sum(), [*ours.parameters(), *ours.buffers()])
    columns = 2 * 80 * 3 * 4
    assert kept <= floor + columns + 64, (kept, floor)


def test_compiled_experts_equal_eager_ones():
    torch.manual_seed(0)
    experts = adapt(qwen3_moe(), init_weights=False).base_model.model.model.layers[0].mlp.experts
    inputs = torch.randn(9, 24), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    found = []
    for run in (experts, torch.compile(experts, backend="eager")):
        y = run(*inputs)
        y.float().square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in experts.parameters() if p.requires_grad)])
        experts.zero_grad()
    torch.testing.assert_close(*found)


def test_checkpointing_changes_no_gradient(base):
    model = adapt(base, init_weights=False).train()
    gradients = []
    for _ in range(2):
        loss(model).backward()
        gradients.append([p.grad.clone() for p in trainable(model)])
        model.zero_grad()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(map(torch.equal, *gradients))


def test_training_saves_loads_and_merges(base, tmp_path):
    model = adapt(base, target_modules="all-linear")
    before = loss(model).item()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02, fused=True)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert loss(model).item() < before
        expected = logits(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(base))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin), expected)
        plain = model.merge_and_unload()
        assert torch.equal(logits(plain), expected)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert {type(module) for module in plain.modules()} == {type(module) for module in base.modules()}


def test_unloading_gives_the_base_back_bit_for_bit(base):
    model = adapt(base, init_weights=False)
    logits(model)
    plain = model.unload()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), base.parameters(), strict=True))
    assert torch.equal(logits(plain), logits(base))
    get_peft_model(plain, PacaConfig(r=2, target_modules=["q_proj"]))
    assert "model.layers.0.mlp.experts.down_proj" in dict(plain.named_parameters())  # untouched again


@pytest.mark.parametrize("target", ["mlp.experts", ["down_proj"], r".*layers\.0\.mlp\.experts\.gate_up_proj"])
def test_experts_go_by_their_names(base, target):
    targets = [target] if target == "mlp.experts" else target
    names = adapt(base, target_modules=targets).base_model.targeted_module_names
    expected = {
        "mlp.experts": WEIGHTS,
        "['down_proj']": [name for name in WEIGHTS if name.endswith("down_proj")],
    }.get(str(target), WEIGHTS[:1])
    assert sorted(names) == sorted(expected)


def test_all_linear_reaches_experts_unless_they_are_excluded(base, caplog):
    with caplog.at_level(logging.WARNING):
        every = adapt(base, target_modules="all-linear").base_model.targeted_module_names
        assert set(WEIGHTS) < set(every)
        rest = adapt(base, target_modules="all-linear", exclude_modules=["experts"])
    assert set(rest.base_model.targeted_module_names) == set(every) - set(WEIGHTS)
    assert not [message for message in caplog.messages if "all-linear" in message]


def test_a_second_adapter_and_calibrated_columns(base):
    batch = {"input_ids": tokens(), "labels": tokens()}
    names = [type(module) for module in base.modules()]
    for selection in ("activation", "gradient"):
        config = PacaConfig(r=3, target_modules=["experts", "q_proj"], selection=selection)
        config = thawline.select_columns(base, config, [batch])
        assert [type(module) for module in base.modules()] == names
        assert set(WEIGHTS) < set(config.indices)
    model = adapt(base, init_weights=False)
    first = logits(model)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(base))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_a_router_is_trained_whole(base):
    name = "router" if isinstance(base, GptOssForCausalLM) else "gate"
    with pytest.raises(ConfigError, match=f"mlp.{name}' is a .*modules_to_save"):
        adapt(base, target_modules=["experts", name])
    model = adapt(base, modules_to_save=[name])
    loss(model).backward()
    assert [n for n, p in model.named_parameters() if f".{name}." in n and p.grad is not None]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda model, path: thawline.to_peft_paca(model, path), "is a ExpertsLinear"),
        (
            lambda model, path: model.eval()(tokens(), adapter_names=["default", "__base__"]),
            "adapter_names: .*experts",
        ),
    ],
    ids=["to_peft_paca", "adapter_names"],
)
def test_what_cannot_be_said_of_experts_is_refused(tmp_path, call, match):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=match):
        call(adapt(qwen3_moe()), tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["down_proj"]},
        {"target_modules": "all-linear", "rank_pattern": {"experts.down_proj": 5, "q_proj": 2}},
    ],
)
def test_lora_of_pefts_says_the_same(base, tmp_path, fields):
    model = adapt(base, init_weights=False, alpha=6, **fields).eval()
    thawline.to_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not torch.allclose(logits(lora), logits(base), atol=1e-3)
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-4, atol=1e-5)


def test_columns_of_experts_are_sent_to_another_copy(base):
    model, receiver = adapt(base, target_modules="all-linear", init_weights=False), copy.deepcopy(base)
    packed = thawline.pack_columns(model)
    thawline.apply_columns(receiver, packed)
    assert torch.equal(logits(receiver), logits(model))
    model.add_adapter("b", PacaConfig(r=2, target_modules="all-linear", init_weights=False, seed=1))
    model.set_adapter("b")
    thawline.apply_columns(receiver, thawline.pack_columns(model, since=packed))
    assert torch.equal(logits(receiver), logits(model))


def test_mhr_on_experts_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"experts.*PaCA reaches.*MHR does not: .*each row's task"):
        get_peft_model(qwen3_moe(), MHRConfig(r=2, target_modules=["experts"], n_tasks=2))


def test_a_failure_changes_nothing(base):
    before = dict(base.named_parameters())
    with pytest.raises(ConfigError, match="no module of"):
        get_peft_model(base, PacaConfig(r=2, target_modules=["experts", "nothing"]))
    assert list(base.named_parameters()) == list(before.items())
    split_experts(base, lambda name: False)
    join_experts(base)
    assert list(base.named_parameters()) == list(before.items())
