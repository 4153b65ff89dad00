"""Boxes as distributions, from D-FINE: each edge is an expected distance from a reference box.

A head gives R + 1 logits for each edge (R = `reg_max`, 32). Their softmax weighs the fixed distances
W(0) … W(R), dense around zero and coarse far away, and the expectation says by how many widths or heights
over s (s = `reg_scale`) the edge lies beyond half a size of the reference box.

Source: Peng et al., D-FINE, ICLR 2025, section 4.1, with the constants its code and DEIMv2's use.
Edges come in the order left, top, right, bottom.
"""

from __future__ import annotations

__all__ = [
    "box_to_distance",
    "distance_to_bins",
    "distance_to_box",
    "expected_distance",
    "weighting_function",
]

import torch
from torch import Tensor

from thawline.ops.boxes import xyxy_to_cxcywh


def weighting_function(reg_max: int, up: Tensor, reg_scale: Tensor) -> Tensor:
    """Return the distances W(0) … W(R) of the bins.

    Odd about the middle bin, strictly increasing, geometric between -up·s and up·s, with one far bin at
    ±2·up·s on each side.

    Args:
        reg_max: R, even, at least 4.
        up, reg_scale: one value each; the result has the dtype and device of `up`.
    Returns: (R + 1,).
    """
    bound = (up * reg_scale).abs().reshape(()).to(up.dtype)
    steps = torch.arange(1, reg_max // 2, device=up.device, dtype=up.dtype)
    growth = (bound + 1) ** (2 / (reg_max - 2))
    right = growth**steps - 1
    far, middle = (2 * bound).reshape(1), torch.zeros(1, device=up.device, dtype=up.dtype)
    return torch.cat([-far, -right.flip(0), middle, right, far])


def expected_distance(corner_logits: Tensor, weights: Tensor) -> Tensor:
    """Return the expected distances of the four edges.

    Args:
        corner_logits: (..., 4·(R+1)), edge-major.        weights: W, (R+1,).
    Returns: (..., 4).
    """
    probabilities = corner_logits.unflatten(-1, (4, weights.numel())).softmax(dim=-1)
    return probabilities @ weights.to(probabilities.dtype)


def distance_to_box(reference_cxcywh: Tensor, distance: Tensor, reg_scale: Tensor) -> Tensor:
    """Move each edge of the reference box by its distance. Zero distance gives the reference box.

    Args:
        reference_cxcywh, distance: (..., 4).        reg_scale: one value.
    Returns: cxcywh, (..., 4), not clipped; width or height is negative where opposite edges cross.
    """
    scale = reg_scale.abs()
    centre, size = reference_cxcywh[..., :2], reference_cxcywh[..., 2:]
    unit = size / scale
    low = centre - (0.5 * scale + distance[..., :2]) * unit
    high = centre + (0.5 * scale + distance[..., 2:]) * unit
    return xyxy_to_cxcywh(torch.cat([low, high], dim=-1))


def box_to_distance(reference_cxcywh: Tensor, boxes_xyxy: Tensor, reg_scale: Tensor) -> Tensor:
    """Return the distances from the reference box to `boxes_xyxy`: the inverse of `distance_to_box`.

    Args:
        reference_cxcywh, boxes_xyxy: (..., 4).        reg_scale: one value.
    Returns: (..., 4), unbounded; a reference without size gives huge, finite values.
    """
    scale = reg_scale.abs()
    centre, size = reference_cxcywh[..., :2], reference_cxcywh[..., 2:]
    unit = size / scale + 1e-16
    low = (centre - boxes_xyxy[..., :2]) / unit - 0.5 * scale
    high = (boxes_xyxy[..., 2:] - centre) / unit - 0.5 * scale
    return torch.cat([low, high], dim=-1)


def distance_to_bins(distance: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Split each distance between the two bins around it.

    Args:
        distance: (...), any range; what lies outside [W(0), W(R)] goes wholly to the end bin.
        weights: W, (R+1,).
    Returns: the left bin k in [0, R-1], int64 (...), and the share in [0, 1] of bin k + 1, (...).
    """
    last = weights.numel() - 2
    left = (torch.searchsorted(weights, distance.contiguous(), right=True) - 1).clamp(0, last)
    low, high = weights[left], weights[left + 1]
    return left, ((distance - low) / (high - low)).clamp(0, 1)
