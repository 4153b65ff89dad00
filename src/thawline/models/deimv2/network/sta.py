"""Backbone of S to X: a vision transformer's maps combined with a small convolutional branch.

The Spatial Tuning Adapter gives four strides of plain convolutions; the transformer gives one stride at three
depths, resized to the strides 8, 16 and 32. Each pair is concatenated and mixed.

Source: DEIMv2, arXiv 2509.20787, section 3.1.
"""

from __future__ import annotations

__all__ = ["AdaptedViT", "AdaptedViTConfig", "SpatialTuningAdapter", "resize_like"]

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.errors import ConfigError
from thawline.models.deimv2.network.vit import VisionTransformer, ViTConfig


@dataclass(frozen=True, kw_only=True)
class AdaptedViTConfig:
    """Shape of the backbone."""

    kind: Literal["adapted_vit"] = "adapted_vit"
    vit: ViTConfig
    detail_channels: int
    """Channels of the convolutional branch at stride 4; strides 8, 16, 32 have 2, 4, 4 times as many."""
    out_channels_each: int
    """Channels of each output map."""

    def __post_init__(self) -> None:
        if len(self.vit.out_blocks) not in (1, 3):
            raise ConfigError(
                f"`out_blocks={self.vit.out_blocks}`: strides 8, 16 and 32 need three blocks, or one for all."
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """For each map of the output."""
        return (8, 16, 32)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """For each map of the output."""
        return (self.out_channels_each,) * 3


class AdaptedViT(nn.Module):
    """Image to maps of strides 8, 16 and 32."""

    def __init__(self, config: AdaptedViTConfig) -> None:
        super().__init__()
        vit = VisionTransformer(config.vit)
        # The authors' distilled ViTs sit one level deeper in their files than DINOv3.
        self.dinov3 = nn.ModuleDict({"_model": vit}) if config.vit.family == "vit_tiny" else vit
        self.sta = SpatialTuningAdapter(config.detail_channels)
        out = config.out_channels_each
        self.convs = nn.ModuleList(
            nn.Conv2d(config.vit.dim + detail, out, 1, bias=False) for detail in self.sta.out_channels
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in self.sta.out_channels)

    @property
    def vit(self) -> VisionTransformer:
        """The transformer, at either of its two places."""
        return self.dinov3["_model"] if isinstance(self.dinov3, nn.ModuleDict) else self.dinov3

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised, to maps (B, C, H / s, W / s)."""
        maps = self.vit(pixel_values)
        if len(maps) == 1:
            maps = maps * 3
        details = self.sta(pixel_values)
        return [
            norm(conv(torch.cat([resize_like(semantic, detail), detail], dim=1)))
            for conv, norm, semantic, detail in zip(self.convs, self.norms, maps, details, strict=True)
        ]


class SpatialTuningAdapter(nn.Module):
    """Four strided convolutions; the activation of a stage comes before its convolution, so outputs have
    none."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.out_channels = (2 * c, 4 * c, 4 * c)
        self.stem = nn.Sequential(*_halve(3, c), nn.GELU(), nn.MaxPool2d(3, stride=2, padding=1))
        self.conv2 = nn.Sequential(*_halve(c, 2 * c))
        self.conv3 = nn.Sequential(nn.GELU(), *_halve(2 * c, 4 * c))
        self.conv4 = nn.Sequential(nn.GELU(), *_halve(4 * c, 4 * c))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to maps at strides 8, 16, 32."""
        fine = self.conv2(self.stem(pixel_values))
        middle = self.conv3(fine)
        return [fine, middle, self.conv4(middle)]


def _halve(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def resize_like(semantic: Tensor, detail: Tensor) -> Tensor:
    """Resize a map to the size of another, bilinearly."""
    size = detail.shape[-2:]
    if semantic.shape[-2:] == size:
        return semantic
    return F.interpolate(semantic, size=size, mode="bilinear", align_corners=False)
