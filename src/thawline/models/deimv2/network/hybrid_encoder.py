"""Encoder of N to X: attention on the coarsest map, then a feature pyramid top-down and bottom-up.

Source: RT-DETR (Zhao et al., CVPR 2024), as D-FINE and DEIMv2 keep it, with sums where they concatenated.
"""

from __future__ import annotations

__all__ = ["HybridEncoder", "HybridEncoderConfig", "sine_position_embedding"]

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.models.deimv2.network.blocks import ELAN, ConvNorm, SelfAttention
from thawline.ops.cache import TensorCache

PositionOrder = Literal["as_trained", "row_column"]


@dataclass(frozen=True, kw_only=True)
class HybridEncoderConfig:
    """Shape of the encoder."""

    kind: Literal["hybrid"] = "hybrid"
    hidden_dim: int
    """Channels of every output map."""
    ffn_dim: int
    """Width inside the transformer layer."""
    expansion: float
    """Width of the chains inside an ELAN block, as a share of half of `hidden_dim`."""
    n_blocks: int
    """RepVGG blocks of a chain."""
    trailing_conv: bool = False
    """A 3×3 convolution after each chain (N)."""
    num_heads: int = 8
    position_order: PositionOrder = "as_trained"
    """How tokens get their place. "as_trained" is what the published weights saw: row and column for square
    images, but scrambled for others. "row_column" is right for every shape; the two agree on squares."""


class HybridEncoder(nn.Module):
    """Encoder from maps of several strides to as many maps of one width, fine to coarse."""

    def __init__(self, config: HybridEncoderConfig, in_channels: tuple[int, ...]) -> None:
        super().__init__()
        dim, n_levels = config.hidden_dim, len(in_channels)
        self.input_proj = nn.ModuleList(
            nn.Identity() if channels == dim else ConvNorm(channels, dim) for channels in in_channels
        )
        # The authors count the levels that have attention, then the layers of each: both are one here.
        self.encoder = nn.ModuleList([nn.ModuleDict({"layers": nn.ModuleList([EncoderLayer(config)])})])
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, dim) for _ in range(n_levels - 1))
        elan = ELAN(
            dim, expansion=config.expansion, n_blocks=config.n_blocks, trailing_conv=config.trailing_conv
        )
        self.fpn_blocks = nn.ModuleList(deepcopy(elan) for _ in range(n_levels - 1))
        self.pan_blocks = nn.ModuleList(deepcopy(elan) for _ in range(n_levels - 1))
        self.downsample_convs = nn.ModuleList(nn.Sequential(DownConv(dim)) for _ in range(n_levels - 1))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps (B, C_l, H_l, W_l), fine to coarse, to (B, D, H_l, W_l)."""
        maps = [project(x) for project, x in zip(self.input_proj, maps, strict=True)]
        *finer, top = maps
        top = self._attend(top)

        laterals = []
        for lateral, block, fine in zip(self.lateral_convs, self.fpn_blocks, reversed(finer), strict=True):
            top = lateral(top)
            laterals.append(top)
            top = block(F.interpolate(top, scale_factor=2.0, mode="nearest") + fine)

        outs = [top]
        for down, block, lateral_map in zip(
            self.downsample_convs, self.pan_blocks, reversed(laterals), strict=True
        ):
            outs.append(block(down(outs[-1]) + lateral_map))
        return outs

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.encoder[0]["layers"][0](x.flatten(2).transpose(1, 2), (height, width))
        return tokens.transpose(1, 2).unflatten(-1, (height, width))


class EncoderLayer(nn.Module):
    """Post-norm transformer layer with positions added to queries and keys."""

    def __init__(self, config: HybridEncoderConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.position_order: PositionOrder = config.position_order
        self.self_attn = SelfAttention(dim, config.num_heads)
        self.linear1 = nn.Linear(dim, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self._positions = TensorCache()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, H·W, D) of a map of `size` (H, W) to the same."""
        dim = x.shape[-1]
        position = self._positions.get(
            (*size, x.dtype, x.device),
            lambda: sine_position_embedding(size, dim, self.position_order, x.device).to(x.dtype),
        )
        x = self.norm1(x + self.self_attn(x, position))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class DownConv(nn.Module):
    """Halve the resolution: mix the channels, then a depthwise convolution with stride 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(dim, dim)
        self.cv2 = ConvNorm(dim, dim, 3, stride=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to (B, D, H / 2, W / 2)."""
        return self.cv2(self.cv1(x))


def sine_position_embedding(
    size: tuple[int, int],
    dim: int,
    order: PositionOrder = "row_column",
    device: torch.device | str = "cpu",
    temperature: float = 10000.0,
) -> Tensor:
    """Return sines and cosines of each token's row, then of its column.

    The authors lay the grid out column by column while their tokens go row by row, so token t gets the place
    (t // H, t mod H). For a square that is its row and column; for other shapes it is a scramble, kept here
    as "as_trained" for the weights that learned with it.

    Args:
        size: (H, W).        dim: D, a multiple of 4.
    Returns: (H·W, D), float32 as the authors compute it also in a float64 model.
    """
    height, width = size
    token = torch.arange(height * width, device=device)
    per_line = height if order == "as_trained" else width
    row, column = (token // per_line).float(), (token % per_line).float()
    omega = 1.0 / temperature ** (torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))
    angles = row[:, None] * omega, column[:, None] * omega
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
