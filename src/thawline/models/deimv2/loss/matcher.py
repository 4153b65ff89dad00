"""Bipartite matching of queries to boxes: one batched cost, one copy to the host, one assignment each.

Source: the set matching of DETR (Carion et al., ECCV 2020) with the costs of D-FINE, and DEIMv2's second
cost of score and overlap alone from `matcher_change_epoch` on. Stages are the outputs that are matched
independently: the final layer, the earlier ones, the first layer's plain head, the encoder's proposals.

Legend: S stages, B images, Q queries, G boxes of the fullest image, N matched pairs of the batch.
"""

from __future__ import annotations

__all__ = ["Matches", "match_queries", "matching_cost", "union_of_matches"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from thawline.errors import MissingExtraError
from thawline.models.deimv2.loss.targets import PackedTargets
from thawline.ops.boxes import cxcywh_to_xyxy, pairwise_giou, pairwise_iou

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Indices = NDArray[np.int64]

CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
FOCAL_ALPHA = 0.25


@dataclass(frozen=True)
class Matches:
    """Matched pairs, on the host. Each stage has min(Q, boxes) pairs in an image, so all have the same N."""

    image: Indices
    """(N,)"""
    query: Indices
    """(S, N)"""
    target: Indices
    """(S, N), index of the box in its image."""


@torch.no_grad()
def matching_cost(logits: Tensor, boxes: Tensor, targets: PackedTargets, *, overlap_only: bool) -> Tensor:
    """Return the cost of matching query q to box g.

    Args:
        logits: (S, B, Q, C).        boxes: (S, B, Q, 4), cxcywh.
        overlap_only: the cost after the matcher's change, -p·IoU⁴, instead of 2·focal + 5·L1 - 2·GIoU.
    Returns: (S, B, Q, G), float32, finite; columns of padding mean nothing.
    """
    boxes, target_boxes = boxes.float(), targets.boxes
    stages, _, queries, classes = logits.shape
    labels = targets.labels.clamp(max=classes - 1)[None, :, None].expand(stages, -1, queries, -1)
    p = logits.gather(-1, labels).float().sigmoid()
    corners = cxcywh_to_xyxy(boxes, clamp_size=True)
    target_corners = cxcywh_to_xyxy(target_boxes, clamp_size=True)
    if overlap_only:
        cost = -(p * pairwise_iou(corners, target_corners) ** 4)
    else:
        positive = FOCAL_ALPHA * (1 - p) ** 2 * -(p + 1e-8).log()
        negative = (1 - FOCAL_ALPHA) * p**2 * -(1 - p + 1e-8).log()
        distance = torch.cdist(boxes, target_boxes.expand(stages, -1, -1, -1), p=1.0)
        cost = CLASS_COST * (positive - negative) + L1_COST * distance
        cost -= GIOU_COST * pairwise_giou(corners, target_corners)
    # A diverging network must not crash the solver; its losses show what happened.
    return cost.nan_to_num(nan=1.0)


def match_queries(cost: Tensor, counts: tuple[int, ...]) -> Matches:
    """Solve every image of every stage: each box gets its own query while there are queries left.

    The copy of `cost` to the host is the only synchronisation of the loss. Threads do not help:
    SciPy's solver holds the interpreter's lock (300 × 10 to 300 × 300, ratio 1.0).

    Args:
        cost: (S, B, Q, G).        counts: boxes in each image.
    Raises: MissingExtraError: SciPy is not installed.
    """
    solve = _solver()
    table = cost.cpu().numpy()
    stages, _, queries, _ = table.shape
    pairs = [min(queries, count) for count in counts]
    image = np.repeat(np.arange(len(counts)), pairs)
    query = np.zeros((stages, len(image)), dtype=np.int64)
    target = np.zeros_like(query)
    ends = np.cumsum(pairs)
    for stage in range(stages):
        for index, (count, end, n_pairs) in enumerate(zip(counts, ends, pairs, strict=True)):
            if count:
                columns = slice(end - n_pairs, end)
                query[stage, columns], target[stage, columns] = solve(table[stage, index, :, :count])
    return Matches(image, query, target)


def union_of_matches(matches: Matches, n_queries: int) -> Matches:
    """Return the matches that the box losses of all stages share: every query matched in any stage, once.

    A query that stages matched to different boxes keeps the box that most of them chose; a box may keep
    several queries. D-FINE's "GO" set, without its loop over pairs.

    Returns: one stage of N' pairs, sorted by image and query.
    """
    image = np.broadcast_to(matches.image, matches.query.shape).ravel()
    slot = image * n_queries + matches.query.ravel()
    (slot, target), votes = np.unique(np.stack([slot, matches.target.ravel()]), axis=1, return_counts=True)
    _, starts = np.unique(slot // n_queries, return_index=True)
    pairs_of_images = np.split(np.arange(len(votes)), starts[1:])
    by_votes = np.concatenate([pairs[_by_count(votes[pairs])] for pairs in pairs_of_images])
    slots, first = np.unique(slot[by_votes], return_index=True)
    return Matches(slots // n_queries, slots[None] % n_queries, target[by_votes][None, first])


def _by_count(votes: Indices) -> Indices:
    # Ties keep the order of torch's unstable sort, not always the lower index: the published numbers depend
    # on it.
    return torch.from_numpy(votes).argsort(descending=True).numpy()


def _solver() -> Callable[[NDArray[np.float32]], tuple[Indices, Indices]]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingExtraError("Matching queries to boxes", "scipy", "detect") from error
    return linear_sum_assignment
