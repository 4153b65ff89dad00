"""Inference forms of the vision transformer and its adapter."""

from __future__ import annotations

__all__ = ["FusedAdaptedViT", "FusedViTBlock", "FusedVisionTransformer", "fuse_adapter"]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.models.deimv2.fused.conv import FusedConv, fold_norm, linear_of
from thawline.models.deimv2.network.sta import AdaptedViT, SpatialTuningAdapter, resize_like
from thawline.models.deimv2.network.vit import Block, LayerScale, MaskedBiasLinear, SwiGLU, VisionTransformer
from thawline.ops.cache import TensorCache
from thawline.ops.rotary import rotate_pairs


class FusedVisionTransformer(nn.Module):
    """Vision transformer without what only training reads."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.out_blocks = vit.config.out_blocks
        self.prefix = nn.Parameter(vit.prefix().detach(), requires_grad=False)
        self.patch_embed, self.rope_embed = vit.patch_embed, vit.rope_embed
        self.blocks = vit.blocks[: max(self.out_blocks) + 1]
        self.norm = vit.norm if vit.config.final_norm else nn.Identity()
        self._turns = TensorCache()

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised, to channels-last maps (B, C, H / 16, W / 16)."""
        patches = self.patch_embed(pixel_values)
        size = (patches.shape[-2], patches.shape[-1])
        n_prefix = self.prefix.shape[1]
        tokens = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1)
        key = (size, x.dtype, x.device, n_prefix)
        turns = self._turns.get(key, lambda: _turns(self.rope_embed.angles(size, n_prefix), x.dtype))
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x, turns)
            if index in self.out_blocks:
                maps.append(self.norm(x[:, n_prefix:]).transpose(1, 2).unflatten(-1, size))
        return maps


class FusedViTBlock(nn.Module):
    """Block with its layer scales inside its linears.

    It overwrites its own intermediate values: fresh memory is expensive on a CPU.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.num_heads = block.attn.num_heads
        self.qkv = _pair_adjacent(block.attn.qkv, self.num_heads)
        self.proj = _scale_rows(block.attn.proj, block.ls1)
        self.mlp = block.mlp
        name = "w3" if isinstance(self.mlp, SwiGLU) else "fc2"
        setattr(self.mlp, name, _scale_rows(getattr(self.mlp, name), block.ls2))

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """(B, T, C) to the same; x is kept."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key = rotate_pairs(qkv[:, :, :2], turns).permute(2, 0, 3, 1, 4).unbind(0)
        value = qkv[:, :, 2].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x.add_(self.mlp(self.norm2(x)))


class FusedAdaptedViT(nn.Module):
    """Backbone that mixes semantic and detail maps by one layer each and adds, instead of concatenating.

    The transformer's part is mixed before it is enlarged, while its tokens still lie one after the other.
    """

    def __init__(self, backbone: AdaptedViT) -> None:
        super().__init__()
        self.vit, self.sta = backbone.vit, backbone.sta
        dim = backbone.convs[0].in_channels - self.sta.out_channels[0]
        self.semantic, self.detail = nn.ModuleList(), nn.ModuleList()
        for conv, norm in zip(backbone.convs, backbone.norms, strict=True):
            weight, bias = fold_norm(conv.weight, norm)
            self.semantic.append(linear_of(weight[:, :dim, 0, 0]))
            self.detail.append(FusedConv(weight[:, dim:], bias))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised, to maps (B, C, H / s, W / s)."""
        maps = self.vit(pixel_values)
        if len(maps) == 1:
            maps = maps * 3
        fused = []
        for linear, conv, semantic, detail in zip(
            self.semantic, self.detail, maps, self.sta(pixel_values), strict=True
        ):
            if semantic.shape[-1] > detail.shape[-1]:
                semantic = resize_like(semantic, detail)
            mixed = linear(semantic.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            fused.append(resize_like(mixed, detail) + conv(detail))
        return fused


def fuse_adapter(adapter: SpatialTuningAdapter) -> SpatialTuningAdapter:
    """Fold the norms and the first activation into the convolutions."""
    conv, norm, _, pool = adapter.stem
    adapter.stem = nn.Sequential(FusedConv.fold(conv, norm, "gelu"), pool)
    adapter.conv2 = nn.Sequential(FusedConv.fold(*adapter.conv2))
    for name in ("conv3", "conv4"):
        gelu, conv, norm = getattr(adapter, name)
        setattr(adapter, name, nn.Sequential(gelu, FusedConv.fold(conv, norm)))
    return adapter


def _turns(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of each pair, (T, 1, 1, D / 2, 2), for `rotate_pairs`."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None, None].to(dtype)


def _pair_adjacent(qkv: nn.Linear, num_heads: int) -> nn.Linear:
    """Return the projection with both channels of each rotated pair adjacent, and its masked bias.

    Products of queries and keys do not notice, since both change alike.
    """
    head_dim = qkv.out_features // 3 // num_heads
    order = torch.arange(qkv.out_features).view(3, num_heads, 2, head_dim // 2)
    order[:2] = order[:2].transpose(-1, -2).reshape(2, num_heads, 2, -1)
    order = order.flatten()
    bias = qkv.bias * qkv.bias_mask if isinstance(qkv, MaskedBiasLinear) else qkv.bias
    return linear_of(qkv.weight[order], bias[order])


def _scale_rows(linear: nn.Linear, scale: nn.Module) -> nn.Linear:
    """Fold the layer scale that follows a linear into it."""
    if not isinstance(scale, LayerScale):
        return linear
    return linear_of(linear.weight * scale.gamma[:, None], linear.bias * scale.gamma)
