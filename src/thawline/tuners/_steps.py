"""Optimiser steps of this process, as far as tuners have to know of them; modules that got no gradient.

Fused optimisers, transformers' default, change a parameter without raising its version counter, and some
optimisers write `.data` or a copy. PyTorch calls one global hook after the step of every
`torch.optim.Optimizer`, through accelerate and GradScaler too; a step that GradScaler skips does not call it.
"""

from __future__ import annotations

__all__ = ["expect_gradients", "n_steps", "watch", "watched"]

import logging
from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

logger = logging.getLogger(__name__)

PATIENCE = 10
"""Steps of other optimisers after which a model's adapters are taken not to train."""

_watched: WeakSet[Any] = WeakSet()
_untested: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
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


def expect_gradients(model: nn.Module) -> None:
    """Warn, after the first step of an optimiser of its adapters, of adapted modules without a gradient."""
    _untested[model] = PATIENCE


def _has_gradient(parameter: Tensor) -> bool:
    """Return whether a gradient arrived, other than zeros, which mixing all skills at once sends to each."""
    grad = parameter.grad
    return grad is not None and (isinstance(grad, DTensor) or bool(grad.any()))


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _steps
    _steps += 1
    if not (_watched or _untested):
        return
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in watched():
        layer.after_step(moved)
    for model in list(_untested):
        _warn_without_gradient(model, moved)


def _warn_without_gradient(model: nn.Module, moved: Collection[int]) -> None:
    trained = {
        name: [parameter for parameter in module.parameters() if id(parameter) in moved]
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    trained = {name: parameters for name, parameters in trained.items() if parameters}
    _untested[model] -= 1
    if trained or _untested[model] == 0:
        del _untested[model]
    idle = [name for name, parameters in trained.items() if not any(map(_has_gradient, parameters))]
    if idle:
        logger.warning(
            "No gradient reached %d of %d adapted modules in the first step: %s%s. The model uses their "
            "weights without calling them, or no row of the batch reached them. Leave out those that never "
            "learn (exclude_modules).",
            len(idle), len(trained), ", ".join(f"'{name}'" for name in idle[:4]), ", …" if idle[4:] else "",
        )  # fmt: skip


register_optimizer_step_post_hook(_after_step)
