"""Convolutions for inference, with norm, bias and activation folded into one call.

In float32 on a CPU a `FusedConv` with a kernel of one pixel is a matrix product, and any other is one oneDNN
call with prepacked weights. Folding happens in float64 and costs one rounding.

Weights of matrix products lie in memory column by column (`by_columns`): the product takes as long, and the
columns that a domain changes (`thawline.domains.changes`) are copied whole.
"""

from __future__ import annotations

__all__ = ["Clamp", "FusedConv", "by_columns", "concatenate", "fold_norm", "linear_of", "onednn_serves"]

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.ops.cache import TensorCache


@dataclass(frozen=True)
class Clamp:
    """Activation that limits values to a range."""

    low: float = -math.inf
    high: float = math.inf


LONG_SUM, LARGE_MAP = 128, 2**19
"""Input channels from which, and values of the output up to which, a matrix product and a separate activation
are as fast as oneDNN's call, or several times as fast on the smallest maps (AMD EPYC, one thread)."""

FEW_ROWS = 8
"""Rows of a matrix below which a product takes up to twice as long with contiguous columns."""

FusedActivation = Literal["none", "relu", "silu", "gelu"] | Clamp


class FusedConv(nn.Module):
    """Convolution with bias and activation; the output is channels-last.

    Args:
        weight: (O, I / groups, k, k).        bias: (O,).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        activation: FusedActivation = "none",
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.padding, self.groups = stride, padding, groups
        self.activation = activation
        self.is_pointwise = tuple(weight.shape[2:]) == (1, 1) and (stride, padding, groups) == (1, 0, 1)
        self._packed = TensorCache(size=4)
        self.packed_for: tuple[int, ...] | None = None
        """Shape of the inputs that the weight is packed for; None: it is plain."""
        self._lay_out()

    @classmethod
    def fold(cls, conv: nn.Conv2d, norm: nn.BatchNorm2d, activation: FusedActivation = "none") -> FusedConv:
        """Fold a convolution and its norm in eval mode."""
        weight, bias = fold_norm(conv.weight, norm)
        return cls(
            weight,
            bias,
            stride=conv.stride[0],
            padding=int(conv.padding[0]),
            groups=conv.groups,
            activation=activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H', W')."""
        if not onednn_serves(x):
            weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
            x = F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)
            return self._activate(x)
        n_outputs = x.shape[0] * x.shape[2] * x.shape[3] * len(self.weight)
        is_product = self.is_pointwise and (x.shape[1] >= LONG_SUM or n_outputs <= LARGE_MAP)
        if is_product and self.packed_for is None:
            product = F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias)
            return self._activate(product).permute(0, 3, 1, 2)
        # oneDNN's own name, parameters and algorithm of the activation.
        if isinstance(self.activation, Clamp):
            name, limits, algorithm = "hardtanh", [self.activation.low, self.activation.high], None
        else:
            name, limits = "swish" if self.activation == "silu" else self.activation, []
            algorithm = "none" if name == "gelu" else None
        shape, weight = tuple(x.shape), self.weight
        if self.packed_for is None:
            key = (shape, weight.data_ptr(), weight._version)
            weight = self._packed.get(key, lambda: self.pack(shape))
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, *self._steps, self.groups, name, limits, algorithm
        )

    @property
    def _steps(self) -> tuple[list[int], ...]:
        return [self.padding] * 2, [self.stride] * 2, [1, 1]

    def pack(self, shape: tuple[int, ...]) -> Tensor:
        """Return the weight in oneDNN's layout for inputs of a shape, (B, I, H, W)."""
        return torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self._steps, self.groups, shape)

    def keep_packed(self) -> None:
        """Keep the weight in oneDNN's layout alone, if the last call has packed it.

        Inputs of other shapes are served too. The module can then neither be moved nor cast.
        """
        if len(self._packed):
            self.packed_for, *_ = self._packed.last_key
            self.weight = nn.Parameter(self.pack(self.packed_for), requires_grad=False)
            self._packed.clear()

    def _activate(self, x: Tensor) -> Tensor:
        """Apply the activation, in place where torch can."""
        if isinstance(self.activation, Clamp):
            return x.clamp_(self.activation.low, self.activation.high)
        if self.activation == "none":
            return x
        return F.gelu(x) if self.activation == "gelu" else getattr(F, self.activation)(x, inplace=True)

    def _lay_out(self) -> None:
        weight = self.weight.data
        if self.is_pointwise and weight.device.type == "cpu":
            self.weight.data = by_columns(weight.flatten(1))[:, :, None, None]
        else:
            self.weight.data = weight.contiguous(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        """Shape and activation."""
        out, into, kernel, _ = self.weight.shape
        return f"{into * self.groups}, {out}, {kernel}×{kernel}, stride={self.stride}, {self.activation}"

    def _apply(self, *args: Any, **kwargs: Any) -> FusedConv:
        if self.packed_for is not None:
            raise RuntimeError(
                "The network shares its kernels with domains, in the layout of this processor: it cannot be "
                "moved or cast. Load it again, on the device that it is for."
            )
        super()._apply(*args, **kwargs)
        self._packed.clear()
        self._lay_out()
        return self


def fold_norm(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer without bias and its batch norm in eval mode, folded.

    Args:
        weight: (O, ...), of a convolution or a linear layer.
    """
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a frozen linear layer with these values, (O, I) and (O,)."""
    linear = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(by_columns(weight.detach()), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def by_columns(weight: Tensor) -> Tensor:
    """Return a matrix (O, I) with each column contiguous in memory; one of few rows stays row by row."""
    return weight.contiguous() if len(weight) < FEW_ROWS else weight.t().contiguous().t()


_workspace = threading.local()


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate maps (B, C_i, H, W) along channels; the result is valid until the next call.

    On a CPU the result lies in a buffer of this thread, as large as its largest concatenation so far: fresh
    memory from the system costs several times the copy.
    """
    first = parts[0]
    if not onednn_serves(first):
        return torch.cat(list(parts), dim=1)
    batch, _, height, width = first.shape
    channels = sum(part.shape[1] for part in parts)
    size = batch * height * width * channels
    buffer = getattr(_workspace, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = _workspace.buffer = torch.empty(size)
    out = buffer[:size].view(batch, height, width, channels)
    torch.cat([part.permute(0, 2, 3, 1) for part in parts], dim=-1, out=out)
    return out.permute(0, 3, 1, 2)


def onednn_serves(x: Tensor) -> bool:
    """Return True where oneDNN's fused call can be used: eager float32 on a CPU, without gradient."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
