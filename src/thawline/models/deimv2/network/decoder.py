"""Decoder: select tokens as queries, refine them layer by layer, predict classes and boxes.

Source: D-FINE (Peng et al., ICLR 2025) and DEIMv2, arXiv 2509.20787. It computes the same numbers as the
authors' code in another way: every token is scored without gradient and only the selected ones again with
gradient; anchors are made for the maps at hand, so any image size works; training outputs are stacked.

Legend: B images, T tokens of all levels, Q queries, N denoising queries, D channels, C classes, L layers.
"""

from __future__ import annotations

__all__ = ["Decoder", "DecoderConfig"]

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thawline.errors import ConfigError
from thawline.models.deimv2.loss.denoising import DenoisingQueries
from thawline.models.deimv2.network.anchors import make_anchors
from thawline.models.deimv2.network.blocks import MLP
from thawline.models.deimv2.network.decoder_layer import (
    POSITION_LIMIT,
    DecoderLayer,
    LocationQuality,
)
from thawline.models.deimv2.outputs import (
    DenoisingOutput,
    DetectionOutput,
    LayerPredictions,
    Predictions,
    TrainingOutput,
)
from thawline.ops.boxes import inverse_sigmoid
from thawline.ops.cache import TensorCache
from thawline.ops.distribution import distance_to_box, expected_distance, weighting_function
from thawline.ops.wide import to_wide

PRIOR = 0.01
"""Score of every class before training."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of the decoder."""

    hidden_dim: int
    num_layers: int
    num_queries: int = 300
    """Maximum number of objects in an image."""
    num_points: tuple[int, ...]
    """Points that a head samples on each level, fine to coarse."""
    ffn_dim: int
    """Width of the feed-forward block before its gate halves it."""
    gateway: bool = True
    """Mix cross attention by a gate; False: plain residual."""
    share_bbox_head: bool = False
    """One box head for all layers."""
    num_heads: int = 8
    eval_layer: int = -1
    """Layer that predicts in eval mode, from the end if negative; later layers are for training only."""
    reg_max: int = 32
    """Number of bins of an edge's distribution, minus one."""
    reg_scale: float = 4.0
    up: float = 0.5
    """Sets the range of the distributions, together with `reg_scale`."""

    def __post_init__(self) -> None:
        if self.hidden_dim % self.num_heads:
            raise ConfigError(f"`num_heads={self.num_heads}` does not divide `hidden_dim={self.hidden_dim}`.")
        if self.num_layers < 1:
            raise ConfigError(f"`num_layers={self.num_layers}`: expected 1 or more.")
        if not -self.num_layers <= self.eval_layer < self.num_layers:
            raise ConfigError(
                f"`eval_layer={self.eval_layer}`: expected one of the {self.num_layers} layers, "
                f"{-self.num_layers} … {self.num_layers - 1}."
            )
        if self.num_queries < 1 or self.reg_max < 4 or self.reg_max % 2:
            raise ConfigError(
                f"`num_queries={self.num_queries}` must be at least 1, and `reg_max={self.reg_max}` even and "
                "at least 4."
            )


