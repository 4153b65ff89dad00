"""Train a few input channels of a frozen 2-d convolution; see `partial_linear`.

Selecting input channel c of a convolution means training weight[:, c], the filters that read it. Their
gradient is a convolution weight gradient of x[:, c] and ∂y alone, so only the selected channels of x are
kept. The paper (Woo et al., PaCA, ICLR 2025) reports convolutional networks but its code has none, so these
rules are ours: with groups, the same R of the C/groups local channels in every group; where every channel has
its own group (depthwise), R channels with their own filters.

Axes: B images, C in channels, O out channels, G groups, R selected channels (of one group), H W image,
K kernel.
"""

from __future__ import annotations

__all__ = ["ConvGeometry", "add_channels", "conv_columns", "tap_channels"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from thawline.ops.partial_linear import refuse_second_derivatives


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a convolution, as plain numbers for its weight gradient.

    `pad` (left, right, top, bottom) is applied to x first, for padding modes and 'same' padding that the
    gradient's convolution cannot express; None if `padding` suffices.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...] | None
    pad_mode: Literal["constant", "reflect", "replicate", "circular"]
    depthwise: bool

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvGeometry:
        """Read the geometry of a module."""
        padded = isinstance(conv.padding, str) or conv.padding_mode != "zeros"
        return cls(
            stride=tuple(conv.stride),
            padding=(0, 0) if padded else tuple(conv.padding),
            dilation=tuple(conv.dilation),
            groups=conv.groups,
            pad=tuple(conv._reversed_padding_repeated_twice) if padded else None,
            pad_mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode,
            depthwise=conv.groups > 1 and conv.groups == conv.in_channels,
        )


def conv_columns(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """View a convolution's weight (O, C/G, K, K) with the selectable channels on axis 1.

    Returns: the weight itself, or for a depthwise one, whose axis 1 has size 1, a view (O/C, C, K, K).
    """
    if not geometry.depthwise:
        return weight
    return weight.view(geometry.groups, -1, *weight.shape[2:]).transpose(0, 1)


def tap_channels(
    y: Tensor,
    x: Tensor,
    columns: Tensor,
    index: Tensor,
    geometry: ConvGeometry,
    scale: float = 1.0,
    on_backward: Callable[[], None] | None = None,
) -> Tensor:
    """Give `columns` their gradient without touching `y`; see `tap_columns`.

    Args:
        y: output of the frozen convolution, (B, O, H', W') or (O, H', W').
        x: its input, (B, C, H, W) or (C, H, W).
        columns: trainable, the shape of conv_columns(weight)[:, index].
        index: (R,), int64, unique, in [0, C/G), or in [0, C) for a depthwise convolution.
        geometry: of the convolution.
        scale: factor of the gradient.
        on_backward: called in this node's backward, before the convolution's own. For eager mode only.
    Returns: `y`, same storage; it may be changed in place.
    """
    return _TapChannels.apply(y, x, columns, index, geometry, scale, on_backward)


def add_channels(
    y: Tensor, x: Tensor, columns: Tensor, index: Tensor, geometry: ConvGeometry, scale: float = 1.0
) -> Tensor:
    """Return y + scale · the convolution of x at the channels `index` with `columns`; see `add_columns`.

    Args:
        y: output of the frozen convolution, (B, O, H', W') or (O, H', W').
        x: its input, (B, C, H, W) or (C, H, W).
        columns: change of the filters, the shape of conv_columns(weight)[:, index].
        index: (R,), int64, unique, in [0, C/G), or in [0, C) for a depthwise convolution.
        geometry: of the convolution.
        scale: factor of the change.
    """
    x = _select_channels(x, index, geometry)
    if geometry.pad is not None:
        x = nn.functional.pad(x, geometry.pad, mode=geometry.pad_mode)
    change = (columns.to(x.device) * scale).to(x.dtype)
    groups = geometry.groups
    if geometry.depthwise:  # (O/C, R, K, K): as a convolution of its own it has R groups
        multiplier, groups = change.shape[:2]
        change = change.transpose(0, 1).flatten(0, 1).unsqueeze(1)
    shape = (geometry.stride, geometry.padding, geometry.dilation)
    change_y = nn.functional.conv2d(x, change, None, *shape, groups).to(y.dtype)
    if not geometry.depthwise:
        return y + change_y
    n_channels = y.shape[-3] // multiplier
    of_y = (
        torch.arange(n_channels * multiplier, device=y.device).view(n_channels, multiplier)[index].flatten()
    )
    return y.index_add(-3, of_y, change_y)


class _TapChannels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: Tensor,
        x: Tensor,
        columns: Tensor,
        index: Tensor,
        geometry: ConvGeometry,
        scale: float,
        on_backward: Callable[[], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(_select_channels(x, index, geometry).to(y.dtype), index)
        ctx.geometry, ctx.scale, ctx.on_backward = geometry, scale, on_backward
        ctx.shape, ctx.dtype = columns.shape, columns.dtype
        return y.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, index = ctx.saved_tensors
        if ctx.on_backward is not None:
            ctx.on_backward()
        columns = _channel_gradient(x, grad, index, ctx.shape, ctx.geometry).to(ctx.dtype)
        if ctx.scale != 1.0:
            columns = columns * ctx.scale
        return grad, None, columns, None, None, None, None


def _select_channels(x: Tensor, index: Tensor, geometry: ConvGeometry) -> Tensor:
    """Select channels in every group: (..., C, H, W) to (..., G·R, H, W)."""
    if geometry.groups == 1 or geometry.depthwise:
        return x.index_select(-3, index)
    return x.unflatten(-3, (geometry.groups, -1)).index_select(-3, index).flatten(-4, -3)


def _channel_gradient(
    x: Tensor, grad: Tensor, index: Tensor, shape: tuple[int, ...], geometry: ConvGeometry
) -> Tensor:
    if x.dim() == 3:
        x, grad = x.unsqueeze(0), grad.unsqueeze(0)
    if geometry.pad is not None:
        x = nn.functional.pad(x, geometry.pad, mode=geometry.pad_mode)
    groups, size = geometry.groups, tuple(shape)
    if geometry.depthwise:  # columns are (O/C, R, K, K); as a convolution of its own it has R groups
        multiplier, groups = shape[0], shape[1]
        grad = grad.unflatten(1, (-1, multiplier)).index_select(1, index).flatten(1, 2)
        size = (groups * multiplier, 1, *shape[2:])
    columns = nn.grad.conv2d_weight(
        x, size, grad, geometry.stride, geometry.padding, geometry.dilation, groups
    )
    if geometry.depthwise:
        columns = columns.view(groups, -1, *shape[2:]).transpose(0, 1).contiguous()
    return columns
