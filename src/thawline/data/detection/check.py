"""Look a detection data set through before it is trained on: counts, sizes, faults, leaks; say what to do.

    check = check_detection("data/bccd")
    check.lines()                        # what `thawline data check` prints
    save_samples(check.data, folder)     # a grid of labelled pictures per split

Reading names most faults (`records.KINDS`). Here every image is decoded to its end, and what
only the whole set can tell is added: images in two splits, classes that are never used.
"""

from __future__ import annotations

__all__ = ["DataCheck", "SplitSummary", "check_detection", "save_augmented", "save_samples"]

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.collate import Collate
from thawline.data.detection.dataset import DetectionDataset
from thawline.data.detection.drawing import Panel, panel_grid, save_picture
from thawline.data.detection.duplicates import Looks, look_at, pairs_alike
from thawline.data.detection.formats import read_raw
from thawline.data.detection.formats.raw import RawSet, assemble, relative_name
from thawline.data.detection.records import KINDS, DetectionSet, ImageRecord, Problem, describe
from thawline.data.draws import Draw
from thawline.ops.boxes import cxcywh_to_xyxy
from thawline.recipe.resolved import Augmentation, Window
from thawline.tables import aligned

SMALL, LARGE = 32**2, 96**2
"""COCO's areas, pixels²."""
INPUT = 640
"""The size at which small sides are counted: the detectors' usual input, to which images are stretched."""
TINY_SIDE = 8
"""Pixels at `INPUT`; published recipes leave out boxes with a smaller side."""
PICTURES = 12


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One split in numbers."""

    n_images: int
    n_empty: int
    """Images without boxes: negatives."""
    n_boxes: int
    boxes_per_class: dict[str, int]
    width: tuple[int, int, int]
    """Least, median, most; pixels. So are the others."""
    height: tuple[int, int, int]
    boxes_per_image: tuple[int, int, int]
    box_side: tuple[int, int, int]
    """The square root of a box's area."""
    n_small: int
    """Area below 32², as COCO counts it."""
    n_large: int
    """Area above 96²."""
    n_tiny: int
    """With a side below 8 pixels at an input of 640 × 640."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DataCheck:
    """What a look through a data set found."""

    data: DetectionSet
    raw: RawSet
    summaries: dict[str, SplitSummary]
    problems: tuple[Problem, ...]

    @property
    def is_trainable(self) -> bool:
        """Whether nothing stands against training."""
        return not any(KINDS[problem.kind].is_error for problem in self.problems)

    def lines(self, shown: int = 5) -> list[str]:
        """The report, in lines; `shown` places are named per kind of problem."""
        lines = [
            f"{self.data.root}: {self.data.format}; classes: {len(self.data.class_names)}",
            "",
        ]
        lines += _table(self.summaries, self.data.class_names)
        for split, one in self.summaries.items():
            if one.n_boxes:
                lines += ["", *_sizes(split, one)]
        lines.append("")
        if not self.problems:
            return [*lines, "Nothing wrong was found."]
        lines += describe(self.problems, shown)
        kinds = {problem.kind for problem in self.problems}
        mended = [
            f"  - {KINDS[kind].title}: {KINDS[kind].mending}"
            for kind in KINDS
            if kind in kinds and KINDS[kind].mending
        ]
        if mended:
            lines += ["", "A copy written with `--fix NEW_FOLDER`:", *mended]
        return [
            *lines,
            "",
            "Can be trained on as it is." if self.is_trainable else "Cannot be trained on as it is.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "root": str(self.data.root),
            "format": self.data.format,
            "class_names": list(self.data.class_names),
            "class_ids": list(self.data.class_ids),
            "is_trainable": self.is_trainable,
            "splits": {split: asdict(one) for split, one in self.summaries.items()},
            "problems": [asdict(problem) for problem in self.problems],
        }


def check_detection(
    path: str | Path, format: str | None = None, images: str | Path | None = None
) -> DataCheck:
    """Look a data set through; arguments as in `load_detection`.

    Raises: DataError: if no data set is found, or its format is ambiguous; anything less is a problem in
    the result.
    """
    raw = read_raw(path, format, images)
    data = assemble(raw, decode=True)
    problems = [*data.problems, *_leaks(data), *_class_remarks(data)]
    return DataCheck(
        data=data,
        raw=raw,
        summaries={split: _summary(records, data.class_names) for split, records in data.splits.items()},
        problems=tuple(sorted(problems, key=lambda problem: [*KINDS].index(problem.kind))),
    )


def save_samples(data: DetectionSet, folder: Path, n_pictures: int = PICTURES) -> list[Path]:
    """Write a grid of labelled pictures per split, samples_SPLIT.png. Returns: their paths."""
    paths = []
    for split, records in data.splits.items():
        if not records:
            continue
        dataset = DetectionDataset(records, keep_crowd=True)
        places = np.unique(np.linspace(0, len(records) - 1, n_pictures).round().astype(int))
        panels = [sample_panel(dataset, int(place)) for place in places]
        paths.append(save_picture(folder / f"samples_{split}.png", panel_grid(panels, data.class_names)))
    return paths


def save_augmented(data: DetectionSet, folder: Path, size: int = INPUT) -> Path | None:
    """Write augmented.png, training pictures as the network sees them. Returns: its path, if any.

    First come pictures of the epochs with Mosaic and MixUp, then of those with zoom-out, crop and CopyBlend.
    """
    records = next(iter(data.splits.values()), ())
    if not records:
        return None
    half = PICTURES // 2
    settings = Augmentation(
        size=size,
        strong_epochs=Window(0, 2),
        mosaic_epochs=Window(0, 1),
        mosaic_prob=1.0,
        mixup_epochs=Window(0, 1),
        mixup_prob=0.5,
        copyblend_epochs=Window(1, 2),
        copyblend_prob=1.0,
    )
    images = TrainingImages(DetectionDataset(records), settings, batch_size=half)
    collate = Collate(settings)
    panels = []
    for epoch, name in enumerate(("Mosaic, MixUp", "zoom-out, crop, CopyBlend")):
        draws = [Draw(epoch, position) for position in range(min(half, len(images)))]
        batch = collate([images[draw] for draw in draws])
        for picture, target in zip(batch["pixel_values"], batch["targets"], strict=True):
            panels.append(
                Panel(
                    image=picture.permute(1, 2, 0).numpy(),
                    boxes_xyxy=cxcywh_to_xyxy(target["boxes"]).numpy() * size,
                    labels=target["labels"].numpy(),
                    caption=name,
                )
            )
    return save_picture(folder / "augmented.png", panel_grid(panels, data.class_names))


def sample_panel(dataset: DetectionDataset, index: int) -> Panel:
    """An item of the data set as a picture, after its transform."""
    image, target = dataset[index]
    return Panel(
        image=image.permute(1, 2, 0).numpy(),
        boxes_xyxy=target["boxes_xyxy"].numpy(),
        labels=target["labels"].numpy(),
        caption=dataset.records[index].path.name,
    )


def _leaks(data: DetectionSet) -> list[Problem]:
    """Images that are in two splits. The later split in the usual order is the held-out one."""
    splits = data.splits
    looks: dict[str, Looks] = {
        split: look_at([record.path for record in records]) for split, records in splits.items()
    }
    names = list(splits)
    problems = []
    for i, split in enumerate(names):
        by_digest: dict[bytes, list[int]] = defaultdict(list)
        for place, digest in enumerate(looks[split].digests):
            by_digest[digest].append(place)
        for places in by_digest.values():
            if len(places) > 1:
                copies = " = ".join(splits[split][place].path.name for place in places)
                problems.append(Problem(kind="copies", where=split, detail=copies, split=split))
        for other in names[i + 1 :]:
            for a, b, is_exact in pairs_alike(looks[split], looks[other]):
                problems.append(
                    Problem(
                        kind="leak" if is_exact else "near-leak",
                        where=place_of(data, split, splits[split][a]),
                        detail=place_of(data, other, splits[other][b]),
                        split=split,
                    )
                )
    return problems


def place_of(data: DetectionSet, split: str, record: ImageRecord) -> str:
    """How an image is called in problems that are about the image itself."""
    return f"{split}: {relative_name(record.path, data.root)}"


def _class_remarks(data: DetectionSet) -> list[Problem]:
    problems = []
    first = next(iter(data.splits), "")
    records = data.splits.get(first, ())
    used = {int(label) for record in records for label in record.labels}
    for label, name in enumerate(data.class_names):
        if records and label not in used:
            detail = f"'{name}' (id {data.class_ids[label]})"
            problems.append(Problem(kind="class-unused", where=first, detail=detail, split=first))
    alike: dict[str, list[str]] = defaultdict(list)
    for name in data.class_names:
        alike[re.sub(r"[\W_]+", "", name.casefold()) or name].append(name)
    for names in alike.values():
        if len(names) > 1:
            problems.append(
                Problem(kind="class-alike", where="class list", detail=", ".join(map(repr, names)))
            )
    return problems


def _summary(records: Sequence[ImageRecord], class_names: Sequence[str]) -> SplitSummary:
    labels = np.concatenate([np.zeros(0, np.int64), *(record.labels for record in records)])
    areas = np.concatenate([np.zeros(0), *(record.area for record in records)])
    sides = np.concatenate(
        [
            np.zeros((0, 2)),
            *(
                (record.boxes_xyxy[:, 2:] - record.boxes_xyxy[:, :2]) / (record.width, record.height) * INPUT
                for record in records
            ),
        ]
    )
    counts = np.bincount(labels, minlength=len(class_names))
    per_image = np.array([len(record.labels) for record in records])
    return SplitSummary(
        n_images=len(records),
        n_empty=int((per_image == 0).sum()),
        n_boxes=len(labels),
        boxes_per_class={name: int(counts[label]) for label, name in enumerate(class_names)},
        width=_spread([record.width for record in records]),
        height=_spread([record.height for record in records]),
        boxes_per_image=_spread(per_image),
        box_side=_spread(np.sqrt(areas.clip(0))),
        n_small=int((areas < SMALL).sum()),
        n_large=int((areas > LARGE).sum()),
        n_tiny=int((sides < TINY_SIDE).any(1).sum()),
    )


def _spread(values: Sequence[float] | np.ndarray) -> tuple[int, int, int]:
    if not len(values):
        return (0, 0, 0)
    return round(float(min(values))), round(float(np.median(values))), round(float(max(values)))


def _table(summaries: Mapping[str, SplitSummary], class_names: Sequence[str]) -> list[str]:
    """Counts by split: a row per class, so that many classes do not make long lines."""
    rows = [
        ["", *summaries],
        ["images", *(str(one.n_images) for one in summaries.values())],
        ["  without boxes", *(str(one.n_empty) for one in summaries.values())],
        ["boxes", *(str(one.n_boxes) for one in summaries.values())],
        *(
            [f"  {name}", *(str(one.boxes_per_class[name]) for one in summaries.values())]
            for name in class_names
        ),
    ]
    return aligned(rows).splitlines()


def _sizes(split: str, one: SplitSummary) -> list[str]:
    def spread(values: tuple[int, int, int]) -> str:
        return str(values[0]) if values[0] == values[2] else f"{values[0]}–{values[2]} (median {values[1]})"

    def share(count: int) -> str:
        return f"{count / one.n_boxes:.0%}"

    medium = one.n_boxes - one.n_small - one.n_large
    return [
        f"{split}: images {spread(one.width)} × {spread(one.height)}, "
        f"{spread(one.boxes_per_image)} boxes in each",
        f"  box side √area {spread(one.box_side)} px: {share(one.n_small)} small, {share(medium)} medium, "
        f"{share(one.n_large)} large; "
        f"at {INPUT}×{INPUT} input {share(one.n_tiny)} have a side under {TINY_SIDE} px",
    ]
