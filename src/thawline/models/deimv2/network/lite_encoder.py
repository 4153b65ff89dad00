"""Two-level encoder of Atto, Femto and Pico: one map in, strides 16 and 32 out.

Source: DEIMv2, arXiv 2509.20787, section 3.2.
"""

from __future__ import annotations

__all__ = ["DownSample", "LiteEncoder", "LiteEncoderConfig"]

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from thawline.models.deimv2.network.blocks import ELAN, ConvNorm


@dataclass(frozen=True, kw_only=True)
class LiteEncoderConfig:
    """Shape of the encoder."""

    kind: Literal["lite"] = "lite"
    hidden_dim: int
    """Channels of both output maps."""
    expansion: float = 0.34
    """Width of the chains inside an ELAN block, as a share of half of `hidden_dim`."""
    n_blocks: int = 2
    """RepVGG blocks of a chain."""


class LiteEncoder(nn.Module):
    """Downsampling, fusion with the global mean, upsampling, downsampling."""

    def __init__(self, config: LiteEncoderConfig, in_channels: tuple[int, ...]) -> None:
        super().__init__()
        dim = config.hidden_dim
        (channels,) = in_channels
        self.input_proj = nn.ModuleList([ConvNorm(channels, dim)])
        self.down_sample1 = DownSample(dim)
        self.down_sample2 = DownSample(dim)
        self.bi_fusion = GlobalFusion(dim)
        self.fpn_block = ELAN(dim, expansion=config.expansion, n_blocks=config.n_blocks, trailing_conv=True)
        self.pan_block = deepcopy(self.fpn_block)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One map (B, C, H, W) to (B, D, H, W) and (B, D, H / 2, W / 2)."""
        fine = self.input_proj[0](maps[0])
        coarse = self.bi_fusion(self.down_sample1(fine))
        fine = self.fpn_block(fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        coarse = self.pan_block(coarse + self.down_sample2(fine))
        return [fine, coarse]


class GlobalFusion(nn.Module):
    """Add each channel's mean over the image, then mix the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cv = ConvNorm(dim, dim, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to the same."""
        return self.cv(x + x.mean(dim=(2, 3), keepdim=True))


class DownSample(nn.Sequential):
    """Halve the resolution by averaging; at the border the padding's zeros count, as trained."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.AvgPool2d(3, stride=2, padding=1),
            nn.Conv2d(dim, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
            nn.SiLU(),
        )
