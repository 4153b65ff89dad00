"""Box formats and overlaps.

`cxcywh` is centre and size in fractions of the image, what the network speaks; `xyxy` is two corners.
Overlaps come elementwise (`box_iou(a, b)`: box i with box i) and pairwise (`pairwise_iou(a, b)`: every a with
every b), so that the overlap of N matched pairs costs N and not N² values.
GIoU: Rezatofighi et al., CVPR 2019.
"""

from __future__ import annotations

__all__ = [
    "box_giou",
    "box_iou",
    "cxcywh_to_xyxy",
    "inverse_sigmoid",
    "pairwise_giou",
    "pairwise_iou",
    "xyxy_to_cxcywh",
]

import torch
from torch import Tensor

# Far below the area of one pixel of a large image (1e-8), so it moves no real overlap and makes 0/0 zero.
_SMALLEST_AREA = 1e-12


def cxcywh_to_xyxy(boxes: Tensor, *, clamp_size: bool = False) -> Tensor:
    """Convert centre and size to corners, (..., 4) to (..., 4).

    Args:
        boxes: (..., 4), any unit.
        clamp_size: read a negative width or height as zero. An untrained decoder makes such boxes; every
            overlap in matching and losses reads them so.
    """
    centre, size = boxes[..., :2], boxes[..., 2:]
    half = (size.clamp(min=0) if clamp_size else size) * 0.5
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert corners to centre and size, (..., 4) to (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) * 0.5, high - low], dim=-1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of box i of `a` with box i of `b`.

    Args:
        a, b: xyxy, (..., 4), broadcast against each other.
    Returns: (...), in [0, 1]; two empty boxes give 0.
    """
    intersection, union = _intersection_and_union(a, b)
    return intersection / union.clamp(min=_SMALLEST_AREA)


def box_giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU of box i of `a` and `b`: IoU minus the uncovered share of the hull.

    Args:
        a, b: xyxy, (..., 4), broadcast against each other.
    Returns: (...), in [-1, 1].
    """
    intersection, union = _intersection_and_union(a, b)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(dim=-1)
    iou = intersection / union.clamp(min=_SMALLEST_AREA)
    return iou - (hull - union) / hull.clamp(min=_SMALLEST_AREA)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of every box of `a` (..., N, 4) and every box of `b` (..., M, 4), xyxy: (..., N, M)."""
    return box_iou(a.unsqueeze(-2), b.unsqueeze(-3))


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """GReturn the IoU of every box of `a` (..., N, 4) and every box of `b` (..., M, 4), xyxy: (..., N, M)."""
    return box_giou(a.unsqueeze(-2), b.unsqueeze(-3))


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of a coordinate in 0–1; x and 1 - x are at least `eps`, so borders stay finite."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = _area(a) + _area(b) - intersection
    return intersection, union


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
