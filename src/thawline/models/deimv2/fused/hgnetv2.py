"""Inference forms of HGNetv2."""

from __future__ import annotations

__all__ = ["FusedBlock", "FusedStem", "fuse_unit"]

import math

import torch
from torch import Tensor, nn

from thawline.models.deimv2.fused.conv import Clamp, FusedConv, concatenate
from thawline.models.deimv2.network.hgnetv2 import Block, Stem, Unit


class FusedStem(nn.Module):
    """Stem on channels-last maps, where maxima of whole rows cost a third of `max_pool2d`.

    On a CPU it works strip by strip: its maps are the network's largest, and whole ones cost more time for
    fresh memory than for arithmetic. A strip recomputes two or three rows of its neighbours.
    """

    strip_size = 8192
    """Maximum number of outputs in a strip."""
    n_images_compiled = 4
    """Batch size that a compiled network assumes when it cuts strips."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.stem1, self.stem2a, self.stem2b = stem.stem1, stem.stem2a, stem.stem2b
        self.stem3, self.stem4 = stem.stem3, stem.stem4

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, O, H / 4, W / 4)."""
        n_rows, width = x.shape[-2] // 4, x.shape[-1] // 4
        is_whole = x.device.type != "cpu" or torch.compiler.is_exporting() or torch.jit.is_tracing()
        # A compiler may keep the batch size symbolic; strips that depend on it would take minutes to compile.
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


class FusedBlock(nn.Module):
    """Block that concatenates into reused memory and adds in place."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers, self.aggregation = block.layers, block.aggregation
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H, W)."""
        parts = [x]
        for layer in self.layers:
            parts.append(layer(parts[-1]))
        out = self.aggregation(concatenate(parts))
        return out.add_(x) if self.residual else out


def fuse_unit(unit: Unit) -> FusedConv:
    """Fold a unit into one convolution: s·relu(z) + t is s·z + t, limited by t (from above if s < 0)."""
    fused = FusedConv.fold(unit.conv, unit.bn)
    if unit.lab is not None:
        scale, shift = unit.lab.scale.item(), unit.lab.bias.item()
        fused.weight.mul_(scale)
        fused.bias.mul_(scale).add_(shift)
        if math.isfinite(shift):  # else the bias makes every output so, and oneDNN refuses such a limit
            fused.activation = Clamp(low=shift) if scale >= 0 else Clamp(high=shift)
    return fused


def _pad_right(x: Tensor, n_below: int) -> Tensor:
    """Append a column and `n_below` rows of zeros like `F.pad`, but channels-last in one pass over x."""
    batch, channels, height, width = x.shape
    out = x.new_empty((batch, height + n_below, width + 1, channels)).permute(0, 3, 1, 2)
    out[:, :, :height, :width] = x
    out[..., width:] = 0
    if n_below:
        out[:, :, height:] = 0
    return out
