"""Detection datasets as PyTorch datasets: a folder of labelled images of any format.

    load_detection(path) ──► DetectionSet ──► DetectionDataset(records) ──► image (3, H, W) uint8, target

Everything wrong with the files is reported at the start, all at once, so that training never meets a bad
image in its third hour.
"""

from __future__ import annotations

__all__ = ["DetectionDataset", "Sample", "check_usable", "load_detection", "read_detection", "to_tensors"]

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from thawline.data.detection.formats import read_raw
from thawline.data.detection.formats.assemble import assemble
from thawline.data.detection.images import read_image
from thawline.data.detection.records import (
    PROBLEM_KINDS,
    DetectionSet,
    ImageRecord,
    clip_boxes,
    describe,
    has_area,
    learnable,
)
from thawline.errors import DataError

logger = logging.getLogger(__name__)


def load_detection(
    path: str | Path, format: str | None = None, images: str | Path | None = None, decode: bool = False
) -> DetectionSet:
    """Read a detection dataset; raise an error if anything in it is wrong.

    Args:
        path: a folder, a COCO JSON or a data.yaml.
        format: "coco", "yolo" or "voc". None or "auto": detected.
        images: the folder that image names start from (COCO, VOC). None: searched around the annotations.
        decode: decode every image now, instead of looking at its header and its end.
    Raises: DataError: naming all errors, by kind, with what to do. Degenerate boxes and the like are logged.
    """
    data = read_detection(path, format, images, decode)
    check_usable(data, path)
    return data


def check_usable(data: DetectionSet, path: str | Path, judged: str | None = None) -> None:
    """Raise an error if anything is wrong with a dataset, and log what is remarkable.

    Args:
        data: the dataset.        path: its path, for messages.
        judged: the only split of interest, to evaluate on. None: all of them, to train on.
    Raises: DataError: naming all errors, by kind, with what to do.
    """
    errors, warnings = data.errors, data.warnings
    if judged is not None:
        errors, warnings = (
            tuple(one for one in problems if one.split in ("", judged) and one.kind != "no-boxes")
            for problems in (errors, warnings)
        )
    if errors:
        first = f"'{path}' ({data.format}) cannot be {'trained' if judged is None else 'evaluated'} on:"
        last = [f"`thawline data check {path} --fix NEW_FOLDER` writes a repaired copy."]
        can_fix = all(PROBLEM_KINDS[problem.kind].fix for problem in errors)
        raise DataError("\n".join([first, *describe(errors), *(last if can_fix else [])]))
    if not any(data.splits.values()):
        raise DataError(
            f"'{path}' ({data.format}) contains no image. Check its paths, or choose another `format`."
        )
    for line in describe(warnings, shown=1):
        logger.warning("'%s': %s", path, line)


def read_detection(
    path: str | Path, format: str | None = None, images: str | Path | None = None, decode: bool = False
) -> DetectionSet:
    """Read a detection dataset; leave out what cannot be used and list it in `problems`.

    Arguments as in `load_detection`.
    """
    return assemble(read_raw(path, format, images), decode)


@dataclass(kw_only=True)
class Sample:
    """One image on its way into a batch: input and output of augmentations."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    boxes_xyxy: np.ndarray
    """(N, 4) float32, pixels of `image`."""
    labels: np.ndarray
    """(N,) int64."""
    area: np.ndarray
    """(N,) float32, pixels² of `image`."""
    iscrowd: np.ndarray
    """(N,) bool."""
    index: int
    """Index in the dataset."""
    orig_size: tuple[int, int]
    """(width, height) of the image file, pixels."""


class DetectionDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Dataset of images and boxes; images are decoded on access.

    Boxes are clipped to the image; those without area are left out, and crowds too unless `keep_crowd`.
    Images without boxes are kept: they are negatives.

    Args:
        records: the images, e.g. `load_detection(path).records("train")`.
        transform: applied to every sample; may change image and boxes in place.
        keep_crowd: keep boxes around crowds, marked by `iscrowd`.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        transform: Callable[[Sample], Sample] | None = None,
        keep_crowd: bool = False,
    ) -> None:
        self.records = tuple(records)
        self.transform = transform
        self.keep_crowd = keep_crowd

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image, (3, H, W) uint8, and its target, as `to_tensors` returns them."""
        sample = self.sample(index)
        return to_tensors(sample if self.transform is None else self.transform(sample))

    def sample(self, index: int) -> Sample:
        """Return an untransformed image with its boxes. Raises: DataError: if the file has changed."""
        record = self.records[index]
        image = read_image(record.path, record.oriented)
        if image.shape[:2] != (record.height, record.width):
            raise DataError(
                f"'{record.path}' was {record.width}×{record.height} when the dataset was read, now "
                f"{image.shape[1]}×{image.shape[0]}. Do not change the files during training."
            )
        boxes = clip_boxes(record.boxes_xyxy, record.width, record.height)
        keep = has_area(boxes) if self.keep_crowd else learnable(record)
        return Sample(
            image=image,
            boxes_xyxy=boxes[keep].astype(np.float32),
            labels=record.labels[keep],
            area=record.area[keep].astype(np.float32),
            iscrowd=record.iscrowd[keep],
            index=index,
            orig_size=(record.width, record.height),
        )


def to_tensors(sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    """Convert a sample to tensors: the last step of every pipeline.

    Returns: the image, (3, H, W) uint8, and its target: boxes_xyxy (N, 4) float32 in pixels, labels (N,)
        int64, area (N,) float32, iscrowd (N,) bool, index () int64, orig_size (2,) int64 as (width, height).
    """
    image = torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
    dtypes = {"boxes_xyxy": np.float32, "labels": np.int64, "area": np.float32, "iscrowd": bool}
    target = {
        name: torch.from_numpy(np.ascontiguousarray(getattr(sample, name), dtype))
        for name, dtype in dtypes.items()
    }
    target |= {"index": torch.tensor(sample.index), "orig_size": torch.tensor(sample.orig_size)}
    return image, target
