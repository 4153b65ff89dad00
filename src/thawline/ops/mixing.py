"""Mix an inventory of LoRA skills by routing weights, and add the mixture to a frozen linear.

A skill s is a pair of factors A_s (I, R) and B_s (O, R). A routing row gives every head q, a contiguous block
of A's input features and of B's output features, its own weights over the skills:

    A^(q) = Σ_s w_qs A_s^(q)      B^(q) = Σ_s w_qs B_s^(q)      y = W x + b + c · B Aᵀ x

The factors are averaged and then multiplied, so cross terms A_s B_s' exist and the rank stays R. One head is
Poly (Ponti et al. 2022, arXiv 2202.13914), more are MHR (Caccia et al. 2023, arXiv 2211.03831).

B is stored (S, O, R), as LoRA stores it, and not (S, R, O) as the authors do: head blocks of both factors are
then slices without a copy, and the inventory does not depend on the number of heads.

`mix_skills` and `apply_low_rank` are plain differentiable torch. `routed_linear` is the same arithmetic as
one autograd node: it mixes in the dtype of the masters and applies in that of the output, writes into the
base's own output, and keeps for backward only the input itself, the mixed factors and x A.

Axes: G groups of rows that share a routing row, M tokens of a group, I/O in/out features, D either, R rank,
S skills, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "FrozenLinear",
    "apply_low_rank",
    "apply_low_rank_by_token",
    "low_rank_linear",
    "mix_skills",
    "mix_skills_of_many",
]

FrozenLinear = tuple[Tensor, Tensor | None]
"""Weight (O, I) and bias (O,) of a linear that does not train."""


def mix_skills(weights_GHS: Tensor | None, skills_SDR: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Average the skills, head by head, once for each routing row.

    Args:
        weights_GHS: one weight per row, head and skill; `None` averages the skills uniformly (G = 1).
        skills_SDR: one factor of every skill; H divides D.
        dtype: of the result; `None` keeps that of the skills. The sum itself runs in the skills' dtype.
    Returns: (G, D, R), contiguous.
    """
    n_skills, *factor_shape = skills_SDR.shape
    dtype = dtype or skills_SDR.dtype
    if weights_GHS is None:
        mean = skills_SDR if n_skills == 1 else skills_SDR.mean(0, keepdim=True)
        return mean.to(dtype)
    groups, n_heads, _ = weights_GHS.shape
    heads_HSF = skills_SDR.reshape(n_skills, n_heads, -1).transpose(0, 1)
    with _no_autocast(skills_SDR):
        mixed_HGF = torch.bmm(weights_GHS.to(skills_SDR.dtype).transpose(0, 1), heads_HSF)
    return mixed_HGF.transpose(0, 1).to(dtype).reshape(groups, *factor_shape)


def apply_low_rank(
    base: Tensor | FrozenLinear, x: Tensor, A_GIR: Tensor, B_GOR: Tensor, scale: float = 1.0
) -> Tensor:
    """base(x) + scale · (x A) Bᵀ, where consecutive rows of `x` in G equal groups share their factors.

    Args:
        base: its output, (..., O), which is left alone, or (weight, bias) to run; its output is nobody
            else's, and written in place where no gradient is asked for.
        x: (..., I), cast to the output's dtype if it has another.
        A_GIR, B_GOR: mixed factors, in the output's dtype.
    Returns: (..., O).
    """
    y = F.linear(x, *base) if isinstance(base, tuple) else base
    groups, in_features, _ = A_GIR.shape
    xA = torch.bmm(x.reshape(groups, -1, in_features).to(y.dtype), A_GIR)
    if isinstance(base, tuple) and not torch.is_grad_enabled():
        y.view(groups, xA.shape[1], -1).baddbmm_(xA, B_GOR.mT, alpha=scale)
        return y
    return torch.baddbmm(y.reshape(groups, xA.shape[1], -1), xA, B_GOR.mT, alpha=scale).view(y.shape)


