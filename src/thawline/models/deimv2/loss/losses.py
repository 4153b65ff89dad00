"""Formulas of DEIMv2's losses, each over all stages at once.

Classification: MAL (Huang et al., DEIM, CVPR 2025) and what it replaced, VFL (Zhang et al., CVPR 2021) and
focal (Lin et al., ICCV 2017). Localisation: L1, GIoU, and D-FINE's (Peng et al., ICLR 2025) two terms on the
distributions of the edges: FGL pulls them to the box, DDF pulls earlier layers to the last one.

All but DDF are sums, which the caller divides. IoUs and teachers are detached.

Legend: S stages, B images, Q queries, C classes, N matched pairs, R + 1 bins.
"""

from __future__ import annotations

__all__ = [
    "CLASS_LOSSES",
    "box_losses",
    "ddf_balance",
    "ddf_loss",
    "fgl_loss",
    "focal_loss",
    "mal_loss",
    "vfl_loss",
]

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from thawline.ops.boxes import box_giou, cxcywh_to_xyxy

Where = tuple[Tensor, ...]
"""Index tensors (stage, image, query) or (stage, image, query, class), each broadcasting to (S, N)."""

VFL_ALPHA = FOCAL_ALPHA = 0.75
DDF_TEMPERATURE = 5.0


def mal_loss(logits: Tensor, where: Where, iou: Tensor, gamma: float) -> Tensor:
    """Matchability-aware loss: target IoU^γ with weight 1 for the matched class, 0 with weight p^γ elsewhere.

    Args:
        logits: (S, B, Q, C).        where: index of the matched logits.        iou: (S, N), detached.
    Returns: (S,)
    """
    weight = logits.detach().sigmoid() ** gamma
    weight[where] = 1
    return _weighted_bce(logits, weight, where, iou**gamma)


def vfl_loss(logits: Tensor, where: Where, iou: Tensor, gamma: float) -> Tensor:
    """Varifocal loss: target IoU with weight IoU for the matched class, 0 with weight α·p^γ elsewhere."""
    weight = VFL_ALPHA * logits.detach().sigmoid() ** gamma
    weight[where] = iou.to(weight.dtype)
    return _weighted_bce(logits, weight, where, iou)


def focal_loss(logits: Tensor, where: Where, iou: Tensor, gamma: float) -> Tensor:
    """Sigmoid focal loss with hard targets; the IoU is not used, and gradient flows through the weights."""

    def off(x: Tensor) -> Tensor:
        return (1 - FOCAL_ALPHA) * x.sigmoid() ** gamma * F.softplus(x)

    def on(x: Tensor) -> Tensor:
        return FOCAL_ALPHA * (-x).sigmoid() ** gamma * F.softplus(-x)

    matched = logits[where]
    return off(logits).sum(dim=(1, 2, 3)) + (on(matched) - off(matched)).sum(dim=1)


CLASS_LOSSES: dict[str, Callable[[Tensor, Where, Tensor, float], Tensor]] = {
    "mal": mal_loss,
    "vfl": vfl_loss,
    "focal": focal_loss,
}


def box_losses(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of |Δcxcywh| and of 1 - GIoU over matched pairs.

    Args:
        boxes, target_boxes: (S, N, 4), cxcywh.
    Returns: two of (S,).
    """
    l1 = (boxes - target_boxes).abs().sum(dim=(1, 2))
    giou = box_giou(cxcywh_to_xyxy(boxes, clamp_size=True), cxcywh_to_xyxy(target_boxes, clamp_size=True))
    return l1, (1 - giou).sum(dim=1)


def fgl_loss(corner_logits: Tensor, left: Tensor, share: Tensor, iou: Tensor) -> Tensor:
    """Fine-grained localisation: cross entropy with the two bins around each edge's distance, times IoU.

    Args:
        corner_logits: matched, (S, N, 4·(R+1)).
        left, share: (S, N, 4), the left bin and the share of the one to its right.
        iou: (S, N), detached.
    Returns: (S,)
    """
    log_p = corner_logits.unflatten(-1, (4, -1)).log_softmax(dim=-1)
    low = log_p.gather(-1, left[..., None]).squeeze(-1)
    high = log_p.gather(-1, left[..., None] + 1).squeeze(-1)
    cross_entropy = -((1 - share) * low + share * high)
    return (iou[..., None] * cross_entropy).sum(dim=(1, 2))


def ddf_balance(n_matched: int, n_rest: int, batch_size: int) -> tuple[float, float]:
    """Return the weights of matched and other queries in DDF: roots of their edges, eight per image."""
    return math.sqrt(4 * n_matched * 8 / batch_size), math.sqrt(4 * n_rest * 8 / batch_size)


def ddf_loss(
    corner_logits: Tensor,
    teacher_logits: Tensor,
    confidence: Tensor,
    where: Where,
    iou: Tensor,
    balance: tuple[float, float],
) -> Tensor:
    """Decoupled distillation: KL from the last layer's distributions to each earlier layer's.

    A matched query weighs as much as its box overlaps, another as much as the teacher is confident; the means
    of the two kinds are averaged by `balance`. A student equal to its teacher gives zero and no gradient.

    Args:
        corner_logits: (S, B, Q, 4·(R+1)).        teacher_logits: (B, Q, 4·(R+1)).
        confidence: (B, Q), the teacher's best class probability.
        where: index (stage, image, query) of the matched queries.        iou: (S, N), detached.
    Returns: (S,), a mean already.
    """
    student = (corner_logits.unflatten(-1, (4, -1)) / DDF_TEMPERATURE).log_softmax(dim=-1)
    teacher = (teacher_logits.detach().unflatten(-1, (4, -1)) / DDF_TEMPERATURE).log_softmax(dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=(-2, -1))  # of the four edges: (S, B, Q)

    weight = confidence.detach().expand(divergence.shape).clone()
    weight[where] = iou.to(weight.dtype)
    matched = torch.zeros_like(weight)
    matched[where] = 1
    loss = DDF_TEMPERATURE**2 * weight * divergence

    n_matched = iou.shape[1]
    n_rest = weight[0].numel() - n_matched
    on = (loss * matched).sum(dim=(1, 2)) / max(1, 4 * n_matched)
    off = (loss * (1 - matched)).sum(dim=(1, 2)) / max(1, 4 * n_rest)
    return (on * balance[0] + off * balance[1]) / (balance[0] + balance[1])


def _weighted_bce(logits: Tensor, weight: Tensor, where: Where, target: Tensor) -> Tensor:
    """Σ weight · BCE(logits, target), where targets are zero except at `where`: (S,)."""
    background = (weight * F.softplus(logits)).sum(dim=(1, 2, 3))
    return background - (weight[where] * target * logits[where]).sum(dim=1)
