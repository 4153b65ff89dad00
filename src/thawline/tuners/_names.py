"""Names of modules in the plain base model, under PEFT's prefix and the wrappers of DDP and torch.compile."""

from __future__ import annotations

__all__ = ["PREFIX", "plain_name", "unwrapped"]

from torch import nn
from torch.nn.parallel import DistributedDataParallel

PREFIX = "base_model.model."
"""Prefix of the names in a `PeftModel`, and in the files that PEFT saves."""


def plain_name(path: str) -> str:
    """Return a module's name in the base model."""
    return path.removeprefix(PREFIX)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of DDP and torch.compile, which prefix the modules' names."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model
