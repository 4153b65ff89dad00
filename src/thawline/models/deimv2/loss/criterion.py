"""Training loss: every term of every stage, weighted, under the authors' names.

The stages of the network come stacked, so each formula runs once for all of them. The only synchronisation
with the device is the matcher's copy of its costs to the host.

Which stage gets what (suffix in brackets): the final layer (none) class, bbox, giou, fgl; earlier layers
(`_aux_i`) also ddf; the first layer's plain head (`_pre`) and the encoder (`_enc_0`) class, bbox, giou.
Denoising layers (`_dn_i`) and their plain head (`_dn_pre`) likewise. The names depend on the model alone,
never on the batch: a batch without boxes gives the same names, finite.

Differences from the authors' code: denoising terms of a batch without boxes are zero instead of missing, ddf
is zero instead of missing where a layer equals its teacher, and NaN losses stay NaN.

Legend: S stages, L layers, B images, Q queries, N matched pairs.
"""

from __future__ import annotations

__all__ = ["Criterion"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, distributed

from thawline.errors import ConfigError
from thawline.models.deimv2.config import CriterionConfig, DEIMv2Config
from thawline.models.deimv2.loss.denoising import denoising_matches
from thawline.models.deimv2.loss.losses import CLASS_LOSSES, box_losses, ddf_balance, ddf_loss, fgl_loss
from thawline.models.deimv2.loss.matcher import Matches, match_queries, matching_cost, union_of_matches
from thawline.models.deimv2.loss.targets import PackedTargets, Target, pack_targets
from thawline.models.deimv2.outputs import (
    DenoisingOutput,
    DetectionOutput,
    LayerPredictions,
    Predictions,
    TrainingOutput,
)
from thawline.ops.boxes import box_iou, cxcywh_to_xyxy
from thawline.ops.distribution import box_to_distance, distance_to_bins, weighting_function

Count: TypeAlias = "float | Tensor"


class Criterion:
    """Training loss of DEIMv2.

    Args:
        config: a model's config; only its `criterion` part is read.
    """

    def __init__(self, config: DEIMv2Config) -> None:
        self.config: CriterionConfig = config.criterion

    def __call__(
        self, output: DetectionOutput, targets: Sequence[Target], *, epoch: int = 0
    ) -> dict[str, Tensor]:
        """Return the weighted loss terms; their sum is the loss.

        Boxes are counted over all processes where `torch.distributed` runs, so that the mean of the
        processes' losses is the loss of the whole batch.

        Args:
            output: of the network, given these targets.
            targets: labels and boxes of each image.
            epoch: from 0; decides which cost the matcher uses.
        Returns: scalars in float32 (float64 for a float64 network).
        Raises: ConfigError: the output has no training part. DataError: misshapen targets.
        """
        training = output.training
        if training is None:
            raise ConfigError(
                "The output holds detections only. Compute it with `model(pixel_values, targets)`."
            )
        packed = pack_targets(targets, output.logits.shape[-1], output.logits.device)
        overlap_only = epoch >= self.config.matcher_change_epoch
        with torch.autocast(output.logits.device.type, enabled=False):
            terms, n_boxes, balance = self._matched_terms(training, packed, overlap_only=overlap_only)
            if training.denoising is not None:
                terms |= self._denoising_terms(training, training.denoising, packed, n_boxes, balance)
        return terms

    def match(self, cost: Tensor, counts: tuple[int, ...]) -> tuple[Matches, Matches]:
        """Return the matches of each stage, and those that the box losses of all stages share.

        Args:
            cost: (S, B, Q, G).        counts: boxes in each image.
        """
        own = match_queries(cost, counts)
        return own, union_of_matches(own, cost.shape[2]) if self.config.union_set else own

    def _matched_terms(
        self, training: TrainingOutput, targets: PackedTargets, *, overlap_only: bool
    ) -> tuple[dict[str, Tensor], Count, tuple[float, float]]:
        """Return the terms of the matched stages, the count of boxes, and the balance of ddf."""
        stages = _stack(training, training.layers, training.reference_boxes, training.pre, training.encoder)
        _, batch_size, n_queries, _ = stages.logits.shape
        cost = matching_cost(stages.logits, stages.boxes, targets, overlap_only=overlap_only)
        own, shared = self.match(cost, targets.counts)
        n_shared = len(shared.image)
        n_boxes, n_union = _mean_over_processes([targets.n_boxes, n_shared], stages.logits.device)
        balance = ddf_balance(n_shared, batch_size * n_queries - n_shared, batch_size)

        losses = self._losses(
            stages,
            _pairs(own, targets, stages.boxes, n_boxes),
            _pairs(shared, targets, stages.boxes, n_union if self.config.union_set else n_boxes),
            balance,
        )
        last = stages.n_layers - 1
        names = {last: ""} | {layer: f"_aux_{layer}" for layer in range(last)}
        return _name(losses, names | {last + 1: "_pre", last + 2: "_enc_0"}), n_boxes, balance

    def _denoising_terms(
        self,
        training: TrainingOutput,
        denoising: DenoisingOutput,
        targets: PackedTargets,
        n_boxes: Count,
        balance: tuple[float, float],
    ) -> dict[str, Tensor]:
        """Return the terms of the denoising queries; ddf reuses the balance of the matched ones."""
        stages = _stack(training, denoising.layers, denoising.reference_boxes, denoising.pre)
        n_groups = denoising.queries.n_groups
        matches = denoising_matches(targets.counts, targets.labels.shape[1], n_groups)
        pairs = _pairs(matches, targets, stages.boxes, n_boxes * n_groups)
        losses = self._losses(stages, pairs, pairs, balance)
        if not targets.n_boxes:
            # Padding has no loss, but stays in the graph: other processes may have boxes.
            losses = {kind: loss * 0 for kind, loss in losses.items()}
        names = {layer: f"_dn_{layer}" for layer in range(stages.n_layers)}
        return _name(losses, names | {stages.n_layers: "_dn_pre"})

    def _losses(
        self, stages: _Stages, own: _Pairs, shared: _Pairs, balance: tuple[float, float]
    ) -> dict[str, Tensor]:
        """Return each kind of term for the stages that have it: (S,), (L,) for fgl, (L - 1,) for ddf."""
        config, n_stages, n_layers = self.config, len(stages.logits), stages.n_layers
        class_loss = CLASS_LOSSES[config.class_loss]
        where = own.where(n_stages)
        quality = _overlap(stages.boxes[where], own.boxes)
        classes = class_loss(stages.logits, (*where, own.labels), quality, config.gamma)

        boxes = stages.boxes[shared.where(n_stages)]
        bbox, giou = box_losses(boxes, shared.boxes)
        losses = {
            config.class_loss: config.class_weight * classes / own.count,
            "bbox": config.bbox_weight * bbox / shared.count,
            "giou": config.giou_weight * giou / shared.count,
        }
        if config.local:
            iou = _overlap(boxes, shared.boxes)[:n_layers]
            where = shared.where(n_layers)
            left, share = _bins_of_targets(stages, shared)
            fgl = fgl_loss(stages.corner_logits[where], left, share, iou)
            students, teacher = stages.corner_logits[:-1], stages.corner_logits[-1]
            confidence = stages.logits[n_layers - 1].detach().sigmoid().amax(dim=-1)
            ddf = ddf_loss(students, teacher, confidence, shared.where(n_layers - 1), iou[:-1], balance)
            losses |= {"fgl": config.fgl_weight * fgl / shared.count, "ddf": config.ddf_weight * ddf}
        return losses


@dataclass
class _Stages:
    """Stages that share queries, decoder layers first."""

    logits: Tensor
    """(S, B, Q, C)"""
    boxes: Tensor
    """(S, B, Q, 4), cxcywh."""
    corner_logits: Tensor
    """(L, B, Q, 4·(R+1))"""
    reference_boxes: Tensor
    """(B, Q, 4), cxcywh."""
    bins: Tensor
    """W, (R+1,)"""
    reg_scale: Tensor

    @property
    def n_layers(self) -> int:
        """L."""
        return self.corner_logits.shape[0]


@dataclass
class _Pairs:
    """Matched pairs on the device; 1 stands for S where all stages share them."""

    image: Tensor
    """(N,)"""
    query: Tensor
    """(S or 1, N)"""
    labels: Tensor
    """(S or 1, N), of the matched boxes."""
    boxes: Tensor
    """(S or 1, N, 4), cxcywh."""
    count: Count
    """Divisor of sums over pairs."""

    def where(self, n_stages: int) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the pairs' queries in the first stages of (S, B, Q, ...)."""
        stage = torch.arange(n_stages, device=self.query.device)[:, None]
        return stage, self.image, self.query[:n_stages]


def _stack(
    training: TrainingOutput, layers: LayerPredictions, reference_boxes: Tensor, *plain: Predictions
) -> _Stages:
    n_bins = layers.corner_logits.shape[-1] // 4
    bins = weighting_function(n_bins - 1, training.up, training.reg_scale)
    return _Stages(
        torch.cat([layers.logits, torch.stack([stage.logits for stage in plain])]),
        torch.cat([layers.boxes, torch.stack([stage.boxes for stage in plain])]),
        layers.corner_logits,
        reference_boxes,
        bins.to(layers.boxes.dtype),
        training.reg_scale,
    )


def _pairs(matches: Matches, targets: PackedTargets, like: Tensor, count: Count) -> _Pairs:
    """Copy pairs to the device of `like` in one asynchronous transfer."""
    table = torch.from_numpy(np.concatenate([matches.image[None], matches.query, matches.target]))
    if like.is_cuda:
        table = table.pin_memory().to(like.device, non_blocking=True)
    image, query, target = table.split([1, len(matches.query), len(matches.target)])
    image = image[0]
    return _Pairs(
        image, query, targets.labels[image, target], targets.boxes[image, target].to(like.dtype), count
    )


def _bins_of_targets(stages: _Stages, pairs: _Pairs) -> tuple[Tensor, Tensor]:
    """Return the left bin of each matched edge and the share of the right bin: two of (L, N, 4)."""
    references = stages.reference_boxes[pairs.image, pairs.query[: stages.n_layers]]
    corners = cxcywh_to_xyxy(pairs.boxes[: stages.n_layers], clamp_size=True)
    left, share = distance_to_bins(box_to_distance(references, corners, stages.reg_scale), stages.bins)
    return left.expand(stages.n_layers, -1, -1), share.expand(stages.n_layers, -1, -1)


def _overlap(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return the IoU of cxcywh boxes without gradient, for use as a weight."""
    boxes = cxcywh_to_xyxy(boxes.detach(), clamp_size=True)
    return box_iou(boxes, cxcywh_to_xyxy(targets, clamp_size=True))


def _mean_over_processes(counts: list[int], device: torch.device) -> list[Count]:
    """Return each count's mean over the processes, at least 1."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [float(max(1, count)) for count in counts]
    total = torch.tensor(counts, dtype=torch.float32)
    if device.type == "cuda":
        total = total.pin_memory().to(device, non_blocking=True)
    distributed.all_reduce(total)
    return list((total / distributed.get_world_size()).clamp(min=1).unbind())


def _name(losses: dict[str, Tensor], suffixes: dict[int, str]) -> dict[str, Tensor]:
    """Return one entry per stage and kind, stages in the order of `suffixes`."""
    scalars = {kind: loss.unbind() for kind, loss in losses.items()}
    return {
        f"loss_{kind}{suffix}": values[stage]
        for stage, suffix in suffixes.items()
        for kind, values in scalars.items()
        if stage < len(values)
    }
