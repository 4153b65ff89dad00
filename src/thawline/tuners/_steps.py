"""How many optimiser steps this process has taken: what is kept from before one may be stale.

Fused optimisers, transformers' default, move a parameter without a sign on its version counter. PyTorch calls
one global hook after the step of every `torch.optim.Optimizer`.
"""

from __future__ import annotations

__all__ = ["n_steps"]

from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def n_steps() -> int:
    """Steps taken so far by all optimisers."""
    return _steps


def _count(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)
