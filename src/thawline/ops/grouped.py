"""Products of rows with the weight of their group, and the gradient of some columns: experts in one weight.

Mixture-of-experts layers keep the weights of all experts in one tensor, (E, I, O), and multiply rows that are
sorted by expert. `grouped_product` is the product with a frozen weight; `tap_grouped_columns` gives changed
columns their gradient, as `tap_columns` does for a linear layer: each expert's from the rows it saw.

Axes: E experts, S rows sorted by expert, I in features, O out features, R selected columns.
"""

from __future__ import annotations

__all__ = ["add_grouped_columns", "grouped_product", "tap_grouped_columns"]

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from thawline.ops.partial_linear import refuse_second_derivatives

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Bytes to which torch's grouped product wants rows aligned."""


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return x[s] @ weight[e] for each row s of each group e; rows beyond the last group are undefined.

    Args:
        x: (S, I), sorted by group.
        weight: (E, I, O), a view of any strides; x is cast to its dtype.
        ends: (E,), int32: the end of each group in x.
    Returns: (S, O). Gradients reach x, and `weight` where it asks for them.
    """
    y: Tensor = _GroupedProduct.apply(x.to(weight.dtype), weight, ends)
    return y


def tap_grouped_columns(
    y: Tensor,
    x: Tensor,
    columns: Tensor,
    index: Tensor,
    ends: Tensor,
    scale: float = 1.0,
    on_backward: Callable[[], None] | None = None,
) -> Tensor:
    """Give `columns`, (E, R, O), their gradient without touching `y`, and keep x[..., index] alone.

    Arguments as of `tap_columns` and `grouped_product`.
    """
    return _TapGroupedColumns.apply(y, x, columns, index, ends, scale, on_backward)


def add_grouped_columns(y: Tensor, x_SR: Tensor, columns: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Return y as if `scale` · columns, (E, R, O), had been added to the weight at the columns of x_SR."""
    return y + grouped_product(x_SR, (columns * scale).to(x_SR.dtype), ends).to(y.dtype)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(weight, ends, *([x] if weight.requires_grad else []))
        return _rows_by_groups(x, weight, ends)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, ends, *x = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _rows_by_groups(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        return grad_x, _columns_by_groups(x[0], grad, ends) if x else None, None


class _TapGroupedColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: Tensor,
        x: Tensor,
        columns: Tensor,
        index: Tensor,
        ends: Tensor,
        scale: float,
        on_backward: Callable[[], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(x.index_select(-1, index).to(y.dtype), ends)
        ctx.scale, ctx.on_backward, ctx.dtype = scale, on_backward, columns.dtype
        return y.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x_SR, ends = ctx.saved_tensors
        if ctx.on_backward is not None:
            ctx.on_backward()
        columns = _columns_by_groups(x_SR, grad.contiguous(), ends).to(ctx.dtype)
        if ctx.scale != 1.0:
            columns.mul_(ctx.scale)
        return grad, None, columns, None, None, None, None


def _rows_by_groups(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return (S, O) of x (S, I) and weight (E, I, O)."""
    if _has_kernel(x) and _is_aligned(x) and _is_aligned(weight):
        return nn.functional.grouped_mm(x, weight, offs=ends)
    y = x.new_zeros(len(x), weight.shape[-1])
    for expert, rows in enumerate(_rows(ends)):
        torch.mm(x[rows], weight[expert], out=y[rows])
    return y


def _columns_by_groups(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """Return each group's xᵀ ∂y, (E, R, O), of x (S, R) and ∂y (S, O)."""
    r, n_out = x.shape[1], grad.shape[1]
    if _has_kernel(x):
        return nn.functional.grouped_mm(_padded(x).t(), _padded(grad), offs=ends)[:, :r, :n_out].contiguous()
    return torch.stack([x[rows].t() @ grad[rows] for rows in _rows(ends)])


def _rows(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _has_kernel(x: Tensor) -> bool:
    if x.dtype not in FLOATS or not hasattr(nn.functional, "grouped_mm"):
        return False
    if torch.compiler.is_compiling() and x.dtype is not torch.bfloat16:
        return False  # the compiler knows no other
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)


def _is_aligned(matrix: Tensor) -> bool:
    strides = [stride for stride in matrix.stride() if stride != 1]
    return all(stride * matrix.element_size() % ALIGNMENT == 0 for stride in strides)


def _padded(matrix: Tensor) -> Tensor:
    unit = ALIGNMENT // matrix.element_size()
    lacking = -matrix.shape[1] % unit
    return nn.functional.pad(matrix, (0, lacking)) if lacking else matrix