class Decoder(nn.Module):
    """Maps to detections."""

    def __init__(self, config: DecoderConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        dim, n_edges = config.hidden_dim, 4 * (config.reg_max + 1)
        self.decoder = LayerStack(config)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes)
        self.enc_score_head = nn.Linear(dim, num_classes)
        self.enc_bbox_head = MLP(dim, dim, 4, 3)
        self.query_pos_head = MLP(4, dim, dim, 3)
        self.pre_bbox_head = MLP(dim, dim, 4, 3)
        score_head, bbox_head = nn.Linear(dim, num_classes), MLP(dim, dim, n_edges, 3)
        _init_score_heads(self.enc_score_head, score_head)
        _init_box_heads(self.enc_bbox_head, self.pre_bbox_head, bbox_head)
        for layer in self.query_pos_head.layers:
            nn.init.xavier_uniform_(layer.weight)

        layers = range(config.num_layers)
        self.dec_score_head = nn.ModuleList(deepcopy(score_head) for _ in layers)
        self.dec_bbox_head = nn.ModuleList(
            bbox_head if config.share_bbox_head else deepcopy(bbox_head) for _ in layers
        )
        self._anchors = TensorCache()

    def forward(
        self, maps: Sequence[Tensor], denoising: DenoisingQueries | None = None, *, for_training: bool = False
    ) -> DetectionOutput:
        """Detect.

        Args:
            maps: (B, D, H_l, W_l) per level, fine to coarse.
            denoising: queries prepended to the selected ones. Only with `for_training`.
            for_training: return the predictions of every layer, not only of `eval_layer`.
        """
        content, reference_logits, encoder = self._select_queries(maps)
        if not for_training:
            refined = self._refine(content, reference_logits, maps)
            return DetectionOutput(logits=refined.logits[-1], pred_boxes=refined.boxes[-1])

        n_denoising, blocked = 0, None
        if denoising is not None:
            n_denoising, blocked = denoising.n_queries, denoising.blocked
            content = torch.cat([self.denoising_class_embed(denoising.labels), content], dim=1)
            noised = denoising.reference_logits.to(reference_logits.dtype)
            reference_logits = torch.cat([noised, reference_logits], dim=1)
        refined = self._refine(content, reference_logits, maps, blocked, every_layer=True)
        training = TrainingOutput(
            layers=refined.layers(slice(n_denoising, None)),
            pre=refined.pre(slice(n_denoising, None)),
            encoder=encoder,
            reference_boxes=refined.base[:, n_denoising:].detach(),
            up=self.decoder.up,
            reg_scale=self.decoder.reg_scale,
        )
        if denoising is not None:
            training.denoising = DenoisingOutput(
                layers=refined.layers(slice(n_denoising)),
                pre=refined.pre(slice(n_denoising)),
                reference_boxes=refined.base[:, :n_denoising].detach(),
                queries=denoising,
            )
        answer = self.config.eval_layer
        return DetectionOutput(
            logits=training.layers.logits[answer], pred_boxes=training.layers.boxes[answer], training=training
        )

    def _select_queries(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Predictions]:
        """Return content, reference (both detached) and predictions of the highest-scoring tokens.

        A token without a valid anchor is replaced by zeros, so its score is the bias of the head.
        """
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        sizes = tuple((level.shape[-2], level.shape[-1]) for level in maps)
        anchors, valid = self._anchors.get(
            (sizes, memory.dtype, memory.device), lambda: make_anchors(sizes, memory.dtype, memory.device)
        )
        with torch.no_grad():
            scores = self.enc_score_head(memory * valid).amax(dim=-1)
            chosen = scores.topk(min(self.config.num_queries, scores.shape[1]), dim=1).indices
        picked = chosen[..., None].expand(-1, -1, memory.shape[-1])
        content = memory.gather(1, picked) * valid[chosen]
        reference_logits = to_wide(self.enc_bbox_head(content)) + anchors[chosen]
        encoder = Predictions(logits=to_wide(self.enc_score_head(content)), boxes=reference_logits.sigmoid())
        return content.detach(), reference_logits.detach(), encoder

    def _refine(
        self,
        x: Tensor,
        reference_logits: Tensor,
        maps: Sequence[Tensor],
        blocked: Tensor | None = None,
        *,
        every_layer: bool = False,
    ) -> _Refined:
        """Run the layers; each moves the edges of the first layer's boxes a little further."""
        stack = self.decoder
        reference = reference_logits.sigmoid()
        position = self.query_pos_head(reference.to(x.dtype)).clamp(-POSITION_LIMIT, POSITION_LIMIT)
        last = self.config.num_layers - 1 if every_layer else self.config.eval_layer % self.config.num_layers
        bins = stack.bins().to(reference.dtype)
        refined = _Refined()
        for index in range(last + 1):
            before, x = x, stack.layers[index](x, position, reference, maps, blocked)
            edges = self.dec_bbox_head[index](x if index == 0 else x + before.detach())
            if index == 0:
                refined.base = (to_wide(self.pre_bbox_head(x)) + inverse_sigmoid(reference)).sigmoid()
                corner_logits = to_wide(edges)
                if every_layer:
                    refined.pre_logits = to_wide(self.dec_score_head[0](x))
            else:
                corner_logits = corner_logits + edges
            # Not under autocast: a box in 8 bits of mantissa is off by pixels.
            with torch.autocast(x.device.type, enabled=False):
                distance = expected_distance(corner_logits, bins)
                boxes = distance_to_box(refined.base.detach(), distance, stack.reg_scale.to(distance.dtype))
            if every_layer or index == last:
                quality = stack.lqe_layers[index](corner_logits)
                refined.logits.append(to_wide(self.dec_score_head[index](x) + quality))
                refined.corner_logits.append(corner_logits)
                refined.boxes.append(boxes)
            reference = boxes.detach()
        return refined

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept the authors' layout, which also contains tables for one image size and two tensors twice."""
        for name in ("anchors", "valid_mask"):
            state_dict.pop(f"{prefix}{name}", None)
        for name in ("up", "reg_scale"):
            twin = state_dict.pop(f"{prefix}{name}", None)
            if twin is not None:
                state_dict.setdefault(f"{prefix}decoder.{name}", twin)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LayerStack(nn.Module):
    """Decoder layers and their location-quality heads."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        layer = DecoderLayer(
            config.hidden_dim, config.num_heads, config.ffn_dim, config.num_points, gateway=config.gateway
        )
        quality = LocationQuality()
        self.layers = nn.ModuleList(deepcopy(layer) for _ in range(config.num_layers))
        self.lqe_layers = nn.ModuleList(deepcopy(quality) for _ in range(config.num_layers))
        # Constants of the trained distributions, stored with the weights.
        self.up = nn.Parameter(torch.tensor([config.up]), requires_grad=False)
        self.reg_scale = nn.Parameter(torch.tensor([config.reg_scale]), requires_grad=False)
        self.reg_max = config.reg_max

    def bins(self) -> Tensor:
        """Return the distances of an edge's bins, (R + 1,)."""
        return weighting_function(self.reg_max, to_wide(self.up), self.reg_scale)


class _Refined:
    """Predictions of the layers, for denoising and selected queries together."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.boxes: list[Tensor] = []
        self.corner_logits: list[Tensor] = []
        self.pre_logits: Tensor
        self.base: Tensor

    def layers(self, queries: slice) -> LayerPredictions:
        logits, boxes, corner_logits = (
            torch.stack(kind)[:, :, queries] for kind in (self.logits, self.boxes, self.corner_logits)
        )
        return LayerPredictions(logits=logits, boxes=boxes, corner_logits=corner_logits)

    def pre(self, queries: slice) -> Predictions:
        return Predictions(logits=self.pre_logits[:, queries], boxes=self.base[:, queries])


def _init_score_heads(*heads: nn.Linear) -> None:
    for head in heads:
        nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))


def _init_box_heads(*heads: MLP) -> None:
    """Initialise box heads so that they first return their reference box."""
    for head in heads:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
