"""Decoder layer and location-quality head.

Source: D-FINE (Peng et al., ICLR 2025) and DEIMv2, arXiv 2509.20787. Compared with deformable DETR the cross
attention has no projection of its values or its output: heads read the encoder's channels as they are.

Legend: B images, Q queries, D channels, H heads, P points of all levels, C classes, R + 1 bins of an edge.
"""

from __future__ import annotations

__all__ = [
    "FLOAT16_MAX",
    "OFFSET_SCALE",
    "POSITION_LIMIT",
    "DecoderLayer",
    "DeformableAttention",
    "LocationQuality",
]

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thawline.models.deimv2.network.blocks import MLP, RMSNorm, SelfAttention, SwiGLU
from thawline.ops.deformable import deformable_sample
from thawline.ops.wide import WideBuffers

FLOAT16_MAX = 65504.0
POSITION_LIMIT = 10.0
"""Limit of a query's position embedding."""
OFFSET_SCALE = 0.5
"""An offset of ±1 with one point to a level reaches the edges of the reference box."""


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the maps, feed-forward block; post-norm."""

    def __init__(
        self, dim: int, num_heads: int, ffn_dim: int, num_points: Sequence[int], *, gateway: bool
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads)
        self.norm1 = RMSNorm(dim)
        self.cross_attn = DeformableAttention(dim, num_heads, num_points)
        if gateway:
            self.gateway = Gate(dim)
        else:
            self.norm2 = RMSNorm(dim)
        self.swish_ffn = SwiGLU(dim, ffn_dim // 2)
        self.norm3 = RMSNorm(dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        maps: Sequence[Tensor],
        blocked: Tensor | None = None,
    ) -> Tensor:
        """Refine the queries.

        Args:
            x, position: (B, Q, D).        reference: (B, Q, 4), cxcywh.        maps: (B, D, h, w) per level.
            blocked: (Q, Q), bool, True where the query of that row may not see that column's.
        Returns: (B, Q, D).
        """
        x = self.norm1(x + self.self_attn(x, position, blocked))
        seen = self.cross_attn(x + position, reference, maps)
        x = self.gateway(x, seen) if hasattr(self, "gateway") else self.norm2(x + seen)
        # Keeps float16 finite; the authors' own guard.
        return self.norm3((x + self.swish_ffn(x)).clamp(-FLOAT16_MAX, FLOAT16_MAX))


class DeformableAttention(WideBuffers):
    """Deformable attention: each head samples its channels at learned points around the reference box."""

    num_points_scale: Tensor

    def __init__(self, dim: int, num_heads: int, num_points: Sequence[int]) -> None:
        super().__init__()
        self.num_heads, self.num_points = num_heads, tuple(num_points)
        n = sum(num_points)
        self.sampling_offsets = nn.Linear(dim, num_heads * n * 2)
        self.attention_weights = nn.Linear(dim, num_heads * n)
        # From float32 also in a float64 model, as the authors' buffer is.
        scale = torch.tensor(
            [1 / n_level for n_level in num_points for _ in range(n_level)], dtype=torch.float32
        )
        self.register_buffer("num_points_scale", scale.to(torch.get_default_dtype()))
        self._init_weights()

    def forward(self, query: Tensor, reference: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """(B, Q, D) at boxes (B, Q, 4) to (B, Q, D)."""
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, -1, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(dim=-1)
        centre, size = reference[:, :, None, None, :2], reference[:, :, None, None, 2:]
        locations = centre + offsets * self.num_points_scale.to(query.dtype)[:, None] * size * OFFSET_SCALE
        return deformable_sample(maps, locations, weights, self.num_points).to(query.dtype)

    def _init_weights(self) -> None:
        """Point head k in direction k of H, with points at growing distance and equal weights."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        step = torch.cat([torch.arange(1, n + 1) for n in self.num_points])
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction[:, None] * step[:, None]).flatten())
        for tensor in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
        ):
            nn.init.zeros_(tensor)


class Gate(nn.Module):
    """Gated sum of the query and its cross attention, channel by channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, 2 * dim)
        self.norm = RMSNorm(dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """(B, Q, D) twice to the same."""
        keep, take = self.gate(torch.cat([x, seen], dim=-1)).sigmoid().chunk(2, dim=-1)
        return self.norm(keep * x + take * seen)


class LocationQuality(nn.Module):
    """Correction of a box's class logits, computed from how peaked the distributions of its edges are."""

    top = 4

    def __init__(self, hidden_dim: int = 64) -> None:
        super().__init__()
        self.reg_conf = MLP(4 * (self.top + 1), hidden_dim, 1, 2)
        nn.init.zeros_(self.reg_conf.layers[-1].weight)
        nn.init.zeros_(self.reg_conf.layers[-1].bias)

    def forward(self, corner_logits: Tensor) -> Tensor:
        """(B, Q, 4·(R+1)) to (B, Q, 1)."""
        probabilities = corner_logits.unflatten(-1, (4, -1)).softmax(dim=-1)
        top = probabilities.topk(self.top, dim=-1).values
        peaks = torch.cat([top, top.mean(dim=-1, keepdim=True)], dim=-1).flatten(-2)
        return self.reg_conf(peaks.to(self.reg_conf.layers[0].weight.dtype))
