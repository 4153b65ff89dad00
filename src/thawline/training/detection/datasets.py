"""The datasets of a detection run: images to train on and to judge by, and the classes of each."""

from __future__ import annotations

__all__ = ["RunDataset", "check_boxes", "read_dataset"]

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from thawline.data.detection.dataset import check_usable, read_detection
from thawline.data.detection.records import ImageRecord, n_learnable
from thawline.errors import DataError
from thawline.recipe import DetectionData
from thawline.training.detection.split import evaluated_split, join_classes, split_images
from thawline.training.objective import ReadRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
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
    )


def check_boxes(dataset: RunDataset, names: Sequence[str]) -> None:
    """Raises: DataError: a class has no box in the training images."""
    found = {dataset.class_names[label] for record in dataset.records for label in record.labels}
    if missing := [name for name in names if name not in found]:
        raise DataError(f"No training image has a box of '{missing[0]}', which `add_classes` names.")
