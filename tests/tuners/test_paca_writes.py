"""Every forward runs on the columns that δ says, whoever moved δ, however, and whatever happened in between.

Fused optimisers and writes to `.data` leave no sign on a tensor, so this is where a resident column goes
stale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from tests.support.models import tiny_llama
from tests.support.paca import IN, OUT, B, Net, T, loss_of, same, trainable, weights, wrap
from thawline import PacaConfig
from thawline.tuners.paca import PacaLayer


class Blocks(nn.Module):
    """Two residual blocks, checkpointed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(IN, 9), nn.Tanh(), nn.Linear(9, IN)) for _ in range(2)
        )
        self.checkpointing: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointing is not None and self.training:
                x = x + checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = x + block(x)
        return x


def inputs(seed: int) -> Tensor:
    x = torch.randn(B, T, IN, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()  # as transformers makes embeddings, for reentrant checkpointing


class Reference:
    """The model's base with the columns written by hand."""

    def __init__(self, base: nn.Module) -> None:
        self.base = copy.deepcopy(base).eval()
        self.original = weights(base)

    def __call__(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        state = dict(self.original)
        for name, layer in model.named_modules():
            if isinstance(layer, PacaLayer):
                key = f"{name.removeprefix('base_model.model.')}.weight"
                index, delta = layer.thawline_paca_indices["default"], layer.thawline_paca_delta["default"]
                columns = torch.add(
                    self.original[key][:, index], delta.detach(), alpha=layer.scaling["default"]
                )
                state[key] = self.original[key].index_copy(1, index, columns.to(self.original[key].dtype))
        self.base.load_state_dict(state)
        with torch.no_grad():
            out = self.base(*inputs)
        return getattr(out, "logits", out)


def output(model: nn.Module, *inputs: Tensor) -> Tensor:
    mode = model.training
    with torch.no_grad():
        out = model.eval()(*inputs)
    model.train(mode)
    return getattr(out, "logits", out)


class WritesData(torch.optim.Optimizer):
    """SGD through `.data`, as many a research optimiser."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(group["lr"] * p.grad.data)


class NoOptimizer:
    """A loop by hand that no hook of PyTorch sees. Keeps the gradients' storage, as `zero_grad` once did."""

    def __init__(self, params):
        self.params = list(params)

    def step(self):
        for p in self.params:
            p.data.sub_(0.1 * p.grad.data)

    def zero_grad(self):
        for p in self.params:
            p.grad.zero_()


class ByHand(NoOptimizer):
    """The same, dropping the gradients first, so that nothing is left to see at the next forward."""

    def step(self):
        gradients = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        for p, gradient in zip(self.params, gradients, strict=True):
            p.data.sub_(0.1 * gradient)

    def zero_grad(self):
        pass


class StepsACopy:
    """ZeRO-1 and -2: an optimiser steps a copy, which is written back after its hooks have run."""

    def __init__(self, params):
        self.params = list(params)
        self.copies = [p.detach().clone() for p in self.params]
        self.inner = torch.optim.AdamW(self.copies, lr=0.05, fused=True)

    def step(self):
        for p, twin in zip(self.params, self.copies, strict=True):
            twin.grad = p.grad
        self.inner.step()
        for p, twin in zip(self.params, self.copies, strict=True):
            p.data.copy_(twin)

    def zero_grad(self):
        for p in self.params:
            p.grad = None


class Momentum(WritesData):
    """Steps also without a fresh gradient."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state.setdefault(p, {"v": torch.zeros_like(p)})
            if p.grad is not None:
                self.state[p]["v"] += p.grad
            p.data.sub_(0.05 * self.state[p]["v"])


OPTIMIZERS: dict[str, Callable] = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "AdamW loop": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False, fused=False),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "writes .data": WritesData,
    "momentum through .data": Momentum,
    "no optimiser": NoOptimizer,
    "no optimiser, gradients dropped first": ByHand,
    "steps a copy": StepsACopy,
}


@pytest.mark.parametrize("evaluate", ["never", "before the step", "after the step"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_forward_uses_the_new_columns(kind, accumulate, checkpointing, evaluate):
    base, x = Blocks(), inputs(-1)
    reference = Reference(base)
    base.checkpointing = checkpointing
    model = wrap(base, alpha=6).train()
    optimizer = OPTIMIZERS[kind](trainable(model))
    previous = None
    for step in range(3):
        for micro in range(accumulate):
            model(inputs(10 * step + micro)).square().mean().backward()
        if evaluate == "before the step":
            assert torch.equal(output(model, x), reference(model, x))
        optimizer.step()
        if evaluate == "after the step":
            assert torch.equal(output(model, x), reference(model, x))
        optimizer.zero_grad()
        now = model(x).detach()  # in training mode, as the next step runs
        assert torch.equal(now, reference(model, x))
        assert previous is None or not torch.equal(now, previous)
        previous = now


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_no_gradient(checkpointing):
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(5)
        model = wrap(tiny_llama(), init_weights=False, seed=3)
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        loss_of(model.train()).backward()
        gradients.append([p.grad for p in trainable(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_gradscaler_skips_changes_nothing(fused):
    base = Net()
    reference, x = Reference(base), torch.randn(B, IN)
    model = wrap(base)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    outputs = []
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(loss_of(model) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        outputs.append(output(model, x))
        assert torch.equal(outputs[-1], reference(model, x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_parameters_swapped_by_eval_and_train_are_used():
    # Schedule-free optimisers evaluate at an average and train at another point.
    base, x = Net(), torch.randn(B, IN)
    reference = Reference(base)
    model = wrap(base)
    model.train()
    model(x)
    for scale in (0.5, -1.0):
        for p in trainable(model):
            p.data.copy_(torch.full_like(p, scale))
        model.train(not model.training)
        with torch.no_grad():
            assert torch.equal(model(x), reference(model, x))


CHANGES = {
    "in place": lambda p: p.add_(1.0),
    "another storage": lambda p: setattr(p, "data", torch.ones_like(p)),
}


@pytest.mark.parametrize("how", CHANGES)
@torch.no_grad()
def test_a_change_by_hand_is_used(how):
    base, x = Net(), torch.randn(B, IN)
    reference = Reference(base)
    model = wrap(base).eval()
    model(x)
    for p in trainable(model):
        CHANGES[how](p)
    assert torch.equal(model(x), reference(model, x))


@torch.no_grad()
def test_loaded_replaced_and_rescaled_changes_are_used():
    base, x = Net(), torch.randn(B, IN)
    reference = Reference(base)
    model = wrap(base).eval()
    model(x)
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items() if "delta" in k}
    for assign in (False, True):
        model.load_state_dict(state, strict=False, assign=assign)
        assert torch.equal(model(x), reference(model, x))
    layer = model.base_model.model.first
    layer.thawline_paca_delta["default"] = nn.Parameter(
        torch.randn_like(layer.thawline_paca_delta["default"])
    )
    assert torch.equal(model(x), reference(model, x))
    for rescale in (
        lambda: layer.set_scale("default", 3.0),
        lambda: layer.scale_layer(0.5),
        lambda: layer.unscale_layer(2.0),
        layer.unscale_layer,
    ):
        rescale()
        assert torch.equal(model(x), reference(model, x))
    assert layer.scaling["default"] == 1.0


@torch.no_grad()
def test_loading_other_indices_moves_the_columns():
    base, x = Net(), torch.randn(B, IN)
    before, reference = weights(base), Reference(base)
    model = wrap(base, init_weights=False, seed=1).eval()
    other = wrap(copy.deepcopy(reference.base), init_weights=False, seed=2).eval()
    expected = other(x)
    model.load_state_dict({k: v for k, v in other.state_dict().items() if "paca" in k}, strict=False)
    assert torch.equal(model(x), expected)
    assert same(weights(model.unload()), before)


@torch.no_grad()
def test_loading_another_base_keeps_the_change_and_takes_the_new_original():
    base, x = Net(), torch.randn(B, IN)
    model = wrap(base, init_weights=False).eval()
    model(x)
    other = Net()
    reference = Reference(other)
    state = {
        k.replace("first.", "first.base_layer.").replace("second.", "second.base_layer."): v
        for k, v in other.state_dict().items()
    }
    model.base_model.model.load_state_dict(state, strict=False)
    assert torch.equal(model(x), reference(model, x))
    assert same(weights(model.unload()), weights(other))


def test_a_reference_pass_between_forward_and_backward_changes_no_gradient():
    # DPO: the policy's forward, a forward with adapters disabled, then the policy's backward.
    def gradients(between: Callable) -> list[Tensor]:
        torch.manual_seed(2)
        model = wrap(Net(), init_weights=False)
        model.add_adapter("other", model.peft_config["default"])
        x = torch.randn(B, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = model(x).square().mean()
        between(model, x)
        loss.backward()
        return [x.grad] + [p.grad for n, p in model.named_parameters() if n.endswith("delta.default")]

    def reference_pass(model, x):
        with torch.no_grad(), model.disable_adapter():
            model(x)

    def stays_disabled(model, x):
        model.base_model.disable_adapter_layers()
        model(x)

    def switches(model, x):
        model.set_adapter("other")
        model(x)

    def saves(model, x):
        model.state_dict()

    plain = gradients(lambda model, x: None)
    for between in (reference_pass, saves):
        for ours, expected in zip(gradients(between), plain, strict=True):
            assert torch.equal(ours, expected), between.__name__
    for between in (stays_disabled, switches):  # these freeze the columns themselves
        assert torch.equal(gradients(between)[0], plain[0]), between.__name__


def test_pipelined_forwards_and_backwards_may_overlap():
    def gradients(order: str) -> list[Tensor]:
        torch.manual_seed(2)
        model = wrap(Net(), init_weights=False)
        losses: list[Tensor] = []
        for action in order.split():
            if action == "f":
                losses.append(loss_of(model, len(losses)))
            else:
                losses[int(action)].backward()
        return [p.grad for p in trainable(model)]

    for ours, expected in zip(gradients("f f 0 f 1 2"), gradients("f 0 f 1 f 2"), strict=True):
        assert torch.equal(ours, expected)


def test_columns_are_written_after_the_step_and_before_a_forward_that_follows_a_backward(monkeypatch):
    from thawline.tuners.paca import resident

    writes = []
    original = resident.write_columns
    monkeypatch.setattr(resident, "write_columns", lambda *args: writes.append(1) or original(*args))
    model, n_layers = wrap(Net()), 2
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, fused=True)
    for accumulate in (1, 1, 4, 4):
        writes.clear()
        for _ in range(accumulate):
            loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            loss_of(model)
            loss_of(model)
        assert len(writes) == n_layers * accumulate


BASES = {
    "Linear": lambda: nn.Linear(IN, OUT),
    "Conv1D": lambda: Conv1D(OUT, IN),
    "Conv2d": lambda: nn.Conv2d(IN, OUT, 3),
    "depthwise": lambda: nn.Conv2d(IN, IN, 3, groups=IN),
}


@pytest.mark.parametrize("second", [0, 3], ids=["same columns", "others"])
@pytest.mark.parametrize("selection", ["random", "adjacent"])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_switch_leaves_the_original_and_the_new_columns(monkeypatch, base, selection, second):
    from thawline.tuners.paca import resident

    fields = {"target_modules": ["0"], "selection": selection, "init_weights": False}
    model = wrap(nn.Sequential(base()), **fields)
    model.add_adapter("b", PacaConfig(r=4, seed=second, **fields))
    layer = next(module for module in model.modules() if isinstance(module, PacaLayer))
    indices = layer.thawline_paca_indices
    assert torch.equal(indices["default"], indices["b"]) == (second == 0)
    with model.disable_adapter():
        original = layer.base_layer.weight.clone()
    writes = []
    write = resident.write_columns
    monkeypatch.setattr(resident, "write_columns", lambda *args: writes.append(1) or write(*args))
    for name in ("b", "default", "b"):
        writes.clear()
        model.set_adapter(name)
        assert len(writes) == (1 if second == 0 else 2)  # other columns are restored first
        columns = layer.columns_of(original).index_select(1, indices[name])
        expected = original.clone()
        changed = columns + layer.thawline_paca_delta[name].detach()
        layer.columns_of(expected).index_copy_(1, indices[name], changed)
        assert torch.equal(layer.base_layer.weight, expected)
    with model.disable_adapter():
        assert torch.equal(layer.base_layer.weight, original)


def test_the_step_of_another_optimiser_writes_nothing(monkeypatch):
    from thawline.tuners.paca import resident

    model, other = wrap(Net()), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, fused=True)
    others = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    loss_of(model).backward()
    optimizer.step()
    writes = []
    original = resident.write_columns
    monkeypatch.setattr(resident, "write_columns", lambda *args: writes.append(1) or original(*args))
    for seed in range(3):
        other(torch.randn(4, 3)).sum().backward()
        others.step()
        loss_of(model, seed)
    assert not writes


def test_an_optimiser_that_takes_over_by_copies_is_noticed():
    # The first one tells of its steps and holds δ; the second steps copies, later without any gradient.
    base, x = Net(), torch.randn(B, IN)
    reference = Reference(base)
    model = wrap(base)
    first = torch.optim.AdamW(trainable(model), lr=0.05, fused=True)
    loss_of(model).backward()
    first.step()
    first.zero_grad()
    second = StepsACopy(trainable(model))
    for step in range(4):
        if step < 2:
            loss_of(model, step).backward()
        before = output(model, x)
        second.step()
        second.zero_grad()
        if step >= 2:
            for twin in second.copies:
                twin.grad = torch.ones_like(twin)
        assert torch.equal(output(model, x), reference(model, x))
        assert step >= 2 or not torch.equal(output(model, x), before)


def test_replacing_a_weight_with_columns_inside_is_refused():
    model = wrap(Net(), init_weights=False).eval()
    layer = model.base_model.model.first
    layer.base_layer.weight.data = layer.base_layer.weight.data.clone()  # moved: fine
    model(torch.randn(B, IN))
    layer.base_layer.weight.data = torch.randn_like(layer.base_layer.weight)
    with pytest.raises(ValueError, match="weight of 'first' was replaced"):
        model(torch.randn(B, IN))
