"""Mixing an inventory of LoRA skills by routing weights, and adding the mixture to a frozen linear.

A skill s is a pair of factors A_s (I, R) and B_s (O, R). A routing row gives every head q, a contiguous block
of A's input features and of B's output features, its own weights over the skills:

    A^(q) = Σ_s w_qs A_s^(q)      B^(q) = c · Σ_s w_qs B_s^(q)      y = W x + b + B Aᵀ x

The factors are averaged and then multiplied, so cross terms A_s B_s' exist and the rank stays R. One head is
Poly (Ponti et al. 2022, arXiv 2202.13914), more are MHR (Caccia et al. 2023, arXiv 2211.03831).

B is stored (S, O, R), as LoRA stores it, and not (S, R, O) as the authors do: head blocks of both factors are
then slices without a copy, and the inventory does not depend on the number of heads.

`mix_skills` and `apply_low_rank` are plain differentiable torch. `mix_skills_of_many` and `low_rank_linear`
are the same arithmetic as one autograd node each: skills are mixed in their own dtype and applied in that of
the output, the update is written into the base's own output, and only the input itself, the mixed factors and
x A are kept for backward. Both nodes can be differentiated twice.

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


def mix_skills(
    weights_GHS: Tensor | None, skills_SDR: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0
) -> Tensor:
    """Average the skills, head by head, once for each routing row.

    Args:
        weights_GHS: one weight per row, head and skill; `None` averages the skills uniformly (G = 1).
        skills_SDR: one factor of every skill; H divides D.
        dtype: dtype of the result; `None` keeps that of the skills, in which the sum itself runs.
        scale: factor of the result. The scale of an update goes into B.
    Returns: (G, D, R), contiguous.
    """
    n_skills, *factor_shape = skills_SDR.shape
    dtype = dtype or skills_SDR.dtype
    if weights_GHS is None:
        mean = skills_SDR if n_skills == 1 else skills_SDR.mean(0, keepdim=True)
        return _times(mean, scale).to(dtype)
    weights_GHS = _times(weights_GHS, scale)
    groups, n_heads, _ = weights_GHS.shape
    heads_HSF = skills_SDR.reshape(n_skills, n_heads, -1).transpose(0, 1)
    with _no_autocast(skills_SDR):
        mixed_HGF = torch.bmm(weights_GHS.to(skills_SDR.dtype).transpose(0, 1), heads_HSF)
    return mixed_HGF.transpose(0, 1).to(dtype).reshape(groups, *factor_shape)


def apply_low_rank(base: Tensor | FrozenLinear, x: Tensor, A_GIR: Tensor, B_GOR: Tensor) -> Tensor:
    """Return base(x) + (x A) Bᵀ, where consecutive rows of `x` in G equal groups share their factors.

    Args:
        base: the base's output, (..., O), which stays unchanged; or its (weight, bias), which run here and
            whose output is then changed in place if gradients are disabled.
        x: (..., I), cast to the output's dtype if it has another.
        A_GIR, B_GOR: mixed factors, in the output's dtype.
    Returns: (..., O).
    """
    y = F.linear(x, *base) if isinstance(base, tuple) else base
    groups = A_GIR.shape[0]
    xA_GMR = torch.bmm(_cast(_grouped(x, groups), y.dtype), A_GIR)
    y_GMO = _grouped(y, groups)
    if isinstance(base, tuple) and not torch.is_grad_enabled():
        y_GMO.baddbmm_(xA_GMR, B_GOR.mT)
        return y
    return torch.baddbmm(y_GMO, xA_GMR, B_GOR.mT).view(y.shape)


def apply_low_rank_by_token(
    base: Tensor | FrozenLinear, x: Tensor, A_UIR: Tensor, B_UOR: Tensor, index: Tensor
) -> Tensor:
    """Apply low-rank updates token by token (see `apply_low_rank`): packed sequences of several tasks.

    All U updates' x A are computed and those of other tasks set to zero, so that tokens are neither sorted
    nor copied. It costs U times the small products, which pays as long as U · R is well below I and O.

    Args:
        index: (tokens,), the one of the U rows that each token uses, in the order of x's leading axes.
    """
    y = F.linear(x, *base) if isinstance(base, tuple) else base
    n_rows, in_features, r = A_UIR.shape
    A = A_UIR.transpose(0, 1).reshape(in_features, n_rows * r)
    B = B_UOR.transpose(0, 1).reshape(-1, n_rows * r)
    own = index[:, None] == torch.arange(n_rows, device=index.device)
    xA = (x.reshape(-1, in_features).to(y.dtype) @ A).view(-1, n_rows, r) * own[:, :, None]
    return torch.addmm(y.reshape(-1, y.shape[-1]), xA.view(-1, n_rows * r), B.mT).view(y.shape)


def mix_skills_of_many(
    weights_NUHS: Tensor,
    A_SIR: Sequence[Tensor],
    B_SOR: Sequence[Tensor],
    index: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Mix both factors of N layers of one shape by one autograd node, whose launches do not grow with N.

    Keeps no copy of the skills: the stack that they are mixed from is made again in the backward.

    Args:
        weights_NUHS: for each of N layers, the weights of the U distinct rows.
        A_SIR: N factors (S, I, R).     B_SOR: N factors (S, O, R).
        index: (G,), the row that each group uses; `None` if group g uses row g.
        dtype: dtype of the results; `None` keeps that of the skills.
        scale: factor of every mixed B.
    Returns: N mixed A (G, I, R), then N mixed B (G, O, R).
    """
    return _MixSkills.apply(weights_NUHS, index, dtype or A_SIR[0].dtype, scale, *A_SIR, *B_SOR)


