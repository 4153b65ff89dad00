"""Optimiser steps of this process, as far as tuners have to know of them.

Fused optimisers, transformers' default, change a parameter without raising its version counter, and some
optimisers write `.data` or a copy. PyTorch calls one global hook after the step of every
`torch.optim.Optimizer`, through accelerate and GradScaler too; a step that GradScaler skips does not call it.
"""

from __future__ import annotations

__all__ = ["n_steps", "watch", "watched"]

from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_watched: WeakSet[Any] = WeakSet()
_steps = 0


def n_steps() -> int:
    """Return the number of optimiser steps in this process. What was cached before one may be stale."""
    return _steps


def watch(layer: Any) -> None:
    """Call `layer.after_step(ids of the optimiser's parameters)` after every step, while the layer lives."""
    _watched.add(layer)


def watched() -> list[Any]:
    """Return the layers that are called after optimiser steps, in no particular order."""
    return list(_watched)


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _steps
    _steps += 1
    if not _watched:
        return
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in watched():
        layer.after_step(moved)


register_optimizer_step_post_hook(_after_step)
