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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["apply_low_rank", "mix_skills", "routed_linear"]


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
    groups = weights_GHS.shape[0]
    mixed_HGF = torch.bmm(weights_GHS.to(skills_SDR.dtype).transpose(0, 1), _heads(skills_SDR, weights_GHS))
    # One pass both casts and brings the rows to the front; reshape alone is free where G or H is 1.
    mixed_GHF = mixed_HGF.transpose(0, 1)
    if dtype != skills_SDR.dtype:
        mixed_GHF = mixed_GHF.to(dtype, memory_format=torch.contiguous_format)
    return mixed_GHF.reshape(groups, *factor_shape)


def apply_low_rank(y: Tensor, x: Tensor, A_GIR: Tensor, B_GOR: Tensor, scale: float = 1.0) -> Tensor:
    """y + scale · (x A) Bᵀ, where consecutive rows of `x` in G equal groups share their factors.

    Args:
        y: output of the base, (..., O).      x: its input, (..., I), cast to y's dtype if it has another.
        A_GIR, B_GOR: mixed factors, in y's dtype.
    Returns: (..., O), a new tensor.
    """
    groups, in_features, _ = A_GIR.shape
    x_GMI = x.reshape(groups, -1, in_features).to(y.dtype)
    y_GMO = y.reshape(groups, x_GMI.shape[1], B_GOR.shape[1])
    return torch.baddbmm(y_GMO, torch.bmm(x_GMI, A_GIR), B_GOR.mT, alpha=scale).view(y.shape)


def routed_linear(
    x: Tensor,
    base: Tensor | tuple[Tensor, Tensor | None],
    skills_A: Tensor,
    skills_B: Tensor,
    weights_GHS: Tensor | None,
    index: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """A linear plus the low-rank update its routing rows ask for: one autograd node.

    Args:
        x: (..., I). Its leading rows fall into equal groups, in order: one per entry of `index`, else one per
            row of `weights_GHS`.
        base: the output of the base, (..., O), or its frozen (weight (O, I), bias): then the base runs in
            here, its output is written in place and its input gradient is accumulated in place.
        skills_A: (S, I, R).        skills_B: (S, O, R), both of the dtype the mixing runs in.
        weights_GHS: routing weights of the distinct rows; `None` averages the skills uniformly.
        index: (groups,), which routing row each group uses; `None` where group g uses row g.
        scale: c, alpha / r.
    Returns: (..., O).
    """
    y, weight, bias = (None, *base) if isinstance(base, tuple) else (base, None, None)
    return _RoutedLinear.apply(x, y, weight, bias, skills_A, skills_B, weights_GHS, index, scale)


class _RoutedLinear(torch.autograd.Function):
    """`routed_linear`. With ∂(xA) = c · ∂y B:  ∂A = xᵀ ∂(xA),  ∂B = c · ∂yᵀ (xA),  ∂x = ∂y W + ∂(xA) Aᵀ.

    Then, head by head, ∂A_s = Σ_g w_gs ∂A_g, B alike, and ∂w_gs = <A_s, ∂A_g> + <B_s, ∂B_g>.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_output: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        skills_A: Tensor,
        skills_B: Tensor,
        weights: Tensor | None,
        index: Tensor | None,
        scale: float,
    ) -> Tensor:
        y = F.linear(x, weight, bias) if base_output is None else base_output
        A, B = mix_skills(weights, skills_A, y.dtype), mix_skills(weights, skills_B, y.dtype)
        if index is not None:
            A, B = A.index_select(0, index), B.index_select(0, index)
        groups = A.shape[0]
        x_GMI = x.reshape(groups, -1, x.shape[-1]).to(y.dtype)
        xA = torch.bmm(x_GMI, A)
        y_GMO = y.view(groups, xA.shape[1], -1) if base_output is None else y.reshape(groups, xA.shape[1], -1)
        if base_output is None:
            y_GMO.baddbmm_(xA, B.mT, alpha=scale)
        else:
            y = torch.baddbmm(y_GMO, xA, B.mT, alpha=scale).view(y.shape)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, skills_A, skills_B, weights, index, A, B, xA)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, skills_A, skills_B, weights, index, A, B, xA = ctx.saved_tensors
        needs_x, needs_output, _, _, needs_A, needs_B, needs_weights, _, _ = ctx.needs_input_grad
        groups, tokens, _ = xA.shape
        dy_GMO = dy.reshape(groups, tokens, -1)
        d_xA = torch.empty_like(xA).baddbmm_(dy_GMO, B, beta=0, alpha=ctx.scale)

        dx = None
        if needs_x and weight is not None:
            dx = dy.to(weight.dtype) @ weight
            dx.view(groups, tokens, -1).baddbmm_(d_xA, A.mT)
            dx = dx.to(x.dtype)
        elif needs_x:
            dx = torch.bmm(d_xA, A.mT).view(x.shape).to(x.dtype)

        d_skills_A = d_skills_B = d_weights = None
        if needs_A or needs_B or needs_weights:
            x_GMI = x.reshape(groups, tokens, -1).to(dy.dtype)
            dA = _sum_by_row(torch.bmm(x_GMI.mT, d_xA), index, weights, skills_A.dtype)
            dB = _sum_by_row(torch.bmm(dy_GMO.mT, xA), index, weights, skills_B.dtype)
            if needs_A:
                d_skills_A = _skill_gradient(weights, dA, skills_A)
            if needs_B:
                d_skills_B = _skill_gradient(weights, dB, skills_B, ctx.scale)
            if needs_weights:
                d_HGS = _heads(dA, weights).bmm(_heads(skills_A, weights).mT)
                d_HGS.baddbmm_(_heads(dB, weights), _heads(skills_B, weights).mT, alpha=ctx.scale)
                d_weights = d_HGS.transpose(0, 1).to(weights.dtype)
        d_output = dy if needs_output else None
        return dx, d_output, None, None, d_skills_A, d_skills_B, d_weights, None, None


def _heads(factor: Tensor, weights_GHS: Tensor) -> Tensor:
    """(G or S, D, R) as (H, G or S, F): a view, the heads' blocks of features flattened with the rank."""
    return factor.reshape(factor.shape[0], weights_GHS.shape[1], -1).transpose(0, 1)


def _sum_by_row(d: Tensor, index: Tensor | None, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Gradient of the gathered factors as gradient of the distinct ones, in the dtype of the masters."""
    d = d.to(dtype)
    if index is None or weights is None:
        return d
    return d.new_zeros(weights.shape[0], *d.shape[1:]).index_add_(0, index, d)


def _skill_gradient(weights: Tensor | None, d: Tensor, skills: Tensor, scale: float = 1.0) -> Tensor:
    n_skills = skills.shape[0]
    if weights is None:
        return (d * (scale / n_skills)).expand(n_skills, -1, -1)
    weights_HSG = weights.to(d.dtype).permute(1, 2, 0)
    d_HGF = _heads(d, weights)
    out_HSF = d.new_empty(d_HGF.shape[0], n_skills, d_HGF.shape[2])
    return out_HSF.baddbmm_(weights_HSG, d_HGF, beta=0, alpha=scale).transpose(0, 1).reshape(skills.shape)
