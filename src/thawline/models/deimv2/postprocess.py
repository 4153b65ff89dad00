"""Postprocessing: from logits and boxes to the highest scores over queries and classes, boxes in pixels.

Like the authors' code: no non-maximum suppression, no threshold, no clipping. One difference: with fewer than
`max_detections` scores (few classes, small models) all of them are returned.
"""

from __future__ import annotations

__all__ = ["Detected", "postprocess"]

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from thawline.errors import ConfigError
from thawline.ops.boxes import cxcywh_to_xyxy

MAX_DETECTIONS = 300


class Detected(TypedDict):
    """Detections of one image, highest score first."""

    scores: Tensor
    """(K,), in [0, 1]."""
    labels: Tensor
    """(K,), int64."""
    boxes: Tensor
    """(K, 4), xyxy in pixels."""


def postprocess(
    logits: Tensor,
    boxes: Tensor,
    sizes: Sequence[tuple[int, int]] | Tensor,
    max_detections: int = MAX_DETECTIONS,
) -> list[Detected]:
    """Pick each image's best (query, class) pairs; a query may appear with several classes.

    Args:
        logits: (B, Q, C).        boxes: (B, Q, 4), cxcywh in 0–1.
        sizes: (height, width) of each original image, B pairs.
        max_detections: K, at most Q·C of them exist.
    Raises: ConfigError: sizes are not one pair per image.
    """
    batch, queries, classes = logits.shape
    scale = torch.as_tensor(sizes, dtype=boxes.dtype)
    if scale.shape != (batch, 2):
        raise ConfigError(
            f"`sizes` must hold one (height, width) for each of {batch} images, got {tuple(scale.shape)}."
        )
    scale = scale.to(boxes.device, non_blocking=True).flip(-1).repeat(1, 2)
    n_detections = min(max_detections, queries * classes)
    scores, index = logits.flatten(1).topk(n_detections, dim=1)
    labels, query = index % classes, index // classes
    corners = cxcywh_to_xyxy(boxes) * scale[:, None]
    corners = corners.gather(1, query[..., None].expand(-1, -1, 4))
    return [
        Detected(scores=s, labels=label, boxes=b)
        for s, label, b in zip(scores.sigmoid(), labels, corners, strict=True)
    ]
