"""A linear layer whose weight is stored quantised, with changed columns written into each dequantised copy.

Forward dequantises the whole weight, writes the columns into the copy and multiplies once; backward does so
again for ∂x. Kept for backward are x at the columns and what the layer holds anyway: nothing of the weight's
full size. The copy lives for one product, so that the allocator hands every layer the same memory.

PaCA on quantised weights is QPaCA (Woo et al., PaCA, ICLR 2025). Here the change is added to the dequantised
columns, so that the start equals the quantised base.

Axes: O out features, I in features, R selected columns, T tokens.
"""

from __future__ import annotations

__all__ = ["dequantised_linear"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from thawline.ops.partial_linear import refuse_second_derivatives, skinny_product


def dequantised_linear(
    x: Tensor,
    bias: Tensor | None,
    dequantise: Callable[[], Tensor],
    columns: Sequence[Tensor] = (),
    indices: Sequence[Tensor] = (),
    scales: Sequence[float] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x Wᵀ + bias with W = dequantise() and W[:, index] += scale · columns for each change.

    Args:
        x: (..., I). Its gradient is that of the changed weight.
        bias: (O,), frozen, or None.
        dequantise: returns the weight, (O, I), as a tensor that may be written.
        columns: trainable changes, (O, R) each, added in the wider dtype; each sum is rounded to `dtype`.
        indices: (R,), int64, unique, for each change.
        scales: a factor for each change.
        dtype: of the product. None: that of `x`.
    Returns: (..., O), in the dtype of `x`.
    Source: Woo et al., PaCA, ICLR 2025 (QPaCA).
    """
    n = len(columns)
    return _DequantisedLinear.apply(
        x, bias, dequantise, tuple(scales), dtype or x.dtype, n, *columns, *indices
    )


class _DequantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        bias: Tensor | None,
        dequantise: Callable[[], Tensor],
        scales: tuple[float, ...],
        dtype: torch.dtype,
        n: int,
        *changes: Tensor,
    ) -> Tensor:
        columns, indices = changes[:n], changes[n:]
        weight = _changed(dequantise, dtype, columns, indices, scales)
        inputs = [
            x.index_select(-1, index).to(dtype) if change.requires_grad else x.new_empty(0)
            for change, index in zip(columns, indices, strict=True)
        ]
        ctx.save_for_backward(*changes, *inputs)
        ctx.dequantise, ctx.scales, ctx.n = dequantise, scales, n
        y = nn.functional.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        n, saved = ctx.n, ctx.saved_tensors
        columns, indices, inputs = saved[:n], saved[n : 2 * n], saved[2 * n :]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _changed(ctx.dequantise, grad.dtype, columns, indices, ctx.scales)
        grads: list[Tensor | None] = []
        for change, x_TR, scale in zip(columns, inputs, ctx.scales, strict=True):
            if x_TR.numel() == 0:
                grads.append(None)
                continue
            flat = grad.reshape(-1, grad.shape[-1]).to(x_TR.dtype)
            columns_grad = skinny_product(flat, x_TR.reshape(-1, x_TR.shape[-1]), change.dtype)
            grads.append(columns_grad if scale == 1.0 else columns_grad.mul_(scale))
        return grad_x, None, None, None, None, None, *grads, *([None] * n)


def _changed(
    dequantise: Callable[[], Tensor],
    dtype: torch.dtype,
    columns: Sequence[Tensor],
    indices: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    weight = dequantise()
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    for change, index, scale in zip(columns, indices, scales, strict=True):
        before = weight.index_select(1, index)
        weight.index_copy_(1, index, torch.add(before, change.to(before.device), alpha=scale).to(dtype))
    return weight
