"""Inference forms of the blocks that the encoders share. Convolutions with a norm are folded before."""

from __future__ import annotations

__all__ = ["FusedCSP", "FusedELAN", "fuse_down_sample", "fuse_rep_vgg"]

import torch.nn.functional as F
from torch import Tensor, nn

from thawline.models.deimv2.fused.conv import FusedConv, concatenate
from thawline.models.deimv2.network.blocks import CSP, ELAN, RepVGG
from thawline.models.deimv2.network.lite_encoder import DownSample


class FusedCSP(nn.Module):
    """CSP with one convolution for each half: half a channels-last map is not dense and would be copied."""

    def __init__(self, csp: CSP) -> None:
        super().__init__()
        self.straight, self.deep = _halves(csp.conv1)
        self.bottlenecks = csp.bottlenecks

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, C, H, W)."""
        return self.bottlenecks(self.deep(x)).add_(self.straight(x))


class FusedELAN(nn.Module):
    """ELAN with one convolution for each half."""

    def __init__(self, elan: ELAN) -> None:
        super().__init__()
        self.straight, self.deep = _halves(elan.cv1)
        self.first, self.second = elan.cv2, elan.cv3
        self.mix = elan.cv4

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to the same."""
        deep = self.deep(x)
        first = self.first(deep)
        return self.mix(concatenate([self.straight(x), deep, first, self.second(first)]))


def fuse_rep_vgg(block: RepVGG) -> FusedConv:
    """Fold both branches into one convolution: a 1×1 kernel is the middle of a 3×3 one."""
    weight = block.conv1.weight + F.pad(block.conv2.weight, (1, 1, 1, 1))
    return FusedConv(weight, block.conv1.bias + block.conv2.bias, padding=1, activation="silu")


def fuse_down_sample(block: DownSample) -> nn.Sequential:
    """Average, then one convolution."""
    means, conv, norm, _ = block
    return nn.Sequential(means, FusedConv.fold(conv, norm, "silu"))


def _halves(conv: FusedConv) -> tuple[FusedConv, FusedConv]:
    first, second = (
        FusedConv(weight, bias, activation=conv.activation)
        for weight, bias in zip(conv.weight.chunk(2), conv.bias.chunk(2), strict=True)
    )
    return first, second
