"""The table of inference forms, and the walk that puts them in place.

The walk goes from the leaves up, so a form is made from a module whose children already have theirs.
"""

from __future__ import annotations

__all__ = ["FORMS", "fuse"]

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from thawline.models.deimv2.fused.blocks import FusedCSP, FusedELAN, fuse_down_sample, fuse_rep_vgg
from thawline.models.deimv2.fused.conv import FusedConv, by_columns, linear_of
from thawline.models.deimv2.fused.decoder import FusedDecoder, FusedDeformableAttention, FusedSelfAttention
from thawline.models.deimv2.fused.hgnetv2 import FusedBlock, FusedStem, fuse_unit
from thawline.models.deimv2.fused.vit import (
    FusedAdaptedViT,
    FusedVisionTransformer,
    FusedViTBlock,
    fuse_adapter,
)
from thawline.models.deimv2.network import (
    blocks,
    class_rows,
    decoder,
    decoder_layer,
    hgnetv2,
    lite_encoder,
    sta,
    vit,
)

FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Linear: lambda linear: linear_of(linear.weight, linear.bias),
    class_rows.ClassHead: lambda head: head.lay_out(by_columns),
    blocks.ConvNorm: lambda unit: FusedConv.fold(unit.conv, unit.norm, unit.activation),
    blocks.RepVGG: fuse_rep_vgg,
    blocks.CSP: FusedCSP,
    blocks.ELAN: FusedELAN,
    blocks.SelfAttention: FusedSelfAttention,
    lite_encoder.DownSample: fuse_down_sample,
    hgnetv2.Unit: fuse_unit,
    hgnetv2.Stem: FusedStem,
    hgnetv2.Block: FusedBlock,
    vit.PatchEmbed: lambda patches: FusedConv(
        patches.proj.weight, patches.proj.bias, stride=patches.proj.stride[0]
    ),
    vit.Block: FusedViTBlock,
    vit.VisionTransformer: FusedVisionTransformer,
    sta.SpatialTuningAdapter: fuse_adapter,
    sta.AdaptedViT: FusedAdaptedViT,
    decoder_layer.DeformableAttention: FusedDeformableAttention,
    decoder.Decoder: FusedDecoder,
}
"""Class of a network's module → what makes its inference form."""


def fuse(module: nn.Module, forms: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = FORMS) -> nn.Module:
    """Return the inference form of a module in eval mode; the module itself is used up."""
    for name, child in module.named_children():
        setattr(module, name, fuse(child, forms))
    form = forms.get(type(module))
    return module if form is None else form(module)
