"""ops.mixing: against a loop over every task, head and skill that builds the updates densely."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thawline.ops.mixing import (
    apply_low_rank,
    apply_low_rank_by_token,
    low_rank_linear,
    mix_skills,
    mix_skills_of_many,
)

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
    out = apply_low_rank(y, x, mix_skills(weights, A), mix_skills(weights, B, scale=0.5))
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
@pytest.mark.parametrize(
    "rows", [[0, 1, 2], [0, 0, 0, 0], [2, 0, 2, 1]], ids=["each its own", "one", "shared"]
)
def test_the_nodes_equal_the_slow_loop_with_its_gradients(fused: bool, rows: list[int]) -> None:
    A, B, weights = inventory()
    if rows == [0, 0, 0, 0]:
        weights = weights[:1]
    index = torch.tensor(rows) if rows == [2, 0, 2, 1] else None
    leaves = [torch.randn(len(rows), M, I, dtype=A.dtype), A, B, weights]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weight, bias = torch.randn(O, I, dtype=A.dtype), torch.randn(O, dtype=A.dtype)
    x = leaves[0]
    base = (weight, bias) if fused else torch.nn.functional.linear(x, weight, bias)
    mixed = mix_skills_of_many(weights[None], [A], [B], index, scale=0.25)
    out = low_rank_linear(base, x, *mixed)
    slow = slow_routed_linear(x, weight, bias, A, B, weights, rows, 0.25)
    torch.testing.assert_close(out, slow)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, upstream)
    for got, expected in zip(gradients, torch.autograd.grad(slow, leaves, upstream), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("index", [None, torch.tensor([1, 0, 1, 2])])
def test_many_factors_mixed_at_once_equal_each_mixed_alone(index: Tensor | None) -> None:
    A = [torch.randn(S, I, R, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    B = [torch.randn(S, O, R, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.rand(3, GROUPS, H, S, dtype=torch.float64, requires_grad=True)
    together = mix_skills_of_many(weights, A, B, index)
    alone = [mix_skills(w, factor) for factors in (A, B) for w, factor in zip(weights, factors, strict=True)]
    alone = alone if index is None else [one[index] for one in alone]
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected)
    upstream = [torch.randn_like(one) for one in alone[:-1]]  # the last is not used
    leaves = [weights, *A, *B[:-1]]
    got = torch.autograd.grad(together[:-1], leaves, upstream)
    for gradient, expected in zip(got, torch.autograd.grad(alone[:-1], leaves, upstream), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("n_skills", [1, S])
def test_no_weights_average_the_skills_uniformly(n_skills: int) -> None:
    A, _, _ = inventory()
    torch.testing.assert_close(mix_skills(None, A[:n_skills]), A[:n_skills].mean(0, keepdim=True))


def test_tokens_with_rows_of_their_own_equal_each_alone() -> None:
    A, B, weights = inventory()
    x, weight = torch.randn(2, M, I, dtype=A.dtype), torch.randn(O, I, dtype=A.dtype)
    index = torch.tensor([2, 0, 0, 1, 2, 2, 1, 1, 0, 2])
    mixed = mix_skills(weights, A), mix_skills(weights, B, scale=0.5)
    out = apply_low_rank_by_token((weight, None), x, *mixed, index).flatten(0, 1)
    for n, token in enumerate(x.flatten(0, 1)):
        delta = dense_update(A, B, weights[index[n]])
        torch.testing.assert_close(out[n], (weight + 0.5 * delta) @ token)


@pytest.mark.parametrize("index", [None, torch.tensor([1, 0, 1, 2])], ids=["each its own", "shared"])
@pytest.mark.parametrize("fused", [True, False], ids=["base inside", "base outside"])
def test_first_and_second_derivatives(fused: bool, index: Tensor | None) -> None:
    A, B, weights = inventory()
    groups = GROUPS if index is None else len(index)
    x, weight = torch.randn(groups, 2, I, dtype=A.dtype), torch.randn(O, I, dtype=A.dtype)

    def function(x, A, B, w):
        mixed = mix_skills_of_many(w[None], [A], [B], index, scale=0.7)
        return low_rank_linear((weight, None) if fused else x @ weight.T, x, *mixed)

    inputs = tuple(leaf.requires_grad_() for leaf in (x, A, B, weights))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_low_precision_base_gets_cast_factors_and_full_precision_gradients() -> None:
    A, B, weights = (leaf.requires_grad_() for leaf in inventory(torch.float32))
    x = torch.randn(GROUPS, M, I, dtype=torch.bfloat16)
    weight = torch.randn(O, I, dtype=torch.bfloat16)

    def run(x, weight, A, B, weights):
        mixed = mix_skills_of_many(weights[None], [A], [B], None, x.dtype)
        return low_rank_linear((weight, None), x, *mixed)

    out = run(x, weight, A, B, weights)
    assert out.dtype is torch.bfloat16
    out.float().square().sum().backward()
    exact = run(*(t.detach().double() for t in (x, weight, A, B, weights)))
    torch.testing.assert_close(out.double(), exact, atol=0.3, rtol=0.05)  # bf16 keeps 8 bits
    assert {p.grad.dtype for p in (A, B, weights)} == {torch.float32}


def test_autocast_leaves_the_mixing_in_full_precision() -> None:
    A, B, weights = inventory(torch.float32)
    expected = mix_skills(weights, A)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mix_skills(weights, A), expected)
        torch.testing.assert_close(mix_skills_of_many(weights[None], [A], [B])[0], expected)


def test_nothing_but_the_input_mixed_factors_and_xa_is_kept_for_backward() -> None:
    A, B, weights = (leaf.requires_grad_() for leaf in inventory(torch.float32))
    x, weight = torch.randn(GROUPS, M, I, requires_grad=True), torch.randn(O, I)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixed = mix_skills_of_many(weights[None], [A], [B])
        low_rank_linear((weight, None), x, *mixed)
    known = {t.untyped_storage().data_ptr() for t in (x, weight, A, B, weights)}
    extra = sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in known)
    assert extra == 4 * (GROUPS * (I + O) * R + GROUPS * M * R)
