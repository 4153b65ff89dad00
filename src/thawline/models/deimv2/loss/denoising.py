"""Denoising queries: noised boxes of the batch that training prepends to the selected queries.

A group contains every box of an image twice, G positives then G negatives. Positives stay near their box and
must recover it; negatives move further away and must be classified as background. Groups repeat to about
`num_denoising` positives, and no query sees a denoising query outside its own group.

Source: Zhang et al., DINO (ICLR 2023), with the constants that DEIMv2's code actually uses. One difference: a
batch without boxes still makes one group of padding, so the graph is the same in every step on every rank.

Legend: B images, G boxes of the fullest image, N denoising queries, Q other queries.
"""

from __future__ import annotations

__all__ = ["DenoisingQueries", "build_denoising_queries", "denoising_matches"]

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thawline.models.deimv2.loss.matcher import Matches
from thawline.models.deimv2.loss.targets import PackedTargets
from thawline.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh


@dataclass(frozen=True)
class DenoisingQueries:
    """Queries that the decoder prepends to the selected ones."""

    labels: Tensor
    """(B, N), int64: rows of the label embedding, `num_classes` (a zero row) where padded."""
    reference_logits: Tensor
    """(B, N, 4): inverse sigmoid of cxcywh."""
    blocked: Tensor
    """(N + Q, N + Q), bool: True where the query of that row may not see that column's."""
    n_groups: int

    @property
    def n_queries(self) -> int:
        """N."""
        return self.labels.shape[1]


def build_denoising_queries(
    targets: PackedTargets,
    *,
    num_classes: int,
    num_queries: int,
    num_denoising: int,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
) -> DenoisingQueries:
    """Build denoising queries on the device of the targets, without synchronising with it.

    Args:
        targets: the batch.
        num_classes: C; also the label of padding.
        num_queries: Q, for the mask.
        num_denoising: positives per image to aim at; there is always at least one group.
        label_noise: half of this share of the labels is replaced by a random class. 0: none.
        box_noise: how far an edge moves: positives up to this times half the size, negatives once to twice
            that. 0: boxes stay, negatives too.
    Returns: N = 2·G·max(1, num_denoising // G) queries an image.
    """
    n_boxes = targets.labels.shape[1]
    n_groups = max(1, num_denoising // n_boxes) if targets.n_boxes else 1
    labels = targets.labels.repeat(1, 2 * n_groups)
    boxes = targets.boxes.repeat(1, 2 * n_groups, 1)

    real = labels < num_classes
    changed = (torch.rand_like(boxes[..., 0]) < 0.5 * label_noise) & real
    labels = torch.where(changed, torch.randint_like(labels, num_classes), labels)

    n_queries = labels.shape[1]
    place = torch.arange(n_queries, device=labels.device)
    negative = (place % (2 * n_boxes) >= n_boxes).to(boxes.dtype)[None, :, None]
    half_size = boxes[..., 2:].repeat(1, 1, 2) * 0.5
    sign = torch.randint_like(boxes, 2) * 2 - 1
    moved = cxcywh_to_xyxy(boxes) + sign * (torch.rand_like(boxes) + negative) * half_size * box_noise
    # Edges may have crossed: a size is read without its sign, as the authors do.
    noised = xyxy_to_cxcywh(moved.clamp(0, 1)).abs()

    group = torch.cat([place // (2 * n_boxes), place.new_full((num_queries,), -1)])
    blocked = (group[None, :] != group[:, None]) & (group[None, :] >= 0)
    return DenoisingQueries(labels, inverse_sigmoid(noised), blocked, n_groups)


def denoising_matches(counts: tuple[int, ...], n_boxes: int, n_groups: int) -> Matches:
    """Match positive k of every group to box k: one stage of n_groups · (all boxes) pairs.

    Args:
        counts: boxes in each image.        n_boxes: G.        n_groups: as built.
    """
    image = np.repeat(np.arange(len(counts)), [count * n_groups for count in counts])
    target = np.concatenate([np.tile(np.arange(count), n_groups) for count in counts] or [np.zeros(0, int)])
    group = np.concatenate([np.repeat(np.arange(n_groups), count) for count in counts] or [np.zeros(0, int)])
    query = group * 2 * n_boxes + target
    return Matches(image, query[None], target[None])
