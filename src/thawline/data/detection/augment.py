"""From images to training pictures: the strong augmentation of DEIM's Dense O2O, gated by epoch.

    Draw ──► image ──┬── with three others, a Mosaic ──┬── colour ── flip ── resize ──► TrainingSample
                     └── zoom-out ── IoU crop ─────────┘

The epochs of `strong` have all of it; Mosaic, which takes the place of zoom-out and crop, only those of
`mosaic` and with its probability. In other epochs there is flip and resize. Boxes that get too small go.
All of it runs in OpenCV on uint8; normalisation belongs on the device (`thawline.data.detection.collate`).

Source: Huang et al., DEIM, CVPR 2025, and the recipe files of DEIMv2. `area` is that of the box in the
finished picture; the published code keeps the original's, also where boxes before it were dropped.
"""

from __future__ import annotations

__all__ = ["AugmentPolicy", "TrainingImages", "TrainingSample"]

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from thawline.data.detection.dataset import DetectionDataset, Sample
from thawline.data.detection.geometry import View, large_enough
from thawline.data.detection.mosaic import Lanes, Tile, TileCache, compose
from thawline.data.detection.photometric import Colour
from thawline.data.draws import Draw, EpochSampler, chance, epoch_order
from thawline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AugmentPolicy:
    """What happens to an image, how often, and when: (start, stop) is the epochs start … stop - 1."""

    size: int
    """Side of the square picture, pixels."""
    strong: tuple[int, int] = (0, 0)
    """Epochs with changed colours, zoom-out and IoU crop, or Mosaic."""
    mosaic: tuple[int, int] = (0, 0)
    """Epochs with Mosaic, inside `strong`."""
    mosaic_prob: float = 0.5
    """In those epochs; the other images have zoom-out and crop."""
    mosaic_size: int | None = None
    """Short side of a tile, pixels. `None`: half of `size`."""
    colour_prob: float = 0.5
    """Of each change of colour on its own."""
    zoom_out_prob: float = 0.5
    max_zoom_out: float = 4.0
    """Largest side of the zoomed-out view over the image's."""
    crop_prob: float = 0.8
    flip_prob: float = 0.5
    """Left-right."""
    vertical_flip_prob: float = 0.0
    """Upside down: for pictures without an up, such as those from the air or the microscope."""
    min_box_size: float = 1.0
    """Boxes with a shorter side are dropped: in the image's pixels after cropping, and in the picture's."""
    merged_mosaic: bool = False
    """One bilinear warp per Mosaic tile instead of the published steps."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name.endswith("_prob")):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"`{name}={getattr(self, name)}`: expected a probability, 0 to 1.")
        for name in ("size", "max_zoom_out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}={getattr(self, name)}`: expected 1 or more.")
        if self.mosaic[0] < self.mosaic[1] and not (
            self.strong[0] <= self.mosaic[0] and self.mosaic[1] <= self.strong[1]
        ):
            raise ConfigError(f"`mosaic={self.mosaic}`: expected a window inside `strong={self.strong}`.")

    def is_strong(self, epoch: int) -> bool:
        """Whether this epoch has more than flips."""
        return self.strong[0] <= epoch < self.strong[1]

    def has_mosaic(self, epoch: int) -> bool:
        """Whether some images of this epoch become a Mosaic."""
        return self.mosaic[0] <= epoch < self.mosaic[1]


@dataclass(kw_only=True)
class TrainingSample(Sample):
    """A finished picture of the policy's size, its boxes in its pixels."""

    draw: Draw


