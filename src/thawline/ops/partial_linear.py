"""Train a few input columns of a frozen linear layer without replacing its matrix multiplication.

The columns live inside the weight, so the frozen layer's forward uses them and its backward gives the right
gradient to its input. This file adds the two missing parts: the gradient of the columns (`tap_columns`, an
identity on the layer's output) and writing a changed column into the weight (`write_columns`). Where a weight
cannot be written, the change of its columns is applied beside it (`split_columns`, `add_columns`).

Training W[:, I] while saving only x[..., I] is the idea of PaCA (Woo et al., ICLR 2025). The authors' code,
and PEFT's tuner, replace the layer's matrix multiplication by their own; here the layer runs untouched, with
its hooks, autocast and compiled kernels.

Axes: O out features, I in features, R selected columns, T tokens.
"""

from __future__ import annotations

__all__ = [
    "add_columns",
    "place_of",
    "read_columns",
    "refuse_second_derivatives",
    "skinny_product",
    "split_columns",
    "tap_columns",
    "write_columns",
]

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


def tap_columns(
    y: Tensor,
    x: Tensor,
    columns: Tensor,
    index: Tensor,
    scale: float = 1.0,
    on_backward: Callable[[], None] | None = None,
) -> Tensor:
    """Give `columns` their gradient without touching `y`.

    Forward is the identity on `y`; backward passes ∂y through and emits scale · ∂yᵀ x[..., index]. Keeps
    x[..., index] instead of x: activation memory falls from I to R values per token. The values of `columns`
    are not read.

    Args:
        y: output of the frozen linear, (..., O), any float dtype.
        x: its input, (..., I).
        columns: trainable, (O, R), any float dtype: the gradient is cast to it.
        index: (R,), int64, unique, in [0, I). Not checked here: this runs in every forward.
        scale: factor of the gradient; s where the weight holds original + s · columns.
        on_backward: called in this node's backward, before the linear's own and, under checkpointing, after
            the recomputed forward. For eager mode only.
    Returns: `y`, (..., O), same storage; it may be changed in place.
    Source: Woo et al., PaCA, ICLR 2025.
    """
    return _TapColumns.apply(y, x, columns, index, scale, on_backward)


def place_of(index: Tensor) -> Tensor | slice:
    """Return the columns `index` as a slice, or `index` itself where they are not adjacent.

    A row's adjacent columns are a cache line or two; scattered ones are a line each, and writing them takes
    15 to 60 times as long. Reads the index: on a GPU the host waits.

    Args:
        index: (R,), int64, unique, R at least 1.
    """
    columns = index.tolist()
    first, after = columns[0], columns[0] + len(columns)
    return slice(first, after) if columns == list(range(first, after)) else index


def read_columns(weight: Tensor, place: Tensor | slice) -> Tensor:
    """Return a copy of weight[:, place]: (O, R, ...)."""
    return weight[:, place].clone() if isinstance(place, slice) else weight.index_select(1, place)


def write_columns(weight: Tensor, place: Tensor | slice, columns: Tensor) -> None:
    """Set weight[:, place] to `columns`, in place and unseen by autograd.

    The version counter of `weight` does not change: if several forwards are in flight (pipelines, two
    losses), the same values are written again between a forward and its backward, which must not invalidate
    the graph.

    Args:
        weight: (O, I, ...), the frozen weight, or a view with its input features on axis 1.
        place: the columns, (R,), int64, unique, in [0, I), or a slice of them, from `place_of`.
        columns: (O, R, ...), dtype of `weight`.
    """
    if isinstance(place, slice):
        weight.data[:, place].copy_(columns.detach())
    else:
        weight.data.index_copy_(1, place, columns.detach())


def add_columns(y: Tensor, x_TR: Tensor, columns: Tensor, scale: float = 1.0) -> Tensor:
    """Return y + scale · x[..., index] columnsᵀ: the output as if the columns of the weight had changed.

    Args:
        y: output of the frozen linear, (..., O).
        x_TR: the selected inputs, (..., R), from `split_columns`.
        columns: change of the columns, (O, R); rounded to the dtype of `x_TR`.
        scale: factor of the change.
    """
    change = columns.to(x_TR.device)
    change = change if scale == 1.0 else change * scale
    return y + nn.functional.linear(x_TR, change.to(x_TR.dtype)).to(y.dtype)


def split_columns(x: Tensor, index: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Return x, and x at `index` of axis `dim`; the two gradients are summed in one pass.

    Args:
        x: (..., I) for `dim` -1.
        index: (R,), int64, unique.
    """
    x, selected = _SplitColumns.apply(x, index, dim)
    return x, selected


class _SplitColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, index: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        ctx.dim = dim
        return x.view_as(x), x.index_select(dim, index)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, grad_selected: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return grad.index_add(ctx.dim, index, grad_selected.to(grad.dtype)), None, None


class _TapColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: Tensor,
        x: Tensor,
        columns: Tensor,
        index: Tensor,
        scale: float,
        on_backward: Callable[[], None] | None,
    ) -> Tensor:
        # In y's dtype: under autocast the linear itself computed with it, and it has half the bytes of fp32.
        ctx.save_for_backward(x.index_select(-1, index).to(y.dtype))
        ctx.scale, ctx.on_backward, ctx.dtype = scale, on_backward, columns.dtype
        # detach(), unlike a view, may be changed in place by what follows (ReLU(inplace=True)).
        return y.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        (x_TR,) = ctx.saved_tensors
        if ctx.on_backward is not None:
            ctx.on_backward()
        x_TR = x_TR.reshape(-1, x_TR.shape[-1])
        grad_TO = grad.reshape(-1, grad.shape[-1])
        columns = skinny_product(grad_TO, x_TR, ctx.dtype)
        if ctx.scale != 1.0:
            columns.mul_(ctx.scale)
        return grad, None, columns, None, None, None


def refuse_second_derivatives() -> None:
    """Raise in a backward that is itself recorded (create_graph=True): the kept input has no graph to x.

    Does what `once_differentiable` does, at a fifth of its cost per layer.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("PaCA has no second derivatives: call backward or grad without create_graph=True.")


def skinny_product(grad_TO: Tensor, x_TR: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ∂yᵀ x as a contiguous (O, R).

    On a CPU it is faster with the narrow operand on the left, copy included: 0.36 against 0.52 ms (fp32,
    T=1024, O=512, R=16, one thread) and 1.0 against 3.0 ms in bf16.
    """
    if grad_TO.device.type == "cpu":
        return (x_TR.t() @ grad_TO).t().to(dtype, memory_format=torch.contiguous_format, copy=True)
    return (grad_TO.t() @ x_TR).to(dtype)
