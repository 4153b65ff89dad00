"""Batches of augmented images: MixUp or CopyBlend, then one of several sizes.

Both belong to DEIM's Dense O2O: more boxes per image, so that one-to-one matching learns from more of them.
A batch gets MixUp, else CopyBlend, or neither. Pixels stay uint8, channels last in memory, the fastest layout
for convolutions; `to_float` turns them into the network's input on its device.

Source: Huang et al., DEIM, CVPR 2025, and the recipe files of DEIMv2.
"""

from __future__ import annotations

__all__ = ["Collate", "build_loader", "multi_scale_sizes", "to_float"]

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from thawline.data.detection.augment import TrainingImages, TrainingSample
from thawline.data.detection.images import opencv
from thawline.data.draws import BATCH, EpochSampler, rng_for
from thawline.recipe.resolved import Augmentation

# Share of its own pixels that an image keeps in MixUp, and the image below in CopyBlend.
_BLEND = (0.45, 0.55)
_COPIES = 3
_MIN_COPY_AREA = 100.0
_COPY_BORDER = (0.1, 0.25)
_SIZE_STEP = 32
_SIZE_RANGE = 0.25


class Collate:
    """Collation of samples into a batch; what it draws follows from the first sample's draw.

    Args:
        settings: operations on batches, with their probabilities and epochs. `None`: none.
        seed: seeds everything random.
    """

    def __init__(self, settings: Augmentation | None = None, *, seed: int = 0) -> None:
        self.settings = settings or Augmentation()
        self.seed = seed
        repeat = self.settings.multi_scale_repeat
        self.sizes = () if repeat is None else multi_scale_sizes(self.settings.height_width, repeat)

    def __call__(self, samples: Sequence[TrainingSample]) -> dict[str, Any]:
        """Return a batch for the network.

        Returns: `pixel_values`, (B, 3, H, W) uint8, channels last in memory; `targets`, for each image
            `labels` (N,) int64 and `boxes` (N, 4) float32, cxcywh in 0–1.
        """
        settings, epoch = self.settings, samples[0].draw.epoch
        rng = rng_for(self.seed, samples[0].draw, BATCH)
        images = np.stack([sample.image for sample in samples])
        boxes = [sample.boxes_xyxy for sample in samples]
        labels = [sample.labels for sample in samples]
        mixes, copies = rng.random(2) < (settings.mixup_prob, settings.copyblend_prob)
        if mixes and settings.mixup_epochs.covers(epoch):
            images, boxes, labels = mix_up(images, boxes, labels, rng)
        elif copies and settings.copyblend_epochs.covers(epoch):
            boxes, labels = copy_blend(images, boxes, labels, rng)
        height, width = images.shape[1:3]
        scale = np.array([1 / width, 1 / height] * 2, np.float32)
        if self.sizes and settings.multi_scale_epochs.covers(epoch):
            size = self.sizes[rng.choice(len(self.sizes))]
            images = _resize_all(images, size, nearest=settings.published)
        return {
            "pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2),
            "targets": [_target(*of_image, scale) for of_image in zip(labels, boxes, strict=True)],
        }


