"""Rotary position embedding: rotate pairs of channels of queries and keys by position-dependent angles.

Source: Su et al., RoFormer (2021); for images Heo et al., ECCV 2024, as DINOv3 uses it.

Legend: B images, T tokens, H heads, C channels, D channels of a head.
"""

from __future__ import annotations

__all__ = ["Table", "rotate", "rotate_pairs", "rotated_heads"]

from typing import Any, TypeAlias

import torch
from torch import Tensor

Table: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines, (T, D) each."""


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate each pair (x[j], x[j + D/2]) by its angle.

    Args:
        x: (..., T, D).        table: cosines and sines, (T, D) each, the second half equal to the first.
    """
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def rotated_heads(qkv: Tensor, table: Table, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split into rotated queries, rotated keys and values: (B, T, 3·C) to three of (B, H, T, D)."""
    is_wide = qkv.dtype in (torch.float32, torch.float64)
    if is_wide and qkv.requires_grad and not torch.compiler.is_compiling():
        return _RotateHeads.apply(qkv, *table, num_heads)
    query, key, value = _heads(qkv, num_heads).unbind(0)
    return rotate(query, table), rotate(key, table), value


class _RotateHeads(torch.autograd.Function):
    """Split and rotate, writing each value once in forward and backward.

    The outputs are dense: attention reads them a tenth faster. Only the table is kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        query, key, value = _heads(qkv, num_heads).unbind(0)
        return (
            _turned(query, cos, sin, out=qkv.new_empty(query.shape)),
            _turned(key, cos, sin, out=qkv.new_empty(query.shape)),
            value.contiguous(),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        batch, heads, tokens, dim = grads[0].shape
        whole = grads[0].new_empty(batch, tokens, 3 * heads * dim)
        query, key, value = _heads(whole, heads).unbind(0)
        _turned(grads[0], cos, -sin, out=query)
        _turned(grads[1], cos, -sin, out=key)
        value.copy_(grads[2])
        return whole, None, None, None


def _heads(qkv: Tensor, num_heads: int) -> Tensor:
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor) -> Tensor:
    """`rotate` into `out`."""
    half = x.shape[-1] // 2
    (a, b), (out_a, out_b), cos, sin = x.chunk(2, -1), out.chunk(2, -1), cos[:, :half], sin[:, :half]
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


def rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate each pair (x[2j], x[2j + 1]) by its angle; x may be overwritten.

    Args:
        x: (B, T, ..., D).        turns: cosines and sines, (T, ..., D / 2, 2).
    """
    pairs = x.unflatten(-1, (-1, 2))
    if x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        # One pass in place instead of five with copies; compilers want the plain form.
        torch.view_as_complex(pairs).mul_(torch.view_as_complex(turns))
        return x
    (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
