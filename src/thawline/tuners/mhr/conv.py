"""`MHRConv2d`: MHR on a 1 × 1 convolution, which is a linear layer on the channels of every pixel.

The paper has linear layers alone; this is the same arithmetic on maps. In channels-last memory the pixels are
rows without a copy.
"""

from __future__ import annotations

__all__ = ["MHRConv2d", "is_pointwise"]

from typing import Any

from torch import Tensor, nn

from thawline.tuners.mhr.layer import MHRLinear


class MHRConv2d(MHRLinear):
    """A 1 × 1 convolution that adds each task's mixture of skills to its frozen output."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output, (B, O, H, W), plus the update of the task of each image.

        Raises: RoutingError: if the model has task ids for other images than these, or none.
        """
        names = self._names_to_add()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        down, right = self.get_base_layer().stride
        pixels = x[:, :, ::down, ::right].permute(0, 2, 3, 1)
        y = self._add_prepared(pixels)
        if y is None:
            frozen = self.frozen_base()
            y = self.base_layer(x).permute(0, 2, 3, 1) if frozen is None else frozen
            for name in names:
                y = self._add(name, pixels, y)
        assert isinstance(y, Tensor)
        return y.permute(0, 3, 1, 2)

    def low_rank_factors(self, adapter_name: str, task: str | int | None = None) -> tuple[Tensor, Tensor]:
        """Return one task's mixture as weights of PEFT's LoRA: A (r, I, 1, 1) and B (O, r, 1, 1)."""
        A, B = super().low_rank_factors(adapter_name, task)
        return A[:, :, None, None], B[:, :, None, None]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the change of the base's weight for the one task of the current ids, (O, I, 1, 1)."""
        return super().get_delta_weight(adapter)[:, :, None, None]


def is_pointwise(module: nn.Module) -> bool:
    """Return True for a convolution that mixes the channels of each pixel and nothing else."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "same", "valid")
    )
