"""Intervals for means and ratios over runs that come in groups: tasks within seeds, seeds within tasks."""

from __future__ import annotations

__all__ = ["interval"]

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def interval(
    groups: Sequence[Sequence[Value]],
    statistic: Callable[[list[Value]], float],
    n_draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of a statistic: groups are drawn with replacement, then values within each.

    Give pairs as values for a paired comparison, e.g. of (a, b) the ratio of sums.

    Returns: the 2.5 % and the 97.5 % quantile.
    """
    rng = random.Random(seed)
    found = []
    for _ in range(n_draws):
        drawn = rng.choices(groups, k=len(groups))
        found.append(statistic([value for group in drawn for value in rng.choices(group, k=len(group))]))
    found.sort()
    return found[int(0.025 * n_draws)], found[int(0.975 * n_draws)]
