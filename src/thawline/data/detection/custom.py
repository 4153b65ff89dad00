"""Augmentations of a user's own: a function, or an Albumentations pipeline, on finished training images.

A function takes a `Sample` and a random generator and returns a sample:

    def blur(sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() < 0.3:
            sample.image = cv2.GaussianBlur(sample.image, (5, 5), 0)
        return sample

It comes after all other augmentations of an image and before those of a batch, in every epoch (`sample.draw`
says which). The generator follows from the run's seed, the epoch and the position in it, so the same pixels
come out in any process and after resuming, as long as nothing else is random.

A pipeline of Albumentations is `Compose([…], bbox_params=BboxParams("pascal_voc", label_fields=["labels"]))`;
it is seeded before each image. The library is found by its interface and never imported here.
"""

from __future__ import annotations

__all__ = ["CustomAugmentation", "load_augmentation"]

import importlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from thawline.data.detection.dataset import Sample
from thawline.data.detection.geometry import resize
from thawline.errors import ConfigError

AnySample = TypeVar("AnySample", bound=Sample)
Augmentation = Callable[[Sample, np.random.Generator], Sample]


class CustomAugmentation:
    """Augmentation of a user's own, whose results are checked and fitted to the input.

    Args:
        augment: a function or an Albumentations pipeline, see the top of this file.
        name: its name in messages.
        n_classes: number of classes; None does not check labels from above.
    Raises: ConfigError: for a pipeline that leaves out boxes or labels, or cannot be seeded.
    """

    def __init__(self, augment: Augmentation | Any, name: str = "", n_classes: int | None = None) -> None:
        self.title = f"The augmentation '{name or getattr(augment, '__qualname__', type(augment).__name__)}'"
        self.n_classes = n_classes
        is_pipeline = hasattr(augment, "processors")
        self.augment: Augmentation = self._pipeline(augment) if is_pipeline else augment

    def __call__(self, sample: AnySample, rng: np.random.Generator) -> AnySample:
        """Return the augmented sample, in the size of the one given.

        Raises: ConfigError: if the augmentation fails, or returns something that is no sample.
        """
        height, width = sample.image.shape[:2]
        try:
            done = self.augment(sample, rng)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(
                f"{self.title} failed with {type(error).__name__}: {error} "
                f"({Path(place.filename).name}, line {place.lineno})."
            ) from error
        self._check(done)
        image, boxes = np.ascontiguousarray(done.image), np.asarray(done.boxes_xyxy, np.float32)
        scale = np.array([width / image.shape[1], height / image.shape[0]] * 2, np.float32)
        boxes = np.clip(boxes.reshape(-1, 4) * scale, 0, [width, height] * 2).astype(np.float32)
        labels = np.asarray(done.labels, np.int64).reshape(-1)
        return replace(sample, image=resize(image, width, height), boxes_xyxy=boxes, labels=labels)

    def _pipeline(self, pipeline: Any) -> Augmentation:
        params = getattr(pipeline.processors.get("bboxes"), "params", None)
        fields = list(getattr(params, "label_fields", None) or ())
        if getattr(params, "format", None) != "pascal_voc" or fields != ["labels"]:
            raise ConfigError(
                f"{self.title} must carry boxes and labels along: give its Compose "
                'bbox_params=BboxParams("pascal_voc", label_fields=["labels"]).'
            )
        if not hasattr(pipeline, "set_random_seed"):
            raise ConfigError(
                f"{self.title} cannot be seeded, so a run would not be reproducible: it needs "
                "albumentations 1.4.21 or newer."
            )

        def augment(sample: Sample, rng: np.random.Generator) -> Sample:
            pipeline.set_random_seed(int(rng.integers(2**31)))
            done = pipeline(image=sample.image, bboxes=sample.boxes_xyxy, labels=sample.labels)
            return replace(sample, image=done["image"], boxes_xyxy=done["bboxes"], labels=done["labels"])

        return augment

    def _check(self, done: Any) -> None:
        if not isinstance(done, Sample):
            raise ConfigError(f"{self.title} must return a Sample, it returned {type(done).__name__}.")
        image, labels = done.image, np.asarray(done.labels)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
            found = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
            raise ConfigError(f"{self.title} must return an image of uint8 (height, width, 3), got {found}.")
        n_boxes = np.asarray(done.boxes_xyxy).size / 4
        if n_boxes != labels.size:
            raise ConfigError(
                f"{self.title} returned {n_boxes:g} boxes of four numbers and {labels.size} "
                "labels: each box needs its own."
            )
        n = np.inf if self.n_classes is None else self.n_classes
        if labels.size and not 0 <= labels.min() <= labels.max() < n:
            raise ConfigError(
                f"{self.title} returned labels from {labels.min()} to {labels.max()}: expected "
                f"whole numbers from 0 to {n - 1}."
            )


def load_augmentation(path: str) -> Any:
    """Import an augmentation by "module:name"; modules of the current folder are found too.

    Raises: ConfigError: if there is no such module or name, or it cannot be called.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(f'`objective.augmentation`: expected "module:name", got {path!r}.')
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module may raise anything
        raise ConfigError(
            f"`objective.augmentation`: cannot import '{path}': {type(error).__name__}: {error}."
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(
            f"`objective.augmentation`: '{path}' is a {type(found).__name__}, no function or pipeline."
        )
    return found
