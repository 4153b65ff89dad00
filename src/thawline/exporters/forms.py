"""The detector as a graph: pixels in 0–1 to the best detections, with plain operations only.

`fuse()` makes the network fast in eager torch. A file for another runtime wants other things: no operation
that reads the batch size (an exporter may store it as a number), no writing into slices, no transposition
that the next operation undoes. These forms replace the fused ones where both differ; all folding is shared.

Legend: B images, T tokens of all levels, Q queries, D channels, H heads, P points, C transformer channels.
"""

from __future__ import annotations

__all__ = ["DetectionGraph", "Sampling", "build_graph"]

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.models.deimv2.fused.conv import linear_of
from thawline.models.deimv2.fused.decoder import FusedDecoder, FusedDeformableAttention, FusedSelfAttention
from thawline.models.deimv2.fused.forms import FORMS, fuse
from thawline.models.deimv2.fused.hgnetv2 import FusedStem
from thawline.models.deimv2.fused.vit import FusedVisionTransformer, FusedViTBlock
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.network import blocks, decoder, decoder_layer, hgnetv2, vit
from thawline.models.deimv2.network.anchors import make_anchors
from thawline.models.deimv2.network.decoder_layer import OFFSET_SCALE, POSITION_LIMIT
from thawline.models.deimv2.outputs import DetectionOutput
from thawline.ops.rotary import Table, rotate

Sampling = Literal["grid_sample", "gather"]

LOGIT_LIMIT = math.log(1e5)
"""Largest logit of a reference box: `inverse_sigmoid` keeps coordinates 1e-5 away from 0 and 1."""
FAR = 1e4
"""Anchor logit instead of infinity: its sigmoid is 1 too, and no runtime turns it into NaN."""


class DetectionGraph(nn.Module):
    """Normalisation, network and post-processing in one, with the signature of the authors' export.

    Args:
        model: a detector, not fused. It is copied.
        sampling: how deformable attention reads the maps.
        single_input: without `orig_target_sizes`; boxes are in 0–1.
    """

    def __init__(self, model: DEIMv2, sampling: Sampling = "grid_sample", single_input: bool = False) -> None:
        super().__init__()
        config = model.config
        own: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
            hgnetv2.Stem: GraphStem,
            vit.Block: GraphViTBlock,
            vit.VisionTransformer: GraphVisionTransformer,
            blocks.RMSNorm: GraphRMSNorm,
            blocks.SelfAttention: GraphSelfAttention,
            decoder_layer.DeformableAttention: partial(GraphDeformableAttention, sampling=sampling),
            decoder.Decoder: GraphDecoder,
        }
        with torch.inference_mode(False), torch.no_grad():
            network = fuse(deepcopy(model).eval(), FORMS | own).requires_grad_(False)
        self.backbone, self.encoder, self.decoder = network.backbone, network.encoder, network.decoder
        self.single_input, self.num_classes = single_input, config.num_classes
        self.max_detections = config.max_detections
        self.is_normalised = any(config.image_mean) or set(config.image_std) != {1.0}
        self.register_buffer("mean", torch.tensor(config.image_mean)[:, None, None])
        self.register_buffer("scale", 1 / torch.tensor(config.image_std)[:, None, None])

    def forward(self, images: Tensor, orig_target_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images: (B, 3, H, W), RGB in 0–1.
            orig_target_sizes: (B, 2), width and height of the original images, int64.
        Returns: labels (B, K), int64; boxes (B, K, 4), xyxy in pixels of the original images, or in 0–1 for
            `single_input`; scores (B, K), highest first.
        """
        pixels = (images - self.mean) * self.scale if self.is_normalised else images
        output = self.decoder(self.encoder(self.backbone(pixels)))
        logits, boxes = output.logits, output.pred_boxes
        n_scores = logits.shape[1] * self.num_classes
        scores, index = logits.flatten(1).topk(min(self.max_detections, n_scores), dim=1)
        query = torch.div(index, self.num_classes, rounding_mode="floor")
        centre, size = take_rows(boxes, query).split([2, 2], dim=-1)
        corners = torch.cat([centre - size * 0.5, centre + size * 0.5], dim=-1)
        if orig_target_sizes is not None:
            sides = orig_target_sizes.to(corners.dtype)
            corners = corners * torch.cat([sides, sides], dim=1).unsqueeze(1)
        return index - query * self.num_classes, corners, scores.sigmoid()


def build_graph(
    model: DEIMv2, sampling: Sampling = "grid_sample", single_input: bool = False
) -> DetectionGraph:
    """Return the graph of a detector, in eval mode."""
    return DetectionGraph(model, sampling, single_input).eval()


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Pick rows of each image: (B, T, D) at (B, Q) to (B, Q, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class GraphRMSNorm(nn.Module):
    """RMSNorm written out: runtimes know its operation only in later opsets than ours."""

    def __init__(self, norm: blocks.RMSNorm) -> None:
        super().__init__()
        self.scale, self.eps = norm.scale, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to the same."""
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.eps) * self.scale


