"""The datasets of a detection run: images to train on and to judge by, their classes, their batches."""

from __future__ import annotations

__all__ = ["RunDataset", "build_images", "check_boxes", "count_batches", "read_dataset"]

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.custom import CustomAugmentation, load_augmentation
from thawline.data.detection.dataset import DetectionDataset, check_usable, read_detection
from thawline.data.detection.mixture import MixedImages, batches_by_dataset
from thawline.data.detection.records import ImageRecord, n_learnable
from thawline.data.detection.sampling import class_repeats, image_repeats
from thawline.errors import DataError
from thawline.recipe import DetectionData
from thawline.recipe.resolved import TrainingSettings
from thawline.training.detection.evaluation import n_devices
from thawline.training.detection.split import evaluated_split, join_classes, split_images
from thawline.training.objective import ReadRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunDataset:
    """One dataset of a run."""

    name: str = ""
    """Name of its folder, where a run has several."""
    class_names: tuple[str, ...] = ()
    records: Sequence[ImageRecord] = ()
    """Images to train on."""
    held_out: Sequence[ImageRecord] = ()
    """Images to judge by."""
    class_ids: Mapping[str, int | str] = field(default_factory=dict)
    """Id of each class in the files that were read."""
    rare_below: float | None = None
    """Share of the images below which a class is rare (`data.sampling: repeat`). None: none is."""

    @cached_property
    def class_repeats(self) -> np.ndarray | None:
        """Repeat factor of each class. None: every image comes once an epoch."""
        if self.rare_below is None:
            return None
        return class_repeats(self.records, len(self.class_names), self.rare_below)

    @cached_property
    def image_repeats(self) -> np.ndarray:
        """Number of times that each image comes in an epoch, on average."""
        factors = self.class_repeats
        return np.ones(len(self.records)) if factors is None else image_repeats(self.records, factors)


def read_dataset(
    data: DetectionData, path: str, *, name: str, seed: int, read: ReadRows, class_names: Sequence[str] = ()
) -> RunDataset:
    """Read a dataset of a run.

    Args:
        data: section of the recipe; of its paths only `path` is read.
        name: name of the dataset, empty for the only one.
        read: rows to read.
        class_names: classes of the detector, which the images are judged by. Empty: the data's.
    Raises: DataError: data that cannot be trained on or judged by, with all its faults.
    """
    if read == "none":
        return RunDataset(name=name, class_names=tuple(class_names))
    rare_below = data.sampling_threshold if data.sampling == "repeat" else None
    data = replace(data, path=path, sampling="each")
    found = read_detection(path, data.format, data.images)
    judged = evaluated_split(found, data)
    check_usable(found, path, None if read == "all" else judged or data.train_split)
    records, held_out = split_images(found, data, seed)
    if class_names and tuple(class_names) != found.class_names:
        held_out = join_classes(held_out, found.class_names, class_names)
        if read == "all":
            records = join_classes(records, found.class_names, class_names)
    if read == "all":
        if not found.records(data.train_split):
            raise DataError(f"'{path}': the split '{data.train_split}' has no images.")
        if not any(map(n_learnable, records)):
            what = "no box to learn from in the images that are trained on"
            raise DataError(f"'{path}' holds {what if records else 'no image to train on'}.")
    elif judged is not None:
        others = [split for split in found.splits if split != judged]
        logger.info(
            "'%s': judged on %s, %d images%s.", path, judged, len(held_out),
            f"; not on {', '.join(others)} (`data.eval_split`)" if others else "",
        )  # fmt: skip
    return RunDataset(
        name=name,
        class_names=tuple(class_names) or found.class_names,
        records=records if read == "all" else (),
        held_out=held_out,
        class_ids=dict(zip(found.class_names, found.class_ids, strict=True)),
        rare_below=rare_below,
    )


def check_boxes(dataset: RunDataset, names: Sequence[str]) -> None:
    """Check that each class has a box in the training images. Raises: DataError: naming one without."""
    found = {dataset.class_names[label] for record in dataset.records for label in record.labels}
    if missing := [name for name in names if name not in found]:
        raise DataError(f"No training image has a box of '{missing[0]}', which `add_classes` names.")


def count_batches(datasets: Sequence[RunDataset], data: DetectionData, batch_size: int) -> list[int]:
    """Return the number of batches of each dataset in an epoch, given their size on a device."""
    n_draws = [round(dataset.image_repeats.sum()) for dataset in datasets]
    if len(datasets) == 1:
        return [max(1, n_draws[0] // batch_size)]
    return batches_by_dataset(n_draws, batch_size, data.sampling, data.sampling_temperature)


def build_images(
    datasets: Sequence[RunDataset],
    data: DetectionData,
    settings: TrainingSettings,
    *,
    batch_size: int,
    seed: int,
    augmentation: str | None = None,
) -> TrainingImages | MixedImages:
    """Build the augmented training images, by draw.

    Args:
        data: section of the recipe, which says how often the images of each dataset come.
        settings: augmentations, with their probabilities and epochs.
        batch_size: on a device.
        augmentation: import path of a user's own.
    """

    def images(dataset: RunDataset, own_seed: int, repeats: np.ndarray | None) -> TrainingImages:
        custom = None
        if augmentation is not None:
            function = load_augmentation(augmentation)
            custom = CustomAugmentation(function, augmentation, len(dataset.class_names))
        return TrainingImages(
            DetectionDataset(dataset.records), settings, seed=own_seed, batch_size=batch_size,
            n_lanes=8 * n_devices(), repeats=repeats, custom=custom,
        )  # fmt: skip

    if len(datasets) == 1:
        (only,) = datasets
        return images(only, seed, None if only.class_repeats is None else only.image_repeats)
    parts = []
    for number, n in enumerate(count_batches(datasets, data, batch_size)):
        repeats = datasets[number].image_repeats
        own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        parts.append(images(datasets[number], own_seed, repeats * (n * batch_size / repeats.sum())))
    return MixedImages(parts, batch_size=batch_size, seed=seed)
