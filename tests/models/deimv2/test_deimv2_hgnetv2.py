"""The unit of HGNetv2: in training its norm, ReLU and LAB are computed together."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from thawline.bench.host_reads import HostReads
from thawline.measure import saved_bytes
from thawline.models.deimv2.network.hgnetv2 import Unit


def _unit(scale: float, dtype: torch.dtype = torch.float64) -> Unit:
    torch.manual_seed(0)
    unit = Unit(5, 7, 3).to(dtype)
    with torch.no_grad():
        unit.bn.weight.uniform_(-1, 2)
        unit.bn.bias.normal_()
        unit.lab.scale.fill_(scale)
        unit.lab.bias.fill_(0.3)
    return unit


def _in_steps(unit: Unit, x: Tensor) -> Tensor:
    return unit.lab(F.relu(unit.bn(unit.conv(x))))


@pytest.mark.parametrize("scale", [1.3, -0.7])
@pytest.mark.parametrize("on_device", [False, True])
def test_training_gives_what_the_steps_one_by_one_give(scale: float, on_device: bool) -> None:
    """On a device it takes a path that reads no number on the host; following the reads takes that path."""
    ours, theirs = _unit(scale), _unit(scale)
    x_ours = torch.randn(2, 5, 6, 9, dtype=torch.float64, requires_grad=True)
    x_theirs = x_ours.detach().clone().requires_grad_()
    grad = torch.randn(2, 7, 6, 9, dtype=torch.float64)
    outputs = []

    def step() -> None:
        y = ours(x_ours)
        y.backward(grad)
        outputs.append(y.detach())

    if on_device:
        assert HostReads.of(step, [*ours.parameters(), x_ours]).total == 0
    else:
        step()
    for output in outputs:
        expected = _in_steps(theirs, x_theirs)
        expected.backward(grad)
        assert_close(output, expected.detach())
    assert_close(x_ours.grad, x_theirs.grad)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, other.grad)
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_training_keeps_one_map_less_for_backward() -> None:
    unit, x = _unit(1.0, torch.float32), torch.randn(2, 5, 6, 9)
    a_map = 2 * 7 * 6 * 9 * 4
    less = saved_bytes(lambda: _in_steps(unit, x).sum(), unit.parameters()) - saved_bytes(
        lambda: unit(x).sum(), unit.parameters()
    )
    assert abs(less) < a_map // 2  # alone, the limited map takes the place of the ReLU's

    both = deepcopy(unit), Unit(7, 7, 1)
    parameters = [p for one in both for p in one.parameters()]
    steps = saved_bytes(lambda: _in_steps(both[1], _in_steps(both[0], x)).sum(), parameters)
    ours = saved_bytes(lambda: both[1](both[0](x)).sum(), parameters)
    assert steps - ours > 0.9 * a_map  # the next convolution keeps it anyway


def test_evaluation_and_frozen_statistics_go_step_by_step() -> None:
    unit = _unit(-0.5).eval()
    x = torch.randn(2, 5, 6, 9, dtype=torch.float64)
    assert torch.equal(unit(x), _in_steps(unit, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_without_gradients_works_in_place_with_the_same_bits(dtype: torch.dtype) -> None:
    """Under autocast the map is in half precision and the affine is not: it decides the result's type."""
    unit, x = _unit(-0.5, torch.float32).eval(), torch.randn(2, 5, 6, 9)
    before, made = x.clone(), []
    unit.bn.register_forward_hook(lambda module, args, output: made.append(output.data_ptr()))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found, expected = unit(x), _in_steps(unit, x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert torch.equal(x, before)
    assert (found.data_ptr() == made[0]) == (dtype == torch.float32)
