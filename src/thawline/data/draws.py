"""Order of the data and random numbers of each sample, as pure functions of a seed.

A `Draw` names a sample: the epoch and the position in it. The image at that position and every random number
of its augmentation follow from the seed and the draw alone, so no random state has to be saved: a resumed
run, another number of workers, or a single sample inspected in a notebook all give the same pixels.
"""

from __future__ import annotations

__all__ = ["Draw", "EpochSampler", "coins", "epoch_order", "rng_for"]

from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

# Purposes of a generator; the streams of one draw are independent of each other.
ORDER, LANE, SAMPLE, BATCH = range(4)


class Draw(NamedTuple):
    """Sample at `position` of `epoch`, both counted from 0."""

    epoch: int
    position: int


class EpochSampler(Sampler[Draw]):
    """Sampler of the draws of one epoch, in order; `set_epoch` selects it, as with DistributedSampler.

    Args:
        n_images: length of an epoch.
    """

    def __init__(self, n_images: int) -> None:
        self.n_images = n_images
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_images

    def __iter__(self) -> Iterator[Draw]:
        return map(Draw, repeat(self.epoch), range(self.n_images))


def rng_for(seed: int, draw: Draw, stream: int = SAMPLE) -> np.random.Generator:
    """Return the random generator of one draw and purpose."""
    key = np.array([seed, draw.epoch << 32 | draw.position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n_images: int) -> np.ndarray:
    """Return the image at each position of an epoch: a permutation, (n_images,) int64."""
    return rng_for(seed, Draw(epoch, 0), ORDER).permutation(n_images)


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
