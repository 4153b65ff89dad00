"""Blocks that the encoders and the decoder share.

Attribute names are the authors', because they are the keys of every published checkpoint. Source: Huang et
al., DEIMv2, arXiv 2509.20787; the ELAN block is GELAN's (Wang et al., YOLOv9, 2024) as D-FINE uses it, the
re-parameterised block RepVGG's (Ding et al., CVPR 2021).
"""

from __future__ import annotations

__all__ = ["CSP", "ELAN", "MLP", "ConvNorm", "RMSNorm", "RepVGG", "SelfAttention", "SwiGLU"]

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """Convolution without bias, "same" padding for odd kernels, batch norm, activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: Literal["none", "silu"] = "none",
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H / stride, W / stride)."""
        x = self.norm(self.conv(x))
        return F.silu(x) if self.activation == "silu" else x


class RepVGG(nn.Module):
    """Sum of a 3×3 and a 1×1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return F.silu(self.conv1(x) + self.conv2(x))


class CSP(nn.Module):
    """Half of the channels pass through a chain of RepVGG blocks and are added to the other half."""

    def __init__(self, in_channels: int, channels: int, n_blocks: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, 2 * channels, activation="silu")
        self.bottlenecks = nn.Sequential(*(RepVGG(channels) for _ in range(n_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, C, H, W)."""
        straight, deep = self.conv1(x).chunk(2, dim=1)
        return straight + self.bottlenecks(deep)


class ELAN(nn.Module):
    """Two halves and two CSP chains, the second fed by the first, concatenated and mixed.

    Args:
        channels: D, in and out.
        expansion: the chains are round(expansion·D // 2) wide.
        n_blocks: RepVGG blocks of a chain.
        trailing_conv: a 3×3 convolution after each chain (N and the three lite sizes).
    """

    def __init__(self, channels: int, *, expansion: float, n_blocks: int, trailing_conv: bool) -> None:
        super().__init__()
        width = round(expansion * channels // 2)
        self.cv1 = ConvNorm(channels, 2 * channels, activation="silu")
        self.cv2 = _chain(channels, width, n_blocks, trailing_conv)
        self.cv3 = _chain(width, width, n_blocks, trailing_conv)
        self.cv4 = ConvNorm(2 * channels + 2 * width, channels, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to the same."""
        halves = self.cv1(x)
        first = self.cv2(halves.chunk(2, dim=1)[1])
        return self.cv4(torch.cat([halves, first, self.cv3(first)], dim=1))


def _chain(in_channels: int, width: int, n_blocks: int, trailing_conv: bool) -> nn.Sequential:
    tail = [ConvNorm(width, width, 3, activation="silu")] if trailing_conv else []
    return nn.Sequential(CSP(in_channels, width, n_blocks), *tail)


class MLP(nn.Module):
    """`n_layers` linears with SiLU between."""

    def __init__(self, in_features: int, hidden: int, out_features: int, n_layers: int) -> None:
        super().__init__()
        widths = [in_features, *[hidden] * (n_layers - 1), out_features]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        *inner, last = self.layers
        for layer in inner:
            x = F.silu(layer(x))
        return last(x)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, computed in float32 for every dtype of x, as the weights were trained.

    That makes it an island of float32 in a float64 model as well; equality with the authors' numbers needs
    it.
    """

    eps = 1e-6

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to the same."""
        if x.dtype == torch.float32 == self.scale.dtype:
            return F.rms_norm(x, x.shape[-1:], self.scale, self.eps)
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.scale


class SwiGLU(nn.Module):
    """w3(silu(a) · b) with [a, b] = w12(x) (Shazeer, 2020)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        for linear in (self.w12, self.w3):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to the same."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SelfAttention(nn.Module):
    """Multi-head self-attention with positions added to queries and keys, not to values.

    Parameters are named as in `torch.nn.MultiheadAttention`; no attention weights are made.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, blocked: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, T, D).        position: added to queries and keys, broadcast to x.
            blocked: (T, T), bool, True where the token of that row may not see that column's.
        Returns: (B, T, D).
        """
        dim = x.shape[-1]
        query_key = F.linear(x + position, self.in_proj_weight[: 2 * dim], self.in_proj_bias[: 2 * dim])
        value = F.linear(x, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :])
        query, key = (self._heads(part) for part in query_key.chunk(2, dim=-1))
        seen = None if blocked is None else ~blocked
        mixed = F.scaled_dot_product_attention(query, key, self._heads(value), attn_mask=seen)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
