"""The average is held to a slow loop over the state dict, which is also what the published code runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from thawline.errors import CheckpointError, ConfigError
from thawline.training.detection.ema import EMA


class Shared(nn.Module):
    """One linear under three names, a batch norm, a frozen weight, and a table with an infinity."""

    def __init__(self) -> None:
        super().__init__()
        head = nn.Linear(3, 2)
        self.heads = nn.ModuleList([head, head, head])
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.register_buffer("anchors", torch.tensor([0.0, float("inf")]))


def walk(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [p for p in model.parameters() if p.requires_grad] + [model.norm.running_mean]:
            tensor += torch.randn_like(tensor)


def slow(model: nn.Module, decay: float, warmup: int, updates: int, *, once_per_name: bool) -> dict:
    """The same walk, averaged entry by entry."""
    average = copy.deepcopy(model.state_dict())
    owner = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    first = {pointer: name for name, pointer in reversed(list(owner.items()))}
    for n in range(1, updates + 1):
        walk(model)
        d = decay * (1 - math.exp(-n / warmup))
        for name, tensor in model.state_dict().items():
            kept = first[owner[name]] if tensor.numel() else name
            if tensor.is_floating_point() and (once_per_name or kept == name):
                average[kept] = d * average[kept] + (1 - d) * tensor
    return {name: average[first[owner[name]] if t.numel() else name] for name, t in average.items()}


@pytest.mark.parametrize("once_per_name", [False, True])
def test_average_equals_the_slow_loop_over_names(once_per_name: bool) -> None:
    model = Shared()
    twin = copy.deepcopy(model)
    ema = EMA(model, decay=0.9, warmup_steps=5, once_per_name=once_per_name)
    torch.manual_seed(1)
    for _ in range(12):
        walk(model)
        ema.update()
    torch.manual_seed(1)
    expected = slow(twin, 0.9, 5, 12, once_per_name=once_per_name)
    with ema.applied():
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_decay_warms_up_as_published() -> None:
    ema = EMA(nn.Linear(2, 2))
    seen = []
    for _ in range(1000):
        ema.update()
        seen.append(ema.current_decay)
    assert seen[0] == pytest.approx(9.994e-4, rel=1e-4)
    assert seen[999] == pytest.approx(0.6320573, abs=1e-7)


def test_applying_swaps_the_average_in_and_out_bit_for_bit() -> None:
    model = Shared()
    ema = EMA(model, decay=0.5, warmup_steps=0)
    walk(model)
    ema.update()
    own = copy.deepcopy(model.state_dict())
    with ema.applied():
        assert not torch.equal(model.heads[0].weight, own["heads.0.weight"])
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_only_what_moves_is_averaged_and_each_tensor_is_held_once() -> None:
    ema = EMA(Shared())
    tensors = ema.state_dict()["tensors"]
    assert set(tensors) == {
        "heads.0.weight", "heads.0.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
    }  # fmt: skip


def test_half_precision_weights_are_averaged_in_float32() -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.999, warmup_steps=0)
    nn.init.ones_(model.weight)
    for _ in range(10):
        ema.update()
    torch.testing.assert_close(
        ema.state_dict()["tensors"]["weight"], torch.full((2, 3), 1 - 0.999**10), rtol=1e-5, atol=0
    )
    with ema.applied():
        assert model.weight.dtype == torch.bfloat16


def test_a_saved_average_goes_on_as_if_nothing_had_happened() -> None:
    model = Shared()
    straight = EMA(model, decay=0.9, warmup_steps=7)
    for _ in range(3):
        walk(model)
        straight.update()
    state = copy.deepcopy(straight.state_dict())
    resumed = EMA(model, decay=0.9, warmup_steps=7)
    resumed.load_state_dict(state)
    for _ in range(4):
        walk(model)
        straight.update()
        resumed.update()
    for name, tensor in straight.state_dict()["tensors"].items():
        assert torch.equal(tensor, resumed.state_dict()["tensors"][name])


def test_an_average_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"does not fit the model: 1 tensors differ, such as 'weight'"):
        EMA(nn.Linear(3, 2)).load_state_dict(EMA(nn.Linear(4, 2)).state_dict())


@pytest.mark.parametrize(
    ("settings", "message"), [({"decay": 1.0}, "decay=1.0"), ({"warmup_steps": -1}, "-1")]
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EMA(nn.Linear(1, 1), **settings)
