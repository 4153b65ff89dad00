"""Inference forms of the decoder and its attention.

They equal the network's own up to rounding. Layers after the evaluated one and heads that only training reads
are removed; offsets and weights of the cross attention come from one linear that contains every constant
factor; the distribution's bins and the step from distances to a box are one matrix; sampling is
`deformable_gather`.

Legend: B images, T tokens of all levels, Q queries, D channels, C classes, R + 1 bins of an edge.
"""

from __future__ import annotations

__all__ = ["FusedDecoder", "FusedDeformableAttention", "FusedSelfAttention"]

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.models.deimv2.fused.conv import linear_of
from thawline.models.deimv2.network.anchors import make_anchors
from thawline.models.deimv2.network.blocks import SelfAttention
from thawline.models.deimv2.network.decoder import Decoder
from thawline.models.deimv2.network.decoder_layer import (
    OFFSET_SCALE,
    POSITION_LIMIT,
    DeformableAttention,
)
from thawline.models.deimv2.outputs import DetectionOutput
from thawline.ops.boxes import inverse_sigmoid
from thawline.ops.cache import TensorCache
from thawline.ops.deformable import SamplingPlan, deformable_gather, deformable_sample, plan_sampling
from thawline.ops.wide import WideBuffers, to_wide


class Memory(NamedTuple):
    """Encoder output in the two forms that sampling reads."""

    tokens: Tensor
    """(B, T, D)"""
    maps: Sequence[Tensor]
    """(B, D, H_l, W_l), fine to coarse."""
    plan: SamplingPlan | None
    """None: sample the maps."""


