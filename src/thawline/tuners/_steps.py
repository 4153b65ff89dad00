"""When optimisers step: the one place where tuners hear of it.

Fused optimisers, transformers' default, move a parameter without a sign on its version counter, and some
optimisers write `.data` or a copy. PyTorch calls one global hook after the step of every
`torch.optim.Optimizer`, through accelerate and GradScaler too; a step that GradScaler skips does not call it.
"""

from __future__ import annotations

__all__ = ["n_steps", "watch", "watched"]

from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Watched(Protocol):
    """What a layer must answer to be told of optimiser steps."""

    def after_step(self, moved: set[int]) -> None:
        """An optimiser stepped that holds the parameters with the ids in `moved`."""


_watched: WeakSet[Any] = WeakSet()
_steps = 0


def n_steps() -> int:
    """Steps taken so far by all optimisers of this process: what was kept before one may be stale."""
    return _steps


def watch(layer: Watched) -> None:
    """Tell `layer` of optimiser steps for as long as it lives."""
    _watched.add(layer)


def watched() -> Iterator[Any]:
    """Every layer that is told, in no order."""
    return iter(list(_watched))


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
