"""The layers: mathematics, shapes, dtypes, and the weight that is never lost."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.support.models import tiny_llama
from tests.support.paca import (
    IN,
    OUT,
    B,
    Net,
    T,
    bits,
    loss_of,
    same,
    tokens,
    train,
    trainable,
    weights,
    wrap,
)
from thawline import PacaConfig
from thawline.tuners.paca import PacaConv2d, PacaLinear


def one_layer(base: nn.Module, r: int = 3, alpha: float | None = None, **fields) -> PacaLinear:
    model = get_peft_model(nn.Sequential(base), PacaConfig(r=r, alpha=alpha, target_modules=["0"], **fields))
    return model.base_model.model[0]


def test_output_at_the_start_is_the_bases_bit_for_bit():
    base = tiny_llama().eval()
    expected = base(tokens()).logits
    model = wrap(base)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(tokens()).logits, expected)


def test_output_at_the_start_is_the_bases_in_bfloat16_and_under_autocast():
    base = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(tokens()).logits
    model = wrap(base)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens()).logits, expected)
    base = tiny_llama().bfloat16()
    expected = base(tokens()).logits
    assert torch.equal(wrap(base)(tokens()).logits, expected)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (lambda: nn.Linear(8, 5), (3, 8)),
        (lambda: Conv1D(5, 8), (3, 8)),
        (lambda: nn.Conv2d(8, 4, 3), (2, 8, 6, 7)),
        (lambda: nn.Conv2d(8, 4, 3, groups=2), (2, 8, 6, 7)),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 7)),
    ],
    ids=["Linear", "Conv1D", "Conv2d", "grouped", "depthwise"],
)
def test_output_at_the_start_is_the_bases_of_every_kind_of_layer(base, shape, dtype, mode):
    layer, x = base().to(dtype).train(mode), torch.randn(shape, dtype=dtype)
    expected = layer(x)
    assert torch.equal(bits(one_layer(layer).train(mode)(x)), bits(expected))


@pytest.mark.parametrize("shape", [(IN,), (T, IN), (B, T, IN), (B, 3, T, IN)], ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("make", [lambda: nn.Linear(IN, OUT), lambda: nn.Linear(IN, OUT, bias=False), lambda:
Conv1D(OUT, IN)],
                         ids=["Linear", "no bias", "Conv1D"])  # fmt: skip
def test_gradient_is_the_scaled_dense_gradient_of_the_columns(shape, make):
    base = make().double()
    x = torch.randn(*shape, dtype=torch.double)
    layer = one_layer(base, alpha=6.0)
    layer(x).square().sum().backward()

    weight = base.weight.detach().clone().requires_grad_()
    dense = torch.func.functional_call(base, {"weight": weight}, (x,)).square().sum()
    (gradient,) = torch.autograd.grad(dense, weight)
    gradient = gradient if isinstance(base, nn.Linear) else gradient.t()
    ours = layer.thawline_paca_delta["default"].grad
    torch.testing.assert_close(ours, 2.0 * gradient[:, layer.thawline_paca_indices["default"]])


def test_gradcheck_through_the_written_weight():
    layer = one_layer(nn.Linear(IN, OUT).double(), alpha=6.0, init_weights=False)
    delta = layer.thawline_paca_delta["default"]

    def run(x, delta):
        layer.write()  # gradcheck moves δ behind everybody's back
        return layer(x)

    assert torch.autograd.gradcheck(run, (torch.randn(T, IN, dtype=torch.double, requires_grad=True), delta))


CONVS = {
    "plain": {"in_channels": 6, "out_channels": 4, "kernel_size": 3},
    "grouped": {"in_channels": 8, "out_channels": 4, "kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"in_channels": 6, "out_channels": 12, "kernel_size": 3, "groups": 6, "stride": 2},
}


@pytest.mark.parametrize("kind", CONVS)
def test_a_convolution_with_every_channel_selected_trains_like_the_convolution(kind):
    reference = nn.Conv2d(**CONVS[kind]).double()
    base = nn.Conv2d(**CONVS[kind]).double()
    base.load_state_dict(reference.state_dict())
    layer = one_layer(base, r={"plain": 6, "grouped": 4, "depthwise": 6}[kind])
    assert isinstance(layer, PacaConv2d)
    optimizers = [
        torch.optim.AdamW([reference.weight], lr=0.1, weight_decay=0.0),
        torch.optim.AdamW(trainable(layer), lr=0.1, weight_decay=0.0),
    ]
    x = torch.randn(2, CONVS[kind]["in_channels"], 7, 8, dtype=torch.double)
    for _ in range(4):
        losses = [module(x).square().mean() for module in (reference, layer)]
        torch.testing.assert_close(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_all_columns_train_like_full_fine_tuning_decaying_to_the_pretrained_values(optimizer, decay):
    torch.manual_seed(1)
    reference, base = Net().double(), Net().double()
    base.load_state_dict(reference.state_dict())
    pretrained = [reference.first.weight.detach().clone(), reference.second.weight.detach().clone()]
    model = wrap(base, r=IN, rank_pattern={"second": OUT})
    full = [reference.first.weight, reference.second.weight]
    # Decay to the pretrained value, spelled out: shrink the distance before the step, as AdamW and δ do.
    lr = 0.05
    steppers = [
        optimizer(full, lr=lr, weight_decay=0.0),
        optimizer(trainable(model), lr=lr, weight_decay=decay),
    ]
    for step in range(5):
        losses = [loss_of(reference, step), loss_of(model, step)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-13)
        for loss, stepper in zip(losses, steppers, strict=True):
            stepper.zero_grad()
            loss.backward()
        with torch.no_grad():
            for weight, start in zip(full, pretrained, strict=True):
                if optimizer is torch.optim.AdamW:
                    weight.copy_(start + (weight - start) * (1 - lr * decay))
                else:
                    weight.grad += decay * (weight - start)
        for stepper in steppers:
            stepper.step()


def test_trainable_count_is_r_times_outputs_and_adam_keeps_twice_that():
    model = wrap(tiny_llama(), r=3)
    outputs = [24, 12, 12, 24, 36, 36, 24] * 2
    assert sum(p.numel() for p in trainable(model)) == 3 * sum(outputs)
    optimizer = torch.optim.AdamW(trainable(model))
    loss_of(model).backward()
    optimizer.step()
    state = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert sum(v.numel() for v in state) == 2 * 3 * sum(outputs)


def test_other_weights_are_untouched_for_ever_and_all_come_back():
    base = tiny_llama()
    before = weights(base)
    model = wrap(base)
    train(model)
    for name, module in model.named_modules():
        if isinstance(module, PacaLinear):
            weight = module.base_layer.weight
            rest = torch.ones(weight.shape[1], dtype=torch.bool)
            rest[module.thawline_paca_indices["default"]] = False
            original = before[f"{name.removeprefix('base_model.model.')}.weight"]
            assert torch.equal(weight[:, rest], original[:, rest])
            assert not torch.equal(weight[:, ~rest], original[:, ~rest])
    assert same(weights(model.unload()), before)


def test_a_negative_zero_survives():
    base = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        base.weight.fill_(-0.0)
    before = bits(base.weight).clone()
    layer = one_layer(base, r=4)
    layer(torch.randn(2, 4)).sum().backward()
    layer.evict()
    assert torch.equal(bits(base.weight), before)


def test_small_steps_are_not_lost_on_a_bfloat16_base():
    # 100 steps of 1e-5 on weights around 0.02 are below bf16's resolution one by one; together they are not.
    base = nn.Linear(64, 32, bias=False).bfloat16()
    nn.init.normal_(base.weight, std=0.02)
    start = base.weight.detach().float().clone()
    layer = one_layer(base, r=64)
    delta = layer.thawline_paca_delta["default"]
    assert delta.dtype == torch.float32
    optimizer = torch.optim.SGD([delta], lr=1.0)
    for _ in range(100):
        delta.grad = torch.full_like(delta, -1e-5)
        optimizer.step()
    achieved = (base.weight.float() - start).mean() / 1e-3
    assert achieved == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_casting_the_model_leaves_the_fp32_master_and_recasts_the_base(cast):
    model = wrap(Net())
    train(model)
    expected = {name: p.detach().clone() for name, p in model.named_parameters() if "delta" in name}
    getattr(model, cast)()
    for name, p in model.named_parameters():
        if "delta" in name:
            assert p.dtype == torch.float32
            assert torch.equal(p, expected[name])
        else:
            assert (
                p.dtype == {"bfloat16": torch.bfloat16, "half": torch.float16, "float": torch.float32}[cast]
            )
    layer = model.base_model.model.first
    index, delta = layer.thawline_paca_indices["default"], layer.thawline_paca_delta["default"]
    inside = layer.base_layer.weight[:, index].detach().clone()
    layer.evict()
    assert torch.equal(inside, (layer.base_layer.weight[:, index].float() + delta).to(inside.dtype))


def test_autocast_gives_the_gradient_of_a_bfloat16_product():
    layer = one_layer(nn.Linear(IN, OUT))
    x = torch.randn(B, T, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    grad = layer.thawline_paca_delta["default"].grad
    assert grad.dtype == torch.float32
    exact = x.flatten(0, 1).sum(0)[layer.thawline_paca_indices["default"]].expand(OUT, 3)
    torch.testing.assert_close(grad, exact, rtol=0.02, atol=0.02)  # bf16 keeps 8 bits


def test_a_frozen_bias_stays_and_a_trainable_one_trains():
    for bias, trained in {"none": set(), "paca_only": {"first"}, "all": {"first", "head"}}.items():
        model = wrap(Net(), bias=bias)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
        train(model)
        moved = {
            n.split(".")[2]
            for n, p in model.named_parameters()
            if n in before and not torch.equal(p, before[n])
        }
        assert moved == trained


def test_what_follows_a_layer_may_work_in_place():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(inplace=True), nn.Linear(OUT, 3))
    model = get_peft_model(model, PacaConfig(r=2, target_modules=["0", "2"]))
    model(torch.randn(B, IN)).sum().backward()
    assert all(p.grad is not None for p in trainable(model))


def test_a_layer_used_twice_in_one_forward_gets_both_gradients():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(IN, IN).double()

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model = get_peft_model(Twice(), PacaConfig(r=IN, target_modules=["layer"]))
    reference = Twice()
    reference.load_state_dict(
        {
            k.replace("base_layer.", ""): v
            for k, v in model.base_model.model.state_dict().items()
            if "paca" not in k
        }
    )
    x = torch.randn(B, IN, dtype=torch.double)
    for module in (model, reference):
        module(x).square().sum().backward()
    delta = model.base_model.model.layer.thawline_paca_delta["default"]
    torch.testing.assert_close(delta.grad, reference.layer.weight.grad)


def test_a_forward_with_nothing_to_train_keeps_nothing():
    model = wrap(Net())
    for p in trainable(model):
        p.requires_grad_(False)
    assert not model(torch.randn(B, IN)).requires_grad
    with torch.no_grad():
        assert not model(torch.randn(B, IN)).requires_grad


@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_train_as_rows_alone(mode, attention):
    """Rows joined to one sequence attend to themselves alone: gradients are those of the rows, summed."""
    base = tiny_llama(attn_implementation=attention)
    model = wrap(base, init_weights=False, mode=mode)
    rows = [tokens(seed)[0, : 3 + seed] for seed in range(3)]
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "use_cache": False,
    }
    logits = model(**packed).logits
    logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    alone = [model(input_ids=row[None]).logits for row in rows]
    torch.testing.assert_close(logits, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
    sum(one.square().sum() for one in alone).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