def to_float(
    pixel_values: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Convert bytes to the network's input on their device: divide by 255 and, if given, normalise.

    Args:
        pixel_values: (B, 3, H, W) uint8, any memory format, which is kept.
        mean, std: of each channel in 0–1, or both `None`.
        dtype: of the result.
    """
    pixels = pixel_values.to(torch.float32)
    if mean is None or std is None:
        return pixels.mul_(1 / 255).to(dtype)
    # One multiplication and one addition: (x / 255 - mean) / std.
    factors = [1 / (255 * s) for s in std]
    offsets = [-m / s for m, s in zip(mean, std, strict=True)]
    table = torch.tensor([factors, offsets])
    if pixels.is_cuda:
        table = table.pin_memory().to(pixels.device, non_blocking=True)
    factor, offset = table[:, :, None, None]
    return pixels.mul_(factor).add_(offset).to(dtype)


def multi_scale_sizes(base_size: tuple[int, int], repeat: int) -> tuple[tuple[int, int], ...]:
    """Return the sizes a batch may get: multiples of 32 up to a quarter off `base_size`, and it repeatedly.

    The longer side takes every multiple, the shorter one the nearest to the same shape.

    Args:
        base_size: (height, width) of the image, pixels.
        repeat: how often `base_size` is in the list.
    """
    longer = max(base_size)
    low, high = (int(longer * (1 + share) / _SIZE_STEP) * _SIZE_STEP for share in (-_SIZE_RANGE, _SIZE_RANGE))
    sides = (*range(low, longer, _SIZE_STEP), *range(high, longer, -_SIZE_STEP))
    height, width = base_size

    def nearest(side: float) -> int:
        return max(1, round(side / _SIZE_STEP)) * _SIZE_STEP

    others = [(nearest(height * side / longer), nearest(width * side / longer)) for side in sides]
    n_smaller = sum(side < longer for side in sides)
    return (*others[:n_smaller], *[base_size] * repeat, *others[n_smaller:])


def mix_up(
    images: np.ndarray, boxes: list[np.ndarray], labels: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Blend each image with the one before it, the first with the last; the boxes of both count in full.

    Args:
        images: (B, H, W, 3) uint8.
        boxes: (N, 4) for each image.
        labels: (N,) for each image.
        rng: random numbers.
    """
    own = rng.uniform(*_BLEND)
    cv2, before = opencv(), np.roll(np.arange(len(images)), 1)
    mixed = np.stack([cv2.addWeighted(images[i], own, images[j], 1 - own, 0) for i, j in enumerate(before)])
    return (
        mixed,
        [np.concatenate([boxes[i], boxes[j]]) for i, j in enumerate(before)],
        [np.concatenate([labels[i], labels[j]]) for i, j in enumerate(before)],
    )


def copy_blend(
    images: np.ndarray, boxes: list[np.ndarray], labels: list[np.ndarray], rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Blend up to three of the batch's objects into each image, anywhere, in their own size.

    Writes to `images`. A copied object brings a border of its surroundings along, as far as both images
    allow. Objects below 100 pixels² are not copied. All are cut out first, so that none is a copy of a copy.

    Args: see `mix_up`.
    Returns: boxes and labels, each image's own followed by those of its copies.
    """
    size = np.array([images.shape[2], images.shape[1]])
    owner = np.repeat(np.arange(len(boxes)), [len(of_image) for of_image in boxes])
    edges = np.concatenate(boxes)
    # Whole pixels inside the image; the copy's box is exactly these.
    low = np.clip(np.floor(edges[:, :2]), 0, size).astype(int)
    high = np.clip(np.ceil(edges[:, 2:]), 0, size).astype(int)
    pool = np.flatnonzero(((edges[:, 2:] - edges[:, :2]).prod(1) >= _MIN_COPY_AREA) & (high > low).all(1))
    if not len(pool):
        return boxes, labels
    classes = np.concatenate(labels)
    below = rng.uniform(*_BLEND)
    pastes = []
    for i in range(len(images)):
        for k in rng.choice(pool, min(_COPIES, len(pool)), replace=False):
            extent = high[k] - low[k]
            to = rng.integers(size - extent + 1)
            border = (extent * rng.uniform(*_COPY_BORDER)).astype(int)
            before = np.minimum(border, np.minimum(low[k], to))
            after = np.minimum(border, size - np.maximum(high[k], to + extent))
            (x0, y0), (x1, y1) = low[k] - before, high[k] + after
            pastes.append((i, k, to, to - before, images[owner[k], y0:y1, x0:x1].copy()))
    cv2 = opencv()
    new_boxes, new_labels = [[of_image] for of_image in boxes], [[of_image] for of_image in labels]
    for i, k, to, (x, y), patch in pastes:
        place = images[i, y : y + patch.shape[0], x : x + patch.shape[1]]
        place[...] = cv2.addWeighted(place, below, patch, 1 - below, 0)
        new_boxes[i].append(np.concatenate([to, to + high[k] - low[k]])[None].astype(np.float32))
        new_labels[i].append(classes[k : k + 1])
    return [np.concatenate(parts) for parts in new_boxes], [np.concatenate(parts) for parts in new_labels]


def build_loader(
    images: TrainingImages,
    collate: Callable[[Sequence[TrainingSample]], Any],
    *,
    batch_size: int,
    sampler: EpochSampler | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Build a loader of training batches. Call its sampler's `set_epoch` before each epoch.

    The last, smaller batch of an epoch is dropped, unless it is the only one.

    Args:
        images: built with the same batch size.
        collate: a `Collate`, or a function around one.
        batch_size: images per device.
        sampler: sampler of draws; `None` makes one.
        workers: number of worker processes; 0 loads in this process.
        pin_memory: pin batches for asynchronous copies to a GPU.
    """
    sampler = sampler or images.sampler()
    if workers:
        # A forked worker that gives up this process' threads may wait for them for ever: there must be none.
        opencv().setNumThreads(1)
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate,
        drop_last=len(sampler) >= batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if workers else None,
        # Otherwise every start of the workers would draw from the run's random state.
        generator=torch.Generator(),
    )


def _one_thread(worker: int) -> None:
    """Keep OpenCV from starting a thread per core in each worker."""
    opencv().setNumThreads(1)


def _resize_all(images: np.ndarray, size: tuple[int, int], *, nearest: bool) -> np.ndarray:
    if size == images.shape[1:3]:
        return images
    cv2 = opencv()
    how = cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
    return np.stack([cv2.resize(image, size[::-1], interpolation=how) for image in images])


def _target(labels: np.ndarray, boxes: np.ndarray, scale: np.ndarray) -> dict[str, Tensor]:
    low, high = boxes[:, :2], boxes[:, 2:]
    cxcywh = np.concatenate([(low + high) / 2, high - low], axis=1) * scale
    return {"labels": torch.from_numpy(labels), "boxes": torch.from_numpy(cxcywh.astype(np.float32))}