def low_rank_linear(base: Tensor | FrozenLinear, x: Tensor, A_GIR: Tensor, B_GOR: Tensor) -> Tensor:
    """Do what `apply_low_rank` does as one autograd node that keeps only its inputs and x A for backward.

    Given (weight, bias), the base runs here: its output is changed in place, and its input gradient, ∂y W, is
    accumulated in place.
    """
    y, weight, bias = (None, *base) if isinstance(base, tuple) else (base, None, None)
    return _LowRankLinear.apply(x, y, weight, bias, A_GIR, B_GOR)


class _LowRankLinear(torch.autograd.Function):
    """Node of `low_rank_linear`. ∂(xA) = ∂y B,  ∂A = xᵀ ∂(xA),  ∂B = ∂yᵀ (xA),  ∂x = ∂y W + ∂(xA) Aᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
    ) -> Tensor:
        out = F.linear(x, weight, bias) if y is None else y
        xA_GRM = _small_product(x, A, out.dtype)
        out_GMO = _grouped(out, A.shape[0])
        if y is None:
            out_GMO.baddbmm_(xA_GRM.mT, B.mT)
        else:
            out = torch.baddbmm(out_GMO, xA_GRM.mT, B.mT).view(y.shape)
        ctx.save_for_backward(x, weight, A, B, xA_GRM)
        # Autograd lets nobody write into a view made here, and networks add their residual in place.
        return torch.ops.aten._unsafe_view.default(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: its context costs a small model 2 % of its step. Differentiated twice, x A
        # needs a graph, so it is made again with one.
        x, weight, A, B, xA_GRM = ctx.saved_tensors
        needs_x, needs_y, _, _, needs_A, needs_B = ctx.needs_input_grad
        groups, dtype = A.shape[0], dy.dtype
        if torch.is_grad_enabled():
            xA_GRM = _small_product(x, A, dtype)
        dy_GMO = _grouped(dy, groups)
        d_xA_GRM = torch.bmm(B.mT, dy_GMO.mT)
        dx = dA = dB = None
        if needs_x:
            if weight is None:
                dx = torch.bmm(d_xA_GRM.mT, A.mT).view(x.shape)
            else:
                dx = dy @ _cast(weight, dtype)
                _grouped(dx, groups).baddbmm_(d_xA_GRM.mT, A.mT)
            dx = _cast(dx, x.dtype)
        if needs_A:
            dA = torch.bmm(d_xA_GRM, _cast(_grouped(x, groups), dtype)).mT
        if needs_B:
            dB = torch.bmm(xA_GRM, dy_GMO).mT
        return dx, dy if needs_y else None, None, None, dA, dB


def _small_product(x: Tensor, A_GIR: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (x A)ᵀ, (G, R, M).

    All small products are transposed here: on a CPU one R columns wide takes four times one R rows high.
    """
    return torch.bmm(A_GIR.mT, _cast(_grouped(x, A_GIR.shape[0]), dtype).mT)


