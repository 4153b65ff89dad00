"""Gradient checkpointing runs blocks again in the backward: with ids, noise, mixtures of their own forward.

transformers keeps the checkpoint function at every block that it may checkpoint; it is wrapped there. What a
user checkpoints by hand is run again with the latest forward's: one forward, then its backward.
"""

from __future__ import annotations

__all__ = ["Checkpoints"]

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from thawline.tuners.mhr.state import TaskIds


class Checkpoints:
    """The blocks of a model that transformers may checkpoint, found at the first forward in training."""

    def __init__(self, shared: TaskIds) -> None:
        self.shared = shared
        self.blocks: list[nn.Module] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Checkpoints, (self.shared,)  # found again in the copy

    def carry(self, model: nn.Module) -> None:
        """Let every checkpoint of `model` carry the forward it belongs to into the backward."""
        if self.blocks is None:
            self.blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        for block in self.blocks:
            function = block.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, Carrying):
                block._gradient_checkpointing_func = Carrying(function, self.shared)

    @staticmethod
    def release(model: nn.Module) -> None:
        """Give the blocks their own checkpoint functions back."""
        for block in model.modules():
            function = block.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, Carrying):
                block._gradient_checkpointing_func = function.checkpoint


class Carrying:
    """A checkpoint function whose recomputation sees the forward that it recomputes."""

    def __init__(self, checkpoint: Callable[..., Any], shared: TaskIds) -> None:
        self.checkpoint, self.shared = checkpoint, shared

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        shared, forward = self.shared, self.shared.forward

        def resumed(*inputs: Any) -> Any:
            current, shared.forward = shared.forward, forward
            try:
                return function(*inputs)
            finally:
                shared.forward = current

        return self.checkpoint(resumed, *args, **kwargs)
