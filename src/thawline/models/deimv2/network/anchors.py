"""Anchors: a box around each token of the maps, from which queries start."""

from __future__ import annotations

__all__ = ["make_anchors"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ANCHOR_SIZE = 0.05
"""Width and height of the finest level's anchors; each coarser level doubles it."""
ANCHOR_MARGIN = 0.01
"""Tokens whose anchor is closer to a border are not selected: its logit would be extreme."""


def make_anchors(
    sizes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return the anchor of each token, as logits of cxcywh.

    Args:
        sizes: (H, W) of each level, fine to coarse.
    Returns: logits of cxcywh, (T, 4), float32 or wider, infinite where a side comes too close to 0 or 1; and
        whether it does not, (T, 1), in `dtype`.
    """
    anchors = []
    for level, (height, width) in enumerate(sizes):
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
        anchors.append(torch.cat([centre, torch.full_like(centre, ANCHOR_SIZE * 2**level)], dim=-1))
    boxes = torch.cat(anchors)
    valid = ((boxes > ANCHOR_MARGIN) & (boxes < 1 - ANCHOR_MARGIN)).all(dim=-1, keepdim=True)
    # In float32 also for a float64 model, as the authors' buffer is.
    logits = (boxes / (1 - boxes)).log().masked_fill(~valid, math.inf)
    return logits.to(torch.promote_types(dtype, torch.float32)), valid.to(dtype)
