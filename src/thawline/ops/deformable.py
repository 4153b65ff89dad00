"""Deformable attention's one operation: read maps at a few points, each weighted.

Source: Zhu et al., Deformable DETR, ICLR 2021; with a number of points per level as in D-FINE.

Legend: B images, D channels, H heads, Q queries, P points of all levels.
"""

from __future__ import annotations

__all__ = ["deformable_sample"]

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_sample(
    maps: Sequence[Tensor], locations: Tensor, weights: Tensor, num_points: Sequence[int]
) -> Tensor:
    """Read each level bilinearly at its points and sum, every head from its own group of channels.

    Args:
        maps: one (B, D, h, w) per level; heads are D / H channels each, in order. Used as they are, no copy.
        locations: (B, Q, H, P, 2), x and y in 0–1 from corner to corner; outside the map lie zeros.
        weights: (B, Q, H, P).
        num_points: points of each level; they sum to P.
    Returns: (B, Q, D).
    """
    batch, n_queries, n_heads, _, _ = locations.shape
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1).split(list(num_points), dim=2)
    sampled = [
        F.grid_sample(_heads_first(level, n_heads), grid, padding_mode="zeros", align_corners=False)
        for level, grid in zip(maps, grids, strict=True)
    ]  # (B·H, D / H, Q, points of the level) each
    weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)
    mixed = (torch.cat(sampled, dim=-1) * weights).sum(dim=-1)
    return mixed.view(batch, -1, n_queries).transpose(1, 2)


def _heads_first(level: Tensor, n_heads: int) -> Tensor:
    return level.unflatten(1, (n_heads, -1)).flatten(0, 1)
