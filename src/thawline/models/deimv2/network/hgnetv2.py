"""HGNetv2, the convolutional backbone of Atto, Femto, Pico and N.

Stages of blocks that concatenate all their layers and squeeze them back, as PaddleClas publishes PP-HGNetV2
B0; the smaller ones are prunings of it (DEIMv2, arXiv 2509.20787, section 3.2). Each activation is followed
by a learnable scale and shift of one value each (LAB). No normalisation of the pixels beyond 0–1.
"""

from __future__ import annotations

__all__ = ["HGNetV2", "HGNetV2Config", "StageConfig"]

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.errors import ConfigError
from thawline.models.deimv2.fused.forms import Clamp, FusedConv, concatenate, fuse_children


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
        """Of the maps it gives."""
        return tuple(4 * 2**stage for stage in self.out_stages)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Of the maps it gives."""
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
    """To stride 4, with a learned and a maximum branch of 2×2 windows, padded on the right and below."""

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

    def fuse(self) -> FusedStem:
        """With its maximum taken in two passes."""
        return FusedStem(self)


class FusedStem(nn.Module):
    """The stem on channels-last maps. Maxima of whole rows cost a third of `max_pool2d` there.

    On a CPU it goes strip by strip: its maps are the network's largest, and as wholes they cost more time in
    fresh memory than in arithmetic. A strip recomputes two or three lines of its neighbours.
    """

    strip_size = 8192
    """Largest number of a strip's outputs."""
    n_images_compiled = 4
    """Size of the batch that strips are cut for in a compiled network, whatever it gets."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.stem1, self.stem2a, self.stem2b = stem.stem1.fuse(), stem.stem2a.fuse(), stem.stem2b.fuse()
        self.stem3, self.stem4 = stem.stem3.fuse(), stem.stem4.fuse()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, O, H / 4, W / 4)."""
        n_rows, width = x.shape[-2] // 4, x.shape[-1] // 4
        is_whole = x.device.type != "cpu" or torch.compiler.is_exporting() or torch.jit.is_tracing()
        # A compiler may leave the batch open, and would reason about strips that depend on it for minutes.
        n_images = self.n_images_compiled if torch.compiler.is_compiling() else x.shape[0]
        n_strips = min(math.ceil(n_rows * width * n_images / self.strip_size), n_rows // 8)
        if is_whole or n_strips < 2:
            return self._strip(x, 0, n_rows, n_rows)
        step = math.ceil(n_rows / n_strips)
        starts = range(0, n_rows, step)
        return torch.cat(
            [self._strip(x, start, min(start + step, n_rows), n_rows) for start in starts], dim=2
        )

    def _strip(self, x: Tensor, start: int, stop: int, n_rows: int) -> Tensor:
        """Rows [start, stop) of the result.

        Convolutions pad, so a strip that does not begin at the top begins one row early wherever one of
        stride 2 follows, and drops what it got from the padding.
        """
        above, below = int(start > 0), int(stop == n_rows)
        first = 2 * start - 2 * above  # row at stride 2
        x = x[:, :, 2 * first - 2 * above : 4 * stop + 4]
        x = _pad_right(self.stem1(x)[:, :, above:], below)
        learned = self.stem2b(_pad_right(self.stem2a(x), below))
        rows = learned.shape[2]
        largest = torch.maximum(x[:, :, :rows], x[:, :, 1 : rows + 1])
        largest = torch.maximum(largest[..., :-1], largest[..., 1:])
        return self.stem4(self.stem3(concatenate([largest, learned]))[:, :, above:])


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
    """Layers in a row; the input and every layer's output are concatenated and squeezed in two steps."""

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

    def fuse(self) -> FusedBlock:
        """With folded layers and less fresh memory."""
        return FusedBlock(self)


class FusedBlock(nn.Module):
    """A block at inference."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers, self.aggregation = fuse_children(block.layers), fuse_children(block.aggregation)
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H, W)."""
        parts = [x]
        for layer in self.layers:
            parts.append(layer(parts[-1]))
        out = self.aggregation(concatenate(parts))
        return out.add_(x) if self.residual else out


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
            return self._norm_and_act(x, self.lab)
        return self.lab(F.relu(self.bn(x)))

    def _norm_and_act(self, x: Tensor, lab: LearnableAffine) -> Tensor:
        """s·relu(z) + t with s and t inside the norm: s·z + t, limited by t.

        A map less to keep for backward and five passes over one less in a step: N's takes 0.8 of the time.
        """
        bn, scale, shift = self.bn, lab.scale, lab.bias
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x,
            bn.running_mean,
            bn.running_var,
            bn.weight * scale,
            torch.addcmul(shift.detach(), bn.bias, scale),
            training=True,
            momentum=bn.momentum,
            eps=bn.eps,
        )
        return _Limit.apply(y, scale, shift)

    def fuse(self) -> FusedConv:
        """One convolution: s·relu(z) + t is s·z + t, limited to values from t on, or up to t where s < 0."""
        if self.lab is None:
            return FusedConv.fold(self.conv, self.bn)
        fused = FusedConv.fold(self.conv, self.bn)
        scale, shift = self.lab.scale.item(), self.lab.bias.item()
        fused.weight.mul_(scale)
        fused.bias.mul_(scale).add_(shift)
        fused.activation = Clamp(low=shift) if scale >= 0 else Clamp(high=shift)
        return fused


class LearnableAffine(nn.Module):
    """scale · x + bias, one value each."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return self.scale * x + self.bias


class _Limit(torch.autograd.Function):
    """y from t on, or up to t where s < 0, in place; no gradient for s, and Σ ∂y for t.

    That is all of t's gradient: y holds t too, but as a constant. The one input that a ReLU of s·z could not
    tell apart is s = 0, whose own gradient is then 0.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        shift = shift.to(y.dtype)
        if y.is_cpu:  # numbers are read for free here, and limit four times as fast as tensors
            limit = shift.item()
            y = y.clamp_(min=limit) if scale.item() >= 0 else y.clamp_(max=limit)
        else:
            is_low = scale >= 0
            low, high = shift.masked_fill(~is_low, -torch.inf), shift.masked_fill(is_low, torch.inf)
            y = y.clamp_(low, high)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y, scale, shift)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        y, scale, shift = ctx.saved_tensors
        if y.is_cpu and scale.item() >= 0:
            passed = torch.ops.aten.threshold_backward(grad, y, shift.item())
        else:
            passed = grad.masked_fill(y == shift, 0)
        return passed, None, grad.sum().to(scale.dtype).reshape(1)


def _pad_right_and_below(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1, 0, 1))


def _pad_right(x: Tensor, n_below: int) -> Tensor:
    """A column of zeros and `n_below` rows, as `F.pad` gives them, but channels-last in one pass over x."""
    batch, channels, height, width = x.shape
    out = x.new_empty((batch, height + n_below, width + 1, channels)).permute(0, 3, 1, 2)
    out[:, :, :height, :width] = x
    out[..., width:] = 0
    if n_below:
        out[:, :, height:] = 0
    return out