class GraphStem(FusedStem):
    """Stem with padding as an operation of its own, which runtimes fold into the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, O, H / 4, W / 4)."""
        x = F.pad(self.stem1(x), (0, 1, 0, 1))
        learned = self.stem2b(F.pad(self.stem2a(x), (0, 1, 0, 1)))
        return self.stem4(self.stem3(torch.cat([F.max_pool2d(x, 2, stride=1), learned], dim=1)))


class GraphVisionTransformer(FusedVisionTransformer):
    """Transformer whose prefix tokens are added to zeros instead of repeated for each image."""

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised, to maps (B, C, H / 16, W / 16)."""
        patches = self.patch_embed(pixel_values)
        size = (patches.shape[-2], patches.shape[-1])
        n_prefix, n_patches = self.prefix.shape[1], size[0] * size[1]
        tokens = F.pad(patches.flatten(2).transpose(1, 2), (0, 0, n_prefix, 0))
        x = tokens + F.pad(self.prefix, (0, 0, 0, n_patches))
        cos, sin = self.rope_embed(size, x.dtype, n_prefix)
        table = cos.unsqueeze(1), sin.unsqueeze(1)  # (T, 1, C / H)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x, table)
            if index in self.out_blocks:
                maps.append(self.norm(x[:, n_prefix:]).transpose(1, 2).unflatten(-1, size))
        return maps


class GraphViTBlock(nn.Module):
    """Block with its layer scales, and the attention's own factor, inside its linears."""

    def __init__(self, block: vit.Block) -> None:
        super().__init__()
        qkv, dim = block.attn.qkv, block.attn.qkv.in_features
        bias = qkv.bias * qkv.bias_mask if isinstance(qkv, vit.MaskedBiasLinear) else qkv.bias
        fused = FusedViTBlock(block)
        self.norm1, self.norm2, self.proj, self.mlp = fused.norm1, fused.norm2, fused.proj, fused.mlp
        self.num_heads = fused.num_heads
        factor = torch.ones(3 * dim, 1)
        factor[:dim] = (dim / self.num_heads) ** -0.5
        self.qkv = linear_of(qkv.weight * factor, bias * factor[:, 0])

    def forward(self, x: Tensor, table: Table) -> Tensor:
        """(B, T, C) to the same."""
        qkv = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv)
        x = x + self.proj(attend(rotate(query, table), rotate(key, table), value))
        return x + self.mlp(self.norm2(x))


