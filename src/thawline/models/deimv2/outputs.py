"""Outputs of the network: detections, and the predictions of all stages that the losses read.

Stages of one kind are stacked in one tensor, so that matching and losses handle all of them at once.
In the authors' names: `layers[:-1]` is `aux_outputs`, `pre` is `pre_outputs`, `encoder` is
`enc_aux_outputs[0]`, `denoising.layers` is `dn_outputs`, `denoising.pre` is `dn_pre_outputs`, and
`reference_boxes` is `ref_points`.

Legend: L decoder layers, B images, Q queries, N denoising queries, C classes, R + 1 bins of an edge.
"""

from __future__ import annotations

__all__ = ["DenoisingOutput", "DetectionOutput", "LayerPredictions", "Predictions", "TrainingOutput"]

from dataclasses import dataclass

from torch import Tensor

from thawline.models.deimv2.loss.denoising import DenoisingQueries


@dataclass(kw_only=True)
class Predictions:
    """Classes and boxes of one stage."""

    logits: Tensor
    """(B, Q, C), float32 or wider."""
    boxes: Tensor
    """(B, Q, 4), cxcywh in 0–1 of the image, not clipped."""


@dataclass(kw_only=True)
class LayerPredictions:
    """Classes, boxes and edge distributions of all decoder layers."""

    logits: Tensor
    """(L, B, Q, C)."""
    boxes: Tensor
    """(L, B, Q, 4), cxcywh."""
    corner_logits: Tensor
    """(L, B, Q, 4·(R+1)), edges left, top, right, bottom."""


@dataclass(kw_only=True)
class DenoisingOutput:
    """Predictions for denoising queries, with N in place of Q."""

    layers: LayerPredictions
    pre: Predictions
    reference_boxes: Tensor
    """(B, N, 4), cxcywh, detached."""
    queries: DenoisingQueries
    """The queries: groups, labels, noised boxes."""


@dataclass(kw_only=True)
class TrainingOutput:
    """Predictions of all stages."""

    layers: LayerPredictions
    pre: Predictions
    """Predictions of the first layer's plain box head."""
    encoder: Predictions
    """Predictions of the encoder's heads for the selected tokens."""
    reference_boxes: Tensor
    """(B, Q, 4), cxcywh, detached: the boxes that every layer's distributions refine."""
    up: Tensor
    """(1,), determines with `reg_scale` the range of the distributions."""
    reg_scale: Tensor
    """(1,)"""
    denoising: DenoisingOutput | None = None
    """None if denoising is off (`num_denoising=0`, or no targets given)."""


@dataclass(kw_only=True)
class DetectionOutput:
    """Output of `DEIMv2.forward`."""

    logits: Tensor
    """(B, Q, C), before the sigmoid."""
    pred_boxes: Tensor
    """(B, Q, 4), cxcywh in 0–1 of the image, not clipped."""
    training: TrainingOutput | None = None
    """In train mode, and in eval mode when targets are given; else None."""
