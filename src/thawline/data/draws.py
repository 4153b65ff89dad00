"""Order of the data and random numbers of each sample, as pure functions of a seed.

A `Draw` names a sample: the epoch and the position in it. The image at that position and every random number
of its augmentation follow from the seed and the draw alone, so no random state has to be saved: a resumed
run, another number of workers, or a single sample inspected in a notebook all give the same pixels.
"""

from __future__ import annotations

__all__ = ["Draw", "EpochOrder", "EpochSampler", "coins", "rng_for"]

from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

# Purposes of a generator; the streams of one draw are independent of each other.
ORDER, LANE, SAMPLE, BATCH, CUSTOM = range(5)


class Draw(NamedTuple):
    """Sample at `position` of `epoch`, both counted from 0."""

    epoch: int
    position: int


class EpochSampler(Sampler[Draw]):
    """Sampler of the draws of one epoch, in order; `set_epoch` selects it, as with DistributedSampler.

    Args:
        n_draws: length of an epoch.
    """

    def __init__(self, n_draws: int) -> None:
        self.n_draws = n_draws
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_draws

    def __iter__(self) -> Iterator[Draw]:
        return map(Draw, repeat(self.epoch), range(self.n_draws))


def rng_for(seed: int, draw: Draw, stream: int = SAMPLE) -> np.random.Generator:
    """Return the random generator of one draw and purpose."""
    key = np.array([seed, draw.epoch << 32 | draw.position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


class EpochOrder:
    """Image at each position of an epoch, as a function of a seed.

    Args:
        seed: seeds every epoch.
        n_images: number of images.
        repeats: expected number of times that each image comes in an epoch, (n_images,). None: once.
    """

    def __init__(self, seed: int, n_images: int, repeats: np.ndarray | None = None) -> None:
        self.seed, self.n_images = seed, n_images
        self.n_draws = n_images if repeats is None else round(repeats.sum())
        # Scaled so that every epoch has the same number of draws.
        self._repeats = None if repeats is None else repeats * (self.n_draws / repeats.sum())

    def __len__(self) -> int:
        return self.n_draws

    def __call__(self, epoch: int) -> np.ndarray:
        """Return the images of an epoch in order, (len(self),) int64.

        An image that is expected x times comes ⌊x⌋ or ⌈x⌉ times: systematic sampling (Madow, 1949).
        """
        return _order_of(self, epoch)

    def draw(self, epoch: int) -> np.ndarray:
        """Compute the images of an epoch."""
        generator = rng_for(self.seed, Draw(epoch, 0), ORDER)
        images = generator.permutation(self.n_images)
        if self._repeats is None:
            return images
        ends = np.floor(np.cumsum(self._repeats[images]) + generator.random())
        ends[-1] = self.n_draws  # rounding of the sum aside
        return generator.permutation(np.repeat(images, np.diff(ends, prepend=0).astype(int)))


@lru_cache(maxsize=4)
def _order_of(order: EpochOrder, epoch: int) -> np.ndarray:
    return order.draw(epoch)


def coins(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """Return a number in [0, 1) for each position of an epoch, which depends on nothing else.

    A hash (SplitMix64, Steele et al., OOPSLA 2014), because a generator per position would be slow to make.
    """
    with np.errstate(over="ignore"):
        x = positions.astype(np.uint64) + np.uint64((epoch << 32) ^ (seed * 0x632BE59BD9B4E019 & (2**64 - 1)))
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)) * 2.0**-53
