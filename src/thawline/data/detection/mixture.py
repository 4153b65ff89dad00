"""Training images of several datasets: every batch comes from one of them.

Each dataset keeps its own order of images, its own Mosaics and its own random numbers, so nothing is ever
mixed across datasets. An epoch has a fixed number of batches of each, shuffled by the seed: a function of the
epoch alone, as everything else (`thawline.data.draws`).
"""

from __future__ import annotations

__all__ = ["MixedImages", "batches_by_dataset"]

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from torch.utils.data import Dataset

from thawline.data.detection.augment import TrainingImages, TrainingSample
from thawline.data.draws import ORDER, Draw, EpochSampler, rng_for
from thawline.data.text.multitask import mixture_weights


def batches_by_dataset(
    n_images: Sequence[float], batch_size: int, sampling: str, temperature: float = 1.0
) -> list[int]:
    """Return the number of batches of each dataset in an epoch, at least one.

    Args:
        n_images: images that each dataset has to show in an epoch.
        sampling, temperature: share of each in an epoch of the same length (`mixture_weights`); each and
            repeat: as many batches as its images fill.
    """
    own = [max(1, round(n / batch_size)) for n in n_images]
    if sampling in ("each", "repeat"):
        return own
    weights = mixture_weights([round(n) for n in n_images], sampling, temperature=temperature)
    return [max(1, round(share)) for share in weights * sum(own)]


class MixedImages(Dataset[TrainingSample]):
    """Augmented images of several datasets by draw, a whole batch from each.

    Args:
        parts: images of each dataset, whose epochs are whole batches.
        batch_size: the loader's, per device.
        seed: seeds the order of the batches.
    """

    def __init__(self, parts: Sequence[TrainingImages], *, batch_size: int, seed: int = 0) -> None:
        self.parts, self.batch_size, self.seed = tuple(parts), batch_size, seed
        self.n_batches = [len(part.order) // batch_size for part in parts]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def sampler(self) -> EpochSampler:
        """Return the sampler of an epoch's draws, for a loader."""
        return EpochSampler(self.batch_size * sum(self.n_batches))

    def __getitem__(self, draw: Draw) -> TrainingSample:
        """Return the augmented image of a draw, with the number of its dataset."""
        batch, place = divmod(draw.position, self.batch_size)
        number, own = _batches(self.seed, tuple(self.n_batches), draw.epoch)[batch].tolist()
        sample = self.parts[number][Draw(draw.epoch, own * self.batch_size + place)]
        return replace(sample, draw=draw, dataset=number)


@lru_cache(maxsize=4)
def _batches(seed: int, n_batches: tuple[int, ...], epoch: int) -> np.ndarray:
    """Return dataset and number within it of every batch of an epoch, (batches, 2) int64."""
    datasets = np.repeat(np.arange(len(n_batches)), n_batches)
    own = np.concatenate([np.arange(n) for n in n_batches])
    order = rng_for(seed, Draw(epoch, 0), ORDER).permutation(len(own))
    # The batches of a dataset come in its own order, so that its Mosaics find recent images in memory.
    datasets, places = datasets[order], np.argsort(np.argsort(datasets[order], kind="stable"))
    return np.stack([datasets, own[places]], axis=1)