class TrainingImages(Dataset[TrainingSample]):
    """Augmented images by draw; any draw, in any order and any process, gives the same pixels.

    Args:
        images: the images as they are, without crowds.
        policy: what happens to them.
        seed: of everything random.
        batch_size: of the loader, per device. With `n_lanes` it decides who is whose partner in a Mosaic.
        n_lanes: a multiple of the worker processes over all devices, if possible.
    """

    def __init__(
        self,
        images: DetectionDataset,
        policy: AugmentPolicy,
        *,
        seed: int = 0,
        batch_size: int = 1,
        n_lanes: int = 8,
    ) -> None:
        if images.keep_crowd:
            raise ConfigError(
                "`keep_crowd=True` is for evaluation: a crowd is no object to learn. Leave it out."
            )
        self.images = images
        self.policy = policy
        self.seed = seed
        self.lanes = Lanes(seed=seed, n_images=len(images), batch_size=batch_size, n_lanes=n_lanes)
        self._cache: TileCache | None = None

    def __len__(self) -> int:
        return len(self.images)

    def sampler(self) -> EpochSampler:
        """The draws of an epoch, for a loader."""
        return EpochSampler(len(self))

    def __getitem__(self, draw: Draw) -> TrainingSample:
        """The picture of a draw.

        Raises: ConfigError: for an index in place of a draw; give the loader `sampler()`.
        """
        if not isinstance(draw, Draw):
            raise ConfigError(
                f"Expected a Draw(epoch, position), got {draw!r}. Give the loader `sampler=data.sampler()`."
            )
        policy, epoch = self.policy, draw.epoch
        rng = chance(self.seed, draw)
        sample = self.images.sample(int(epoch_order(self.seed, epoch, len(self))[draw.position]))
        view = replace(
            View.of(sample.image),
            mirrored=bool(rng.random() < policy.flip_prob),
            upended=bool(rng.random() < policy.vertical_flip_prob),
        )
        colour = Colour.draw(rng, policy.colour_prob) if policy.is_strong(epoch) else Colour()
        mosaic_prob = policy.mosaic_prob if policy.has_mosaic(epoch) else 0.0
        if self.lanes.is_mosaic(draw, mosaic_prob):
            sample = self._mosaic(sample, draw, view, colour, rng)
        else:
            sample = self._single(sample, draw, view, colour, rng)
        return self._finish(sample, draw)

    def _single(
        self, sample: Sample, draw: Draw, view: View, colour: Colour, rng: np.random.Generator
    ) -> Sample:
        """One image: looked at from further off or more closely, its colours changed."""
        policy = self.policy
        keep = np.ones(len(sample.labels), bool)
        boxes = sample.boxes_xyxy
        if policy.is_strong(draw.epoch):
            if rng.random() < policy.zoom_out_prob:
                view = view.zoom_out(rng, policy.max_zoom_out)
            if rng.random() < policy.crop_prob:
                cropped = view.crop(rng, boxes)
                if cropped != view:
                    view, keep = cropped, cropped.holds_centre(boxes)
                    boxes = view.clip(boxes)
        keep &= large_enough(boxes, policy.min_box_size)
        picture, moved = self.paint(sample.image, boxes[keep], view, colour)
        return replace(sample, image=picture, boxes_xyxy=moved, labels=sample.labels[keep])

    def _mosaic(
        self, sample: Sample, draw: Draw, view: View, colour: Colour, rng: np.random.Generator
    ) -> Sample:
        """The image and three partners."""
        policy, cache = self.policy, self._tiles()
        own = self._tile(sample)
        cache.put(sample.index, own)
        partners = self.lanes.partners(draw, policy.mosaic_prob, rng)
        tiles = [own, *(cache[index] for index in partners)]
        picture, boxes, labels = self.paint_mosaic(tiles, rng, view, colour)
        return replace(sample, image=picture, boxes_xyxy=boxes, labels=labels)

    def paint(
        self, image: np.ndarray, boxes: np.ndarray, view: View, colour: Colour
    ) -> tuple[np.ndarray, np.ndarray]:
        """The picture of a view, and its boxes; `boxes` are in pixels of the image."""
        return view.render(image, boxes, self.policy.size, lambda pixels: colour.apply(pixels, image))

    def paint_mosaic(
        self, tiles: Sequence[Tile], rng: np.random.Generator, view: View, colour: Colour
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The picture of four tiles, its boxes and their labels; of the view only the mirroring counts."""
        size, smallest = self.policy.size, self.policy.min_box_size
        merged = self.policy.merged_mosaic
        picture, boxes, labels = compose(tiles, rng, view, size, smallest, merged=merged)
        return colour.apply(picture), boxes, labels

    def _finish(self, sample: Sample, draw: Draw) -> TrainingSample:
        """Boxes that are too small go, areas are those of the boxes."""
        keep = large_enough(sample.boxes_xyxy, self.policy.min_box_size)
        boxes = sample.boxes_xyxy[keep]
        return TrainingSample(
            image=sample.image,
            boxes_xyxy=boxes,
            labels=sample.labels[keep],
            area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
            iscrowd=np.zeros(len(boxes), bool),
            index=sample.index,
            orig_size=sample.orig_size,
            draw=draw,
        )

    def _tile(self, sample: Sample) -> Tile:
        side = self.policy.mosaic_size or self.policy.size // 2
        return Tile.of(sample.image, sample.boxes_xyxy, sample.labels, side)

    def _tiles(self) -> TileCache:
        """This process's tiles; made here so that each worker has its own, with room for the lanes it
        serves."""
        if self._cache is None:
            worker = get_worker_info()
            lanes = -(-self.lanes.n_lanes // worker.num_workers) if worker else self.lanes.n_lanes
            self._cache = TileCache(
                lambda index: self._tile(self.images.sample(index)), (self.lanes.history + 4) * lanes
            )
        return self._cache
