"""HGNetv2, the convolutional backbone of Atto, Femto, Pico and N.

Stages of blocks that concatenate all their layers and squeeze them back, as PaddleClas publishes PP-HGNetV2
B0; the smaller ones are prunings of it (DEIMv2, arXiv 2509.20787, section 3.2). Each activation is followed
by a learnable scale and shift of one value each (LAB). No normalisation of the pixels beyond 0–1.
"""

from __future__ import annotations

__all__ = ["Block", "HGNetV2", "HGNetV2Config", "StageConfig", "Stem", "Unit"]

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.errors import ConfigError
from thawline.ops.norm_act import norm_relu_affine


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: blocks at one resolution."""

    in_channels: int
    mid_channels: int
    """Width of the layers inside a block."""
    out_channels: int
    n_blocks: int = 1
    downsample: bool = True
    """Halve the resolution first."""
    light: bool = False
    """Layers are a 1×1 and a depthwise convolution instead of a full one."""
    kernel_size: int = 3
    n_layers: int = 3
    """Layers of a block."""


@dataclass(frozen=True, kw_only=True)
class HGNetV2Config:
    """Shape of the backbone."""

    kind: Literal["hgnetv2"] = "hgnetv2"
    stem_channels: tuple[int, int, int] = (3, 16, 16)
    """In, mid, out."""
    stages: tuple[StageConfig, ...]
    out_stages: tuple[int, ...]
    """Stages whose output is taken, ascending; stage s has stride 4·2^s."""

    def __post_init__(self) -> None:
        taken = list(self.out_stages)
        if not taken or taken != sorted(set(taken) & set(range(len(self.stages)))):
            raise ConfigError(
                f"`out_stages={self.out_stages}`: expected some of the {len(self.stages)} stages, 0 … "
                f"{len(self.stages) - 1}, in ascending order."
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """For each map of the output."""
        return tuple(4 * 2**stage for stage in self.out_stages)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """For each map of the output."""
        return tuple(self.stages[stage].out_channels for stage in self.out_stages)


class HGNetV2(nn.Module):
    """Image to one map per entry of `config.out_stages`, fine to coarse."""

    def __init__(self, config: HGNetV2Config) -> None:
        super().__init__()
        self.out_stages = config.out_stages
        self.stem = Stem(*config.stem_channels)
        self.stages = nn.ModuleList(Stage(stage) for stage in config.stages)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W), in 0–1, to maps (B, C_s, H / stride_s, W / stride_s)."""
        x = self.stem(pixel_values)
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_stages:
                maps.append(x)
        return maps


class Stem(nn.Module):
    """Stem to stride 4 with a convolution and a max-pool branch of 2×2 windows, padded right and bottom."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stem1 = Unit(in_channels, mid_channels, 3, stride=2)
        self.stem2a = Unit(mid_channels, mid_channels // 2, 2)
        self.stem2b = Unit(mid_channels // 2, mid_channels, 2)
        self.stem3 = Unit(2 * mid_channels, mid_channels, 3, stride=2)
        self.stem4 = Unit(mid_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, O, H / 4, W / 4)."""
        x = _pad_right_and_below(self.stem1(x))
        learned = self.stem2b(_pad_right_and_below(self.stem2a(x)))
        return self.stem4(self.stem3(torch.cat([F.max_pool2d(x, 2, stride=1), learned], dim=1)))


class Stage(nn.Module):
    """Halve the resolution, then blocks."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        if config.downsample:
            self.downsample: nn.Module = Unit(
                config.in_channels, config.in_channels, 3, stride=2, groups=config.in_channels, act=False
            )
        else:
            self.downsample = nn.Identity()
        self.blocks = nn.Sequential(
            *(
                Block(config, config.out_channels if index else config.in_channels, residual=index > 0)
                for index in range(config.n_blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H / 2, W / 2)."""
        return self.blocks(self.downsample(x))


class Block(nn.Module):
    """Layers in sequence; the input and every layer's output are concatenated and squeezed in two steps."""

    def __init__(self, config: StageConfig, in_channels: int, *, residual: bool) -> None:
        super().__init__()
        mid, out = config.mid_channels, config.out_channels
        layer = LightLayer if config.light else Unit
        self.layers = nn.ModuleList(
            layer(mid if index else in_channels, mid, config.kernel_size) for index in range(config.n_layers)
        )
        self.aggregation = nn.Sequential(
            Unit(in_channels + config.n_layers * mid, out // 2, 1), Unit(out // 2, out, 1)
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H, W)."""
        parts = [x]
        for layer in self.layers:
            parts.append(layer(parts[-1]))
        out = self.aggregation(torch.cat(parts, dim=1))
        return out + x if self.residual else out


class LightLayer(nn.Module):
    """A 1×1 convolution without activation, then a depthwise one."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv1 = Unit(in_channels, out_channels, 1, act=False)
        self.conv2 = Unit(out_channels, out_channels, kernel_size, groups=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H, W)."""
        return self.conv2(self.conv1(x))


class Unit(nn.Module):
    """Convolution without bias, batch norm and, with `act`, ReLU and LAB. A 2×2 kernel is not padded."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.lab = LearnableAffine() if act else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H / stride, W / stride)."""
        x = self.conv(x)
        if self.lab is None:
            return self.bn(x)
        if self.bn.training and type(self.bn) is nn.BatchNorm2d:
            return norm_relu_affine(x, self.bn, self.lab.scale, self.lab.bias)
        x = self.bn(x)
        if torch.is_grad_enabled() or x.dtype != self.lab.scale.dtype:
            return self.lab(F.relu(x))
        # In place: three maps less to allocate, 0.7 of Atto's time on a CPU.
        return x.relu_().mul_(self.lab.scale).add_(self.lab.bias)


class LearnableAffine(nn.Module):
    """scale · x + bias, one value each."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, unchanged."""
        return self.scale * x + self.bias


def _pad_right_and_below(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1, 0, 1))