class FusedDecoder(WideBuffers):
    """Decoder that computes the detections of the evaluated layer only."""

    edges: Tensor

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        config = decoder.config
        last = config.eval_layer % config.num_layers
        self.num_queries, self.num_heads = config.num_queries, config.num_heads
        self.num_points = config.num_points
        self.enc_score_head, self.enc_bbox_head = decoder.enc_score_head, decoder.enc_bbox_head
        self.query_pos_head, self.pre_bbox_head = decoder.query_pos_head, decoder.pre_bbox_head
        self.layers = decoder.decoder.layers[: last + 1]
        self.bbox_heads = decoder.dec_bbox_head[: last + 1]
        self.score_head, self.quality = decoder.dec_score_head[last], decoder.decoder.lqe_layers[last]
        bins = decoder.decoder.bins()
        self.register_buffer("edges", _edges_to_box(bins, decoder.decoder.reg_scale))
        self._constants = TensorCache()

    def forward(self, maps: Sequence[Tensor]) -> DetectionOutput:
        """Maps (B, D, H_l, W_l), fine to coarse, to detections."""
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        sizes = tuple((level.shape[-2], level.shape[-1]) for level in maps)
        x, reference = self._select_queries(tokens, sizes)
        position = self.query_pos_head(reference.to(x.dtype)).clamp_(-POSITION_LIMIT, POSITION_LIMIT)
        memory = Memory(tokens, maps, self._plan(tokens, sizes, x.shape[1]))
        for index, (layer, bbox_head) in enumerate(zip(self.layers, self.bbox_heads, strict=True)):
            before, x = x, layer(x, position, reference, memory)
            if index == 0:
                base = (to_wide(self.pre_bbox_head(x)) + inverse_sigmoid(reference)).sigmoid()
                extent = base[..., 2:].repeat(1, 1, 2)
                corner_logits = to_wide(bbox_head(x))
            else:
                corner_logits = corner_logits + bbox_head(x + before)
            likely = corner_logits.unflatten(-1, (4, -1)).softmax(dim=-1).flatten(2)
            with torch.autocast(x.device.type, enabled=False):
                reference = torch.addcmul(base, likely @ self.edges.to(likely.dtype), extent)
        logits = to_wide(self.score_head(x) + self.quality(corner_logits))
        return DetectionOutput(logits=logits, pred_boxes=reference)

    def _select_queries(self, memory: Tensor, sizes: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
        """Return content and reference boxes of the tokens with the highest class scores."""
        anchors, valid = self._constants.get(
            (sizes, memory.dtype, memory.device), lambda: make_anchors(sizes, memory.dtype, memory.device)
        )
        # A token without a valid anchor is scored as zeros, which gives the bias.
        floor = self.enc_score_head.bias.amax()
        scores = torch.where(valid[:, 0] > 0, self.enc_score_head(memory).amax(dim=-1), floor)
        chosen = self.choose(scores)
        picked = chosen[..., None].expand(-1, -1, memory.shape[-1])
        content = memory.gather(1, picked) * valid[chosen]
        return content, (to_wide(self.enc_bbox_head(content)) + anchors[chosen]).sigmoid()

    def choose(self, scores: Tensor) -> Tensor:
        """Return the tokens with the highest scores, (B, T) to (B, Q)."""
        return scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices

    def _plan(
        self, memory: Tensor, sizes: tuple[tuple[int, int], ...], n_queries: int
    ) -> SamplingPlan | None:
        """Return the plan for gathering; None in an exporter and for maps of one row or column."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or min(map(min, sizes)) < 2:
            return None
        n_images = memory.shape[0]
        return self._constants.get(
            (sizes, n_images, n_queries, memory.device),
            lambda: plan_sampling(sizes, self.num_points, self.num_heads, n_images, n_queries, memory.device),
        )


class FusedSelfAttention(nn.Module):
    """Self-attention with one linear for queries and keys and one for values."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        dim = attention.out_proj.in_features
        self.num_heads = attention.num_heads
        self.query_key = linear_of(attention.in_proj_weight[: 2 * dim], attention.in_proj_bias[: 2 * dim])
        self.value = linear_of(attention.in_proj_weight[2 * dim :], attention.in_proj_bias[2 * dim :])
        self.out_proj = attention.out_proj

    def forward(self, x: Tensor, position: Tensor, blocked: None = None) -> Tensor:
        """(B, Q, D) to the same."""
        query_key = self.query_key(x + position).unflatten(-1, (2, self.num_heads, -1))
        query, key = query_key.permute(2, 0, 3, 1, 4).unbind(0)
        value = self.value(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class FusedDeformableAttention(nn.Module):
    """Cross attention with one linear for offsets and weights."""

    def __init__(self, attention: DeformableAttention) -> None:
        super().__init__()
        self.num_heads, self.num_points = attention.num_heads, attention.num_points
        scale = attention.num_points_scale.repeat_interleave(2).repeat(self.num_heads)
        offsets, weights = attention.sampling_offsets, attention.attention_weights
        scale = scale.to(offsets.weight.dtype)
        self.points = linear_of(
            torch.cat([offsets.weight * scale[:, None], weights.weight]),
            torch.cat([offsets.bias * scale, weights.bias]),
        )

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """(B, Q, D) at boxes (B, Q, 4) to (B, Q, D)."""
        n = self.num_heads * sum(self.num_points)
        offsets, weights = self.points(query).split([2 * n, n], dim=-1)
        offsets = offsets.unflatten(-1, (self.num_heads, -1, 2)).to(reference.dtype)
        weights = _softmax(weights.unflatten(-1, (self.num_heads, -1)))
        if memory.plan is not None:
            return deformable_gather(memory.tokens, reference, offsets, weights, memory.plan)
        centre, size = reference[:, :, None, None, :2], reference[:, :, None, None, 2:]
        locations = torch.addcmul(centre, offsets, size, value=OFFSET_SCALE)
        return deformable_sample(memory.maps, locations, weights, self.num_points).to(query.dtype)


def _softmax(x: Tensor) -> Tensor:
    """Softmax over a last axis of few values, four times as fast on a CPU as torch's own."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.softmax(dim=-1)
    shares = (x - x.amax(dim=-1, keepdim=True)).exp_()
    return shares.div_(shares.sum(dim=-1, keepdim=True))


def _edges_to_box(bins: Tensor, reg_scale: Tensor) -> Tensor:
    """Return the matrix from the probabilities of the edges' bins to shift and growth in box sizes.

    Left and right edges (top and bottom likewise) that lie d_l and d_r beyond half a size move the centre by
    (d_r - d_l) / 2s and widen the box by (d_l + d_r) / s.
    """
    unit = bins / reg_scale.abs().to(bins.dtype)
    edges = bins.new_zeros(4, len(bins), 4)
    for axis in range(2):
        edges[axis, :, axis], edges[axis + 2, :, axis] = -unit / 2, unit / 2
        edges[axis, :, axis + 2] = edges[axis + 2, :, axis + 2] = unit
    return edges.flatten(0, 1)