def apply_low_rank_by_token(
    base: Tensor | FrozenLinear, x: Tensor, A_UIR: Tensor, B_UOR: Tensor, index: Tensor, scale: float = 1.0
) -> Tensor:
    """`apply_low_rank` where every token has its own row: packed sequences of several tasks.

    All U updates' x A are computed and those of other tasks put to zero, so that tokens are neither sorted
    nor copied. It costs U times the small products, which pays as long as U · R is well below I and O.

    Args:
        index: (tokens,), which of the U rows each token uses, tokens in the order of x's leading axes.
    """
    y = F.linear(x, *base) if isinstance(base, tuple) else base
    n_rows, in_features, r = A_UIR.shape
    A = A_UIR.transpose(0, 1).reshape(in_features, n_rows * r)
    B = B_UOR.transpose(0, 1).reshape(-1, n_rows * r)
    own = index[:, None] == torch.arange(n_rows, device=index.device)
    xA = (x.reshape(-1, in_features).to(y.dtype) @ A).view(-1, n_rows, r) * own[:, :, None]
    return torch.addmm(y.reshape(-1, y.shape[-1]), xA.view(-1, n_rows * r), B.mT, alpha=scale).view(y.shape)


def mix_skills_of_many(
    weights_UHS: Sequence[Tensor],
    skills_SDR: Sequence[Tensor],
    index: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """`mix_skills` for N factors of one shape at once, as one autograd node whose launches do not grow with
    N.

    Keeps no copy of the skills: the stack that they are mixed from is made again in the backward.

    Args:
        weights_UHS: for each of N factors, the weights of the U distinct rows, (U, H, S).
        skills_SDR: N factors (S, D, R).
        index: (G,), which row each group uses; `None` where group g uses row g.
        dtype: of the results; `None` keeps that of the skills.
    Returns: N mixed factors (G, D, R).
    """
    return _MixSkills.apply(index, dtype or skills_SDR[0].dtype, len(skills_SDR), *weights_UHS, *skills_SDR)


def low_rank_linear(
    x: Tensor, base: Tensor | FrozenLinear, A_GIR: Tensor, B_GOR: Tensor, scale: float = 1.0
) -> Tensor:
    """`apply_low_rank` as one autograd node that keeps nothing for backward but its inputs and x A.

    Given (weight, bias), the base runs in here: its output is written in place, and its input gradient, ∂y W,
    is accumulated in place.
    """
    y, weight, bias = (None, *base) if isinstance(base, tuple) else (base, None, None)
    return _LowRankLinear.apply(x, y, weight, bias, A_GIR, B_GOR, scale)


class _LowRankLinear(torch.autograd.Function):
    """`low_rank_linear`. ∂(xA) = c · ∂y B,  ∂A = xᵀ ∂(xA),  ∂B = c · ∂yᵀ (xA),  ∂x = ∂y W + ∂(xA) Aᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_output: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
    ) -> Tensor:
        y = F.linear(x, weight, bias) if base_output is None else base_output
        groups = A.shape[0]
        x_GMI = x.reshape(groups, -1, A.shape[1])
        xA = torch.bmm(x_GMI if x.dtype is y.dtype else x_GMI.to(y.dtype), A)
        y_GMO = y.reshape(groups, -1, B.shape[1])
        if base_output is None:
            y_GMO.baddbmm_(xA, B.mT, alpha=scale)
        else:
            y = torch.baddbmm(y_GMO, xA, B.mT, alpha=scale).view(y.shape)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, A, B, xA)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, xA = ctx.saved_tensors
        needs_x, needs_output, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        groups, in_features, _ = A.shape
        dy_GMO = dy.reshape(groups, -1, B.shape[1])
        d_xA = torch.empty_like(xA).baddbmm_(dy_GMO, B, beta=0, alpha=ctx.scale)
        dx = dA = dB = None
        if needs_x:
            if weight is None:
                dx = torch.bmm(d_xA, A.mT).view(x.shape)
            else:
                dx = dy @ (weight if weight.dtype is dy.dtype else weight.to(dy.dtype))
                dx.view(groups, -1, in_features).baddbmm_(d_xA, A.mT)
            dx = dx if dx.dtype is x.dtype else dx.to(x.dtype)
        if needs_A:
            x_GMI = x.reshape(groups, -1, in_features)
            dA = torch.bmm((x_GMI if x.dtype is dy.dtype else x_GMI.to(dy.dtype)).mT, d_xA)
        if needs_B:
            dB = torch.empty_like(B).baddbmm_(dy_GMO.mT, xA, beta=0, alpha=ctx.scale)
        return dx, dy if needs_output else None, None, None, dA, dB, None


class _MixSkills(torch.autograd.Function):
    """`mix_skills_of_many`. Head by head, ∂skill_s = Σ_u w_us ∂mixed_u and ∂w_us = <skill_s, ∂mixed_u>."""

    @staticmethod
    def forward(
        ctx: Any, index: Tensor | None, dtype: torch.dtype, n: int, *weights_and_skills: Tensor
    ) -> tuple[Tensor, ...]:
        weights_UHS, skills_SDR = weights_and_skills[:n], weights_and_skills[n:]
        rows, n_heads, _ = weights_UHS[0].shape
        w_XUS = _stack([weights.transpose(0, 1) for weights in weights_UHS]).to(skills_SDR[0].dtype)
        with _no_autocast(w_XUS):
            mixed_XUF = torch.bmm(w_XUS, _stack_heads(skills_SDR, n_heads))
        mixed_NUHF = mixed_XUF.view(n, n_heads, rows, -1).transpose(1, 2)
        if index is not None:
            mixed_NUHF = mixed_NUHF.index_select(1, index)
        # One pass brings the rows to the front and casts.
        mixed = mixed_NUHF.to(dtype, memory_format=torch.contiguous_format)
        mixed = mixed.reshape(n, -1, *skills_SDR[0].shape[1:])
        ctx.n, ctx.weights_dtype = n, weights_UHS[0].dtype
        ctx.save_for_backward(w_XUS, index, *skills_SDR)
        return mixed.unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        w_XUS, index, *skills_SDR = ctx.saved_tensors
        n, rows = ctx.n, w_XUS.shape[1]
        n_heads = len(w_XUS) // n
        d_XUF = _stack_heads(d_mixed, n_heads).to(w_XUS.dtype)
        if index is not None:
            d_XUF = d_XUF.new_zeros(len(d_XUF), rows, d_XUF.shape[2]).index_add_(1, index, d_XUF)
        d_weights: tuple[Tensor | None, ...] = (None,) * n
        d_skills: tuple[Tensor | None, ...] = (None,) * n
        if any(ctx.needs_input_grad[3 : 3 + n]):
            d_XUS = torch.bmm(d_XUF, _stack_heads(skills_SDR, n_heads).mT).to(ctx.weights_dtype)
            d_weights = d_XUS.view(n, n_heads, rows, -1).transpose(1, 2).unbind(0)
        if any(ctx.needs_input_grad[3 + n :]):
            d_XSF = torch.bmm(w_XUS.mT, d_XUF)
            d_NSHF = d_XSF.view(n, n_heads, -1, d_XSF.shape[2]).transpose(1, 2)
            d_skills = d_NSHF.reshape(n, *skills_SDR[0].shape).unbind(0)
        return None, None, None, *d_weights, *d_skills


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast would mix in 16 bits what is kept in 32."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _stack_heads(factors_KDR: Sequence[Tensor], n_heads: int) -> Tensor:
    """N tensors (K, D, R) as (N·H, K, F), F a head's features times the rank."""
    return _stack([factor.reshape(factor.shape[0], n_heads, -1).transpose(0, 1) for factor in factors_KDR])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """N tensors (H, K, F) as (N·H, K, F). One alone is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
