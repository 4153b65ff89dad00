"""ops.mixing: against a loop over every task, head and skill that builds the updates densely."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thawline.ops.mixing import apply_low_rank, mix_skills, routed_linear

GROUPS, M, I, O, R, S, H = 3, 5, 8, 12, 2, 3, 4  # noqa: E741


def inventory(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(S, I, R, generator=generator, dtype=dtype)
    B = torch.randn(S, O, R, generator=generator, dtype=dtype)
    weights = torch.rand(GROUPS, H, S, generator=generator, dtype=dtype)
    return A, B, weights / weights.sum(-1, keepdim=True)


def dense_update(A: Tensor, B: Tensor, weights_HS: Tensor) -> Tensor:
    """ΔW (O, I) of one routing row: head blocks of averaged factors, then their product, rank by rank."""
    a, b = torch.zeros(I, R, dtype=A.dtype), torch.zeros(O, R, dtype=A.dtype)
    for q in range(H):
        block_i, block_o = slice(q * I // H, (q + 1) * I // H), slice(q * O // H, (q + 1) * O // H)
        for s in range(S):
            a[block_i] += weights_HS[q, s] * A[s, block_i]
            b[block_o] += weights_HS[q, s] * B[s, block_o]
    return sum(torch.outer(b[:, r], a[:, r]) for r in range(R))


def slow_routed_linear(x, weight, bias, A, B, weights, rows, scale):
    out = []
    for example, row in zip(x, rows, strict=True):
        delta = dense_update(A, B, weights[row])
        out.append(example @ (weight + scale * delta).T + bias)
    return torch.stack(out)


def test_mixing_and_applying_equals_the_dense_updates_of_a_triple_loop() -> None:
    A, B, weights = inventory()
    x, y = torch.randn(GROUPS, M, I, dtype=A.dtype), torch.randn(GROUPS, M, O, dtype=A.dtype)
    out = apply_low_rank(y, x, mix_skills(weights, A), mix_skills(weights, B), scale=0.5)
    for g in range(GROUPS):
        torch.testing.assert_close(out[g], y[g] + 0.5 * x[g] @ dense_update(A, B, weights[g]).T)


def test_factors_are_averaged_before_they_are_multiplied() -> None:
    A, B, weights = inventory()
    dW = mix_skills(weights, B)[0] @ mix_skills(weights, A)[0].T
    products = sum(
        torch.outer(
            weights[0].repeat_interleave(O // H, 0)[:, s], weights[0].repeat_interleave(I // H, 0)[:, s]
        ).sqrt()
        * (B[s] @ A[s].T)
        for s in range(S)
    )
    assert (dW - products).abs().max() > 0.1


@pytest.mark.parametrize("fused", [True, False], ids=["base inside", "base outside"])
@pytest.mark.parametrize("index", [None, [0], [2, 0, 2, 1]], ids=["each its row", "one row", "rows shared"])
def test_one_node_equals_the_slow_loop_with_its_gradients(fused: bool, index: list[int] | None) -> None:
    A, B, weights = inventory()
    if index == [0]:
        weights = weights[:1]
    rows = {None: range(GROUPS), (0,): [0] * 4, (2, 0, 2, 1): [2, 0, 2, 1]}[
        None if index is None else tuple(index)
    ]
    where = torch.tensor(index) if index is not None and len(index) > 1 else None
    leaves = [torch.randn(len(list(rows)), M, I, dtype=A.dtype), A, B, weights]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weight, bias = torch.randn(O, I, dtype=A.dtype), torch.randn(O, dtype=A.dtype)
    x = leaves[0]
    base = (weight, bias) if fused else torch.nn.functional.linear(x, weight, bias)
    out = routed_linear(x, base, A, B, weights, where, scale=0.25)
    slow = slow_routed_linear(x, weight, bias, A, B, weights, rows, 0.25)
    torch.testing.assert_close(out, slow)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, upstream)
    for got, expected in zip(gradients, torch.autograd.grad(slow, leaves, upstream), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("n_skills", [1, S])
def test_no_weights_average_the_skills_uniformly(n_skills: int) -> None:
    A, B, _ = inventory()
    A, B = A[:n_skills].clone().requires_grad_(), B[:n_skills].clone().requires_grad_()
    x, weight = torch.randn(2, M, I, dtype=A.dtype), torch.randn(O, I, dtype=A.dtype)
    out = routed_linear(x, (weight, None), A, B, None, scale=2.0)
    expected = x @ weight.T + 2.0 * x @ A.mean(0) @ B.mean(0).T
    torch.testing.assert_close(out, expected)
    for got, want in zip(
        torch.autograd.grad(out.sum(), [A, B]), torch.autograd.grad(expected.sum(), [A, B]), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_gradcheck() -> None:
    A, B, weights = inventory()
    x = torch.randn(GROUPS, 2, I, dtype=A.dtype)
    weight = torch.randn(O, I, dtype=A.dtype)
    inputs = tuple(leaf.requires_grad_() for leaf in (x, A, B, weights))
    assert torch.autograd.gradcheck(
        lambda x, A, B, w: routed_linear(x, (weight, None), A, B, w, scale=0.7), inputs, fast_mode=True
    )


def test_low_precision_base_gets_cast_factors_and_full_precision_gradients() -> None:
    A, B, weights = inventory(torch.float32)
    A, B, weights = A.requires_grad_(), B.requires_grad_(), weights.requires_grad_()
    x = torch.randn(GROUPS, M, I, dtype=torch.bfloat16)
    weight = torch.randn(O, I, dtype=torch.bfloat16)
    out = routed_linear(x, (weight, None), A, B, weights)
    assert out.dtype is torch.bfloat16
    out.float().square().sum().backward()
    exact = routed_linear(
        x.double(), (weight.double(), None), A.detach().double(), B.detach().double(), weights.double()
    )
    torch.testing.assert_close(out.double(), exact, atol=0.3, rtol=0.05)  # bf16 keeps 8 bits
    assert {p.grad.dtype for p in (A, B, weights)} == {torch.float32}


def test_nothing_but_the_input_mixed_factors_and_xa_is_kept_for_backward() -> None:
    A, B, weights = inventory(torch.float32)
    A.requires_grad_(), B.requires_grad_(), weights.requires_grad_()
    x, weight = torch.randn(GROUPS, M, I), torch.randn(O, I)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        routed_linear(x, (weight, None), A, B, weights)
    known = {t.untyped_storage().data_ptr() for t in (x, weight, A, B, weights)}
    extra = sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in known)
    assert extra == 4 * (GROUPS * (I + O) * R + GROUPS * M * R)