class GraphSelfAttention(nn.Module):
    """Self-attention whose own factor is inside its projections."""

    def __init__(self, attention: blocks.SelfAttention) -> None:
        super().__init__()
        fused = FusedSelfAttention(attention)
        self.num_heads, self.value, self.out_proj = fused.num_heads, fused.value, fused.out_proj
        dim = self.value.in_features
        factor = torch.ones(2 * dim, 1)
        factor[:dim] = (dim / self.num_heads) ** -0.5
        self.query_key = linear_of(fused.query_key.weight * factor, fused.query_key.bias * factor[:, 0])

    def forward(self, x: Tensor, position: Tensor, blocked: None = None) -> Tensor:
        """(B, T, D) to the same."""
        parts = [*self.query_key(x + position).chunk(2, dim=-1), self.value(x)]
        return self.out_proj(attend(*(part.unflatten(-1, (self.num_heads, -1)) for part in parts)))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without a factor: (B, T, H, C / H) three times to (B, T, C)."""
    weights = torch.matmul(query.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1)).softmax(dim=-1)
    return torch.matmul(weights, value.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).flatten(2)


class Memory(NamedTuple):
    """The encoder's maps, (B, D, H_l, W_l), and their tokens, (B, T, D)."""

    maps: Sequence[Tensor]
    tokens: Tensor


