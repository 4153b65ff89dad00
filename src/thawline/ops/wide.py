"""Values that keep float32 in a network of half precision."""

from __future__ import annotations

__all__ = ["WideBuffers", "to_wide"]

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


def to_wide(x: Tensor) -> Tensor:
    """Convert to at least float32, which boxes and losses need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WideBuffers(nn.Module):
    """Module whose buffers stay float32 when it is converted to bfloat16 or float16.

    For constants that places are computed from: 8 bits of mantissa would move a box by pixels.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, *args)
        for name, after in self._buffers.items():
            if after is not None and after.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = before[name].to(after.device)
        return self
