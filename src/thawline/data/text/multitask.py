"""Mixtures of tasks: the order in which tasks and their rows are drawn, as a pure function of a seed.

    sizes of the tasks ── mixture_weights ──► weight of each ── TaskSampler ──► rows, epoch by epoch

The order depends only on seed and epoch, so no random state has to be saved: a run resumed in the middle of
an epoch draws the same rows (compare data/draws.py).

Weights: n_t^(1/T) over its sum, with n_t the rows of task t, at most the cap. T = 1 is proportional to size,
T → ∞ uniform; the cap is T5's artificial limit on a task's size (Raffel et al. 2020, 3.5.2).
"""

from __future__ import annotations

__all__ = ["SAMPLING", "TaskSampler", "mixture_weights"]

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from thawline.data.draws import ORDER, Draw, rng_for
from thawline.errors import ConfigError, did_you_mean

SAMPLING = ("each", "size", "temperature", "equal")
"""Ways of sampling tasks; `thawline list sampling` explains them."""


def mixture_weights(
    sizes: Sequence[int], sampling: str, *, temperature: float = 1.0, cap: int | None = None
) -> np.ndarray:
    """Return the weight of each task in a mixture, (K,) float64, summing to 1.

    Args:
        sizes: number of rows of each task.
        sampling: one of SAMPLING; `each` is `size` in expectation.
        temperature: for `temperature`: 1 equals `size`, large values approach `equal`.
        cap: maximum size with which a task counts.
    """
    if sampling not in SAMPLING:
        raise ConfigError(f"Unknown sampling '{sampling}'. {did_you_mean(sampling, SAMPLING)}")
    counted = np.minimum(np.asarray(sizes, dtype=np.float64), np.inf if cap is None else cap)
    power = {"temperature": 1 / temperature, "equal": 0.0}.get(sampling, 1.0)
    # Divided by the largest first: a small temperature would overflow.
    weights = (counted / counted.max()) ** power
    return weights / weights.sum()


class TaskSampler(Sampler[int]):
    """Sample row numbers of a mixture, epoch by epoch; `set_epoch` selects one, as with DistributedSampler.

    Tasks are drawn independently, by their weight; the rows of a task are shuffled and all used before one is
    used again. An epoch has as many rows as the data, with a capped task counting up to its cap.

    Args:
        tasks: task number of every row, (N,).
        sampling, temperature, cap: see `mixture_weights`.
        seed: seed of every draw.
        same_task: number of consecutive rows of one task: the batch size, where batches are of one task.
    """

    def __init__(
        self,
        tasks: Sequence[int],
        sampling: str,
        *,
        temperature: float = 1.0,
        cap: int | None = None,
        seed: int = 0,
        same_task: int = 1,
    ) -> None:
        self.rows = [np.flatnonzero(np.asarray(tasks) == task) for task in range(max(tasks) + 1)]
        sizes = [len(rows) for rows in self.rows]
        self.weights = mixture_weights(sizes, sampling, temperature=temperature, cap=cap)
        self.n_rows = sum(size if cap is None else min(size, cap) for size in sizes)
        self.seed, self.same_task = seed, same_task
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch that the next iteration draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw(self.epoch).tolist())

    def draw(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in order, (len(self),) int64."""
        generator = rng_for(self.seed, Draw(epoch, 0), ORDER)
        n_draws = -(-self.n_rows // self.same_task)
        drawn = generator.choice(len(self.rows), size=n_draws, p=self.weights)
        tasks = np.repeat(drawn, self.same_task)[: self.n_rows]
        order = np.empty(self.n_rows, dtype=np.int64)
        for task, rows in enumerate(self.rows):
            places = np.flatnonzero(tasks == task)
            n_passes = -(-len(places) // max(len(rows), 1))
            passes = [generator.permutation(rows) for _ in range(n_passes)]
            if passes:
                order[places] = np.concatenate(passes)[: len(places)]
        return order
