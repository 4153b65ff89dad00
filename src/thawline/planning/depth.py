"""Blocks that repeat: the cost of a deep model follows exactly from that of a shallow one.

Each further block keeps the same bytes, computes as much and has the same gradients. So a step is run with
two periods of a model's blocks and, to see what one of them adds, with one; the rest is multiplied. A period
is one block, or several where kinds of blocks alternate (Gemma 3: five of local attention, one of global).
"""

from __future__ import annotations

__all__ = ["Stack", "find_stacks"]

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

LONGEST_PERIOD = 8
FEWEST_PERIODS = 6
"""Shallower models are run as they are."""
NUMBERS = re.compile(r"(^|_)(idx|index|id|number|name)$")
"""Attributes in which equal blocks may differ: their place in the model."""


@dataclass(frozen=True)
class Stack:
    """A list of blocks that ends in equal periods."""

    blocks: nn.ModuleList
    period: int
    n_periods: int

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of a period."""
        last = nn.ModuleList(list(self.blocks)[-self.period :])
        return sum(p.nbytes for p in last.parameters() if p.requires_grad)

    @contextmanager
    def cut_to(self, n_periods: int) -> Iterator[None]:
        """Leave out the blocks beyond some periods, within the context."""
        whole: dict[str, Any] = self.blocks._modules
        kept = len(whole) - (self.n_periods - n_periods) * self.period
        self.blocks._modules = dict(list(whole.items())[:kept])
        try:
            yield
        finally:
            self.blocks._modules = whole


def find_stacks(model: nn.Module) -> list[Stack]:
    """Return the lists of blocks of a model that repeat several times; none of them lies in another."""
    found: list[Stack] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            stack = _as_stack(module)
            if stack is not None:
                found.append(stack)
                inside.update(module.modules())
    return found


def _as_stack(blocks: nn.ModuleList) -> Stack | None:
    kinds = [_kind(block) for block in blocks] if len(blocks) > FEWEST_PERIODS else []
    for period in range(1, min(LONGEST_PERIOD, len(kinds) // FEWEST_PERIODS) + 1):
        differing = (i for i in reversed(range(len(kinds) - period)) if kinds[i] != kinds[i + period])
        n_periods = (len(kinds) - 1 - next(differing, -1)) // period
        if n_periods >= FEWEST_PERIODS:
            return Stack(blocks, period, n_periods)
    return None


def _kind(block: nn.Module) -> list[Any]:
    """Return all that the cost of a block follows from: its modules, their settings and parameters."""
    kind: list[Any] = []
    for name, module in block.named_modules():
        settings = {k: v for k, v in vars(module).items() if _is_setting(v) and not NUMBERS.search(k)}
        own = module.named_parameters(recurse=False)
        kind.append((name, type(module), settings, [(k, p.shape, p.dtype, p.requires_grad) for k, p in own]))
    return kind


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