class _MixSkills(torch.autograd.Function):
    """Node of `mix_skills_of_many`. Per head, ∂skill_s = Σ_u w_us ∂mixed_u and ∂w_us = <skill_s, ∂mixed_u>.

    Factors of several layers are put side by side, (S, N·D, R), in which the heads of all layers are one axis
    X.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights_NUHS: Tensor,
        index: Tensor | None,
        dtype: torch.dtype,
        scale: float,
        *skills_SDR: Tensor,
    ) -> tuple[Tensor, ...]:
        n, _, n_heads, _ = weights_NUHS.shape
        w_XUS = _by_head(weights_NUHS, skills_SDR[0].dtype)
        mixed: list[Tensor] = []
        with _no_autocast(w_XUS):
            for factors, c in ((skills_SDR[:n], 1.0), (skills_SDR[n:], scale)):
                mixed_UXF = torch.bmm(_times(w_XUS, c), _side_by_side(factors, n_heads)).transpose(0, 1)
                if index is not None:
                    mixed_UXF = mixed_UXF.index_select(0, index)
                # One pass brings the rows to the front and casts.
                mixed_UXF = mixed_UXF.to(dtype, memory_format=torch.contiguous_format)
                mixed += mixed_UXF.reshape(len(mixed_UXF), n, *factors[0].shape[1:]).unbind(1)
        ctx.scale = scale
        ctx.save_for_backward(weights_NUHS, w_XUS, index, *skills_SDR)
        return tuple(mixed)

    @staticmethod
    def backward(ctx: Any, *d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        weights_NUHS, w_XUS, index, *skills_SDR = ctx.saved_tensors
        n, rows, n_heads, n_skills = weights_NUHS.shape
        if torch.is_grad_enabled():  # differentiated twice: with a graph of its own
            w_XUS = _by_head(weights_NUHS, w_XUS.dtype)
        needs_weights, _, _, _, *needs_skills = ctx.needs_input_grad
        d_XUS: Tensor | None = None
        d_skills: list[Tensor | None] = []
        for part, c in ((slice(n), 1.0), (slice(n, None), ctx.scale)):
            d_XUF = _side_by_side(d_mixed[part], n_heads).to(w_XUS.dtype)
            if index is not None:
                d_XUF = d_XUF.new_zeros(len(d_XUF), rows, d_XUF.shape[2]).index_add_(1, index, d_XUF)
            if needs_weights:
                skills_XFS = _side_by_side(skills_SDR[part], n_heads).mT
                if d_XUS is None:
                    d_XUS = torch.bmm(d_XUF, skills_XFS)
                else:
                    d_XUS.baddbmm_(d_XUF, skills_XFS, alpha=c)
            if any(needs_skills[part]):
                d_NSHF = torch.bmm(_times(w_XUS, c).mT, d_XUF).view(n, n_heads, n_skills, -1).transpose(1, 2)
                d_skills += d_NSHF.reshape(n, *skills_SDR[part][0].shape).unbind(0)
            else:
                d_skills += [None] * n
        d_weights: Tensor | None = None
        if d_XUS is not None:
            d_weights = d_XUS.view(n, n_heads, rows, n_skills).transpose(1, 2).to(weights_NUHS.dtype)
        return d_weights, None, None, None, *d_skills


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off, which would mix skills in 16 bits that are kept in 32."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _times(weights: Tensor, c: float) -> Tensor:
    return weights if c == 1 else weights * c


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """Reshape (..., D) to (groups, M, D), at no cost if it has that shape."""
    if rows.dim() == 3 and rows.shape[0] == groups:
        return rows
    return rows.reshape(groups, -1, rows.shape[-1])


def _by_head(weights_NUHS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights as (N·H, U, S), to multiply skills put `_side_by_side`."""
    n, rows, n_heads, n_skills = weights_NUHS.shape
    return weights_NUHS.transpose(1, 2).reshape(n * n_heads, rows, n_skills).to(dtype)


def _side_by_side(factors_KDR: Sequence[Tensor], n_heads: int) -> Tensor:
    """Join N tensors (K, D, R) to (N·H, K, F), F = features of a head · R; a single one is not copied."""
    stacked = factors_KDR[0] if len(factors_KDR) == 1 else torch.cat(list(factors_KDR), 1)
    return stacked.reshape(stacked.shape[0], len(factors_KDR) * n_heads, -1).transpose(0, 1)
