"""Training images by draw: the strong augmentation of DEIM's Dense O2O, gated by epoch.

    Draw ──► image ──┬── with three others, a Mosaic ──┬── colour ── flip ── resize ──► TrainingSample
                     └── zoom-out ── IoU crop ─────────┘

An augmentation of one's own (`thawline.data.detection.custom`) comes last.

The epochs of `strong_epochs` have all of it; Mosaic, which replaces zoom-out and crop, only those of
`mosaic_epochs`, with its probability. Other epochs have flip and resize. Boxes that get too small are
dropped. All of it runs in OpenCV on uint8; normalisation belongs on the device
(`thawline.data.detection.collate`).

Source: Huang et al., DEIM, CVPR 2025, and the recipe files of DEIMv2. `area` is that of the box in the
augmented image; the published code keeps the original's, also where boxes before it were dropped.
"""

from __future__ import annotations

__all__ = ["TrainingImages", "TrainingSample"]

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from thawline.data.detection.custom import CustomAugmentation
from thawline.data.detection.dataset import DetectionDataset, Sample
from thawline.data.detection.geometry import View, large_enough
from thawline.data.detection.mosaic import Lanes, Tile, TileCache, compose
from thawline.data.detection.photometric import Colour
from thawline.data.draws import CUSTOM, Draw, EpochOrder, EpochSampler, rng_for
from thawline.errors import ConfigError
from thawline.recipe.resolved import Augmentation


@dataclass(kw_only=True)
class TrainingSample(Sample):
    """An augmented image of the settings' size, with boxes in its pixels."""

    draw: Draw
    dataset: int = 0
    """Number of its dataset, where a run has several."""


class TrainingImages(Dataset[TrainingSample]):
    """Augmented images by draw; any draw, in any order and any process, gives the same pixels.

    Args:
        images: the images as they are, without crowds.
        settings: operations, with their probabilities and epochs.
        seed: seeds everything random.
        batch_size: the loader's, per device. With `n_lanes` it decides which images share a Mosaic.
        n_lanes: a multiple of the worker processes over all devices, if possible.
        repeats: expected number of times that each image comes in an epoch, (len(images),). None: once.
        custom: an augmentation of one's own, applied last (`thawline.data.detection.custom`).
    """

    def __init__(
        self,
        images: DetectionDataset,
        settings: Augmentation,
        *,
        seed: int = 0,
        batch_size: int = 1,
        n_lanes: int = 8,
        repeats: np.ndarray | None = None,
        custom: CustomAugmentation | None = None,
    ) -> None:
        if images.keep_crowd:
            raise ConfigError(
                "`keep_crowd=True` is for evaluation: a crowd is no object to learn. Leave it out."
            )
        self.images = images
        self.settings = settings
        self.custom = custom
        self.order = EpochOrder(seed, len(images), repeats)
        self.lanes = Lanes(order=self.order, batch_size=batch_size, n_lanes=n_lanes)
        self._cache: TileCache | None = None

    def __len__(self) -> int:
        return len(self.images)

    def sampler(self) -> EpochSampler:
        """Return the sampler of an epoch's draws, for a loader."""
        return EpochSampler(len(self.order))

    def __getitem__(self, draw: Draw) -> TrainingSample:
        """Return the augmented image of a draw.

        Raises: ConfigError: for an index in place of a draw; give the loader `sampler()`.
        """
        if not isinstance(draw, Draw):
            raise ConfigError(
                f"Expected a Draw(epoch, position), got {draw!r}. Give the loader `sampler=data.sampler()`."
            )
        settings, epoch = self.settings, draw.epoch
        rng = rng_for(self.order.seed, draw)
        sample = self.images.sample(int(self.order(epoch)[draw.position]))
        view = replace(
            View.of(sample.image),
            hflip=bool(rng.random() < settings.flip_prob),
            vflip=bool(rng.random() < settings.vertical_flip_prob),
        )
        is_strong = settings.strong_epochs.covers(epoch)
        colour = Colour.draw(rng, settings.colour_prob) if is_strong else Colour()
        has_mosaic = settings.mosaic_epochs.covers(epoch)
        if has_mosaic and self.lanes.is_mosaic(draw, settings.mosaic_prob):
            tiles = self._mosaic_tiles(sample, draw, rng)
            image, boxes, labels = self.paint_mosaic(tiles, rng, view, colour)
        else:
            boxes, labels = sample.boxes_xyxy, sample.labels
            if is_strong:
                view, boxes, labels = self._zoom_and_crop(rng, view, boxes, labels)
            keep = large_enough(boxes, settings.min_box_size)
            image, boxes = self.paint(sample.image, boxes[keep], view, colour)
            labels = labels[keep]
        done = TrainingSample(
            image=image,
            boxes_xyxy=boxes,
            labels=labels,
            area=_areas(boxes),
            iscrowd=np.zeros(len(boxes), bool),
            index=sample.index,
            orig_size=sample.orig_size,
            draw=draw,
        )
        if self.custom is not None:
            done = self.custom(done, rng_for(self.order.seed, draw, CUSTOM))
        keep = large_enough(done.boxes_xyxy, settings.min_box_size)
        boxes = done.boxes_xyxy[keep]
        return replace(
            done,
            boxes_xyxy=boxes,
            labels=done.labels[keep],
            area=_areas(boxes),
            iscrowd=np.zeros(len(boxes), bool),
        )

    def paint(
        self, image: np.ndarray, boxes: np.ndarray, view: View, colour: Colour
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels of a view and its boxes; `boxes` are in pixels of the original image."""
        return view.render(
            image, boxes, self.settings.height_width, lambda pixels: colour.apply(pixels, image)
        )

    def paint_mosaic(
        self, tiles: Sequence[Tile], rng: np.random.Generator, view: View, colour: Colour
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pixels of four tiles, the boxes and their labels; of the view only the flips count."""
        settings = self.settings
        image, boxes, labels = compose(
            tiles, rng, view, settings.height_width, settings.min_box_size, merged=settings.merged_mosaic
        )
        return colour.apply(image), boxes, labels

    def _zoom_and_crop(
        self, rng: np.random.Generator, view: View, boxes: np.ndarray, labels: np.ndarray
    ) -> tuple[View, np.ndarray, np.ndarray]:
        """Zoom out and crop with their probabilities; a crop keeps the boxes whose centre it holds."""
        settings = self.settings
        if rng.random() < settings.zoom_out_prob:
            view = view.zoom_out(rng, settings.max_zoom_out)
        if rng.random() < settings.crop_prob:
            cropped = view.crop(rng, boxes)
            if cropped != view:
                view, keep = cropped, cropped.holds_centre(boxes)
                boxes, labels = view.clip(boxes[keep]), labels[keep]
        return view, boxes, labels

    def _mosaic_tiles(self, sample: Sample, draw: Draw, rng: np.random.Generator) -> list[Tile]:
        """Return the tiles of the image and of three partners."""
        if self._cache is None:
            # Made here so that each worker process has its own, with room for the lanes it serves.
            worker, lanes = get_worker_info(), self.lanes
            served = -(-lanes.n_lanes // worker.num_workers) if worker else lanes.n_lanes
            self._cache = TileCache(
                lambda index: self._tile(self.images.sample(index)), (lanes.history + 4) * served
            )
        own = self._tile(sample)
        self._cache.put(sample.index, own)
        partners = self.lanes.partners(draw, self.settings.mosaic_prob, rng)
        return [own, *(self._cache[index] for index in partners)]

    def _tile(self, sample: Sample) -> Tile:
        return Tile.of(sample.image, sample.boxes_xyxy, sample.labels, self.settings.tile_size)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