class GraphDecoder(FusedDecoder):
    """Decoder to logits and boxes; reference boxes stay logits until they are read."""

    def forward(self, maps: Sequence[Tensor]) -> DetectionOutput:
        """Maps (B, D, H_l, W_l), fine to coarse, to detections."""
        tokens = torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)
        memory = Memory(maps, tokens)
        sizes = tuple((level.shape[-2], level.shape[-1]) for level in maps)
        x, reference_logits = self._select(tokens, sizes)
        reference = reference_logits.sigmoid()
        position = self.query_pos_head(reference).clamp(-POSITION_LIMIT, POSITION_LIMIT)
        base_logits = reference_logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        for index, (layer, bbox_head) in enumerate(zip(self.layers, self.bbox_heads, strict=True)):
            before, x = x, layer(x, position, reference, memory)
            if index == 0:
                base = (self.pre_bbox_head(x) + base_logits).sigmoid()
                extent = torch.cat([base[..., 2:], base[..., 2:]], dim=-1)
                corner_logits = bbox_head(x)
            else:
                corner_logits = corner_logits + bbox_head(x + before)
            likely = corner_logits.unflatten(-1, (4, -1)).softmax(dim=-1).flatten(2)
            reference = base + torch.matmul(likely, self.edges) * extent
        logits = self.score_head(x) + self.quality(corner_logits)
        return DetectionOutput(logits=logits, pred_boxes=reference)

    def _select(self, tokens: Tensor, sizes: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
        """Return content (B, Q, D) and box logits (B, Q, 4) of the tokens with the highest class scores."""
        anchors, valid = make_anchors(sizes, tokens.dtype, tokens.device)
        scores = self.enc_score_head(tokens).amax(dim=-1)
        # A token without a valid anchor is scored as zeros, which gives the bias.
        scores = torch.where(valid[:, 0] > 0, scores, self.enc_score_head.bias.max())
        chosen = self.choose(scores)
        content = take_rows(tokens, chosen) * valid[chosen]
        return content, self.enc_bbox_head(content) + anchors.clamp(max=FAR)[chosen]


class GraphDeformableAttention(nn.Module):
    """Cross attention whose linears give offsets and weights head by head, so that nothing is transposed."""

    def __init__(self, attention: decoder_layer.DeformableAttention, sampling: Sampling) -> None:
        super().__init__()
        fused = FusedDeformableAttention(attention)
        self.sampling, self.num_points, self.num_heads = sampling, fused.num_points, fused.num_heads
        n, weight, bias = sum(self.num_points), fused.points.weight, fused.points.bias
        n_offsets = 2 * n * self.num_heads
        shape = (self.num_heads, n, 2, -1)
        # (H, D, 2P), first all x, then all y; as a factor of the whole box, and of a grid that runs from -1.
        self.offsets = _frozen(weight[:n_offsets].view(shape).permute(0, 3, 2, 1).flatten(2) * OFFSET_SCALE)
        self.offset_bias = _frozen(bias[:n_offsets].view(shape).permute(0, 3, 2, 1).flatten(2) * OFFSET_SCALE)
        self.weights = _frozen(weight[n_offsets:].view(self.num_heads, n, -1).transpose(1, 2))
        self.weight_bias = _frozen(bias[n_offsets:].view(self.num_heads, 1, n))

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """(B, Q, D) at boxes (B, Q, 4) to (B, Q, D)."""
        query, reference = query.unsqueeze(1), reference.unsqueeze(1)
        offsets = torch.matmul(query, self.offsets) + self.offset_bias
        weights = (torch.matmul(query, self.weights) + self.weight_bias).softmax(dim=-1)
        centre_x, centre_y, width, height = reference.split(1, dim=-1)
        x, y = offsets.chunk(2, dim=-1)  # (B, H, Q, P) each
        x, y = x * width + centre_x, y * height + centre_y
        return getattr(self, f"_{self.sampling}")(x, y, weights, memory)

    def _grid_sample(self, x: Tensor, y: Tensor, weights: Tensor, memory: Memory) -> Tensor:
        grid = (torch.stack([x, y], dim=-1) * 2 - 1).flatten(0, 1)  # (B·H, Q, P, 2)
        sampled = [
            F.grid_sample(
                level.unflatten(1, (self.num_heads, -1)).flatten(0, 1),
                part,
                padding_mode="zeros",
                align_corners=False,
            )
            for level, part in zip(memory.maps, grid.split(list(self.num_points), dim=2), strict=True)
        ]  # (B·H, D / H, Q, points of the level) each
        mixed = (torch.cat(sampled, dim=-1) * weights.flatten(0, 1).unsqueeze(1)).sum(dim=-1)
        dim, n_queries = memory.tokens.shape[-1], x.shape[2]
        return mixed.reshape(-1, dim, n_queries).transpose(1, 2)

    def _gather(self, x: Tensor, y: Tensor, weights: Tensor, memory: Memory) -> Tensor:
        """Read the four cells around each point as rows, which hold all channels of a head."""
        sizes = [level.shape[-2:] for level in memory.maps]
        starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(sizes))]
        columns, rows, start = (
            torch.tensor(
                [values[level] for level, n in enumerate(self.num_points) for _ in range(n)], dtype=x.dtype
            )
            for values in ([w for _, w in sizes], [h for h, _ in sizes], starts)
        )
        x, y = x * columns - 0.5, y * rows - 0.5
        # The upper left of the four cells, moved inside the map. A cell weighs what remains of 1 after its
        # distance: nothing for cells that are not next to the point, so points outside need no case.
        left = x.floor().clamp(min=0).minimum(columns - 2)
        upper = y.floor().clamp(min=0).minimum(rows - 2)
        near_x, near_y = x - left, y - upper
        across = [1 - near_x.abs(), 1 - (near_x - 1).abs()]
        down = [(1 - near_y.abs()).relu() * weights, (1 - (near_y - 1).abs()).relu() * weights]
        shares = torch.cat([v * h.relu() for v in down for h in across], dim=-1)
        head = torch.arange(self.num_heads, dtype=x.dtype)[:, None, None]
        first = (upper * columns + left + start) * self.num_heads + head
        steps = [first, first + self.num_heads]
        steps += [step + columns * self.num_heads for step in steps]
        n_queries, dim = x.shape[2], memory.tokens.shape[-1]
        cells = torch.cat(steps, dim=-1).long().flatten(1)  # (B, H·Q·4P)
        table = memory.tokens.reshape(-1, memory.tokens.shape[1] * self.num_heads, dim // self.num_heads)
        read = take_rows(table, cells).reshape(
            -1, self.num_heads, n_queries, shares.shape[-1], dim // self.num_heads
        )
        mixed = torch.matmul(shares.unsqueeze(-2), read)  # (B, H, Q, 1, D / H)
        return mixed.squeeze(-2).transpose(1, 2).flatten(2)


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach().contiguous(), requires_grad=False)
