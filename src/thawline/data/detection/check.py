"""Check a detection dataset for errors before training: counts, sizes, faults, leaks, and what to do.

    check = check_detection("data/bccd")
    check.lines()                        # what `thawline data check` prints
    save_samples(check.data, folder)     # a grid of labelled images per split

Reading finds most problems (`records.PROBLEM_KINDS`). Here every image is fully decoded, and problems that
only show in the whole dataset are added: images in two splits, classes that are never used.
"""

from __future__ import annotations

__all__ = [
    "DataCheck",
    "SplitSummary",
    "check_detection",
    "place_of",
    "save_augmented",
    "save_samples",
]

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from thawline.data.detection.augment import TrainingImages
from thawline.data.detection.collate import Collate
from thawline.data.detection.dataset import DetectionDataset
from thawline.data.detection.drawing import Panel, panel_grid, save_image
from thawline.data.detection.duplicates import fingerprint, similar_pairs
from thawline.data.detection.formats import read_raw
from thawline.data.detection.formats.assemble import assemble
from thawline.data.detection.formats.places import relative_name
from thawline.data.detection.formats.raw import RawSet
from thawline.data.detection.records import (
    ERRORS,
    PROBLEM_KINDS,
    DetectionSet,
    ImageRecord,
    Problem,
    describe,
    n_learnable,
)
from thawline.data.draws import Draw
from thawline.ops.boxes import cxcywh_to_xyxy
from thawline.recipe.resolved import Augmentation, Window
from thawline.tables import aligned

SMALL, LARGE = 32**2, 96**2
"""COCO's area limits, pixels²."""
INPUT = 640
"""Size at which small sides are counted: the detectors' usual input, to which images are stretched."""
TINY_SIDE = 8
"""Pixels at `INPUT`; published recipes leave out boxes with a smaller side."""
N_SAMPLES = 12
FEWEST_QUERIES = 100
QUERIES = "queries: Atto 100, Femto 150, Pico 200, N to X 300"


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """Statistics of one split."""

    n_images: int
    n_empty: int
    """Images without boxes: negatives."""
    n_boxes: int
    boxes_per_class: dict[str, int]
    width: tuple[int, int, int]
    """Minimum, median, maximum; pixels. The same for the next three."""
    height: tuple[int, int, int]
    boxes_per_image: tuple[int, int, int]
    box_side: tuple[int, int, int]
    """Square root of a box's area."""
    n_small: int
    """Area below 32², as in COCO."""
    n_large: int
    """Area above 96²."""
    n_tiny: int
    """With a side below 8 pixels at an input of 640 × 640."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DataCheck:
    """Result of checking a dataset."""

    data: DetectionSet
    raw: RawSet
    summaries: dict[str, SplitSummary]
    problems: tuple[Problem, ...]

    @property
    def is_trainable(self) -> bool:
        """True if no problem prevents training."""
        return not any(problem.kind in ERRORS for problem in self.problems)

    def lines(self, shown: int = 5) -> list[str]:
        """Return the report as lines, with at most `shown` places per kind of problem."""
        lines = [f"{self.data.root}: {self.data.format}; classes: {len(self.data.class_names)}", ""]
        lines += _count_table(self.summaries, self.data.class_names)
        for split, summary in self.summaries.items():
            lines += ["", *_size_lines(split, summary)] if summary.n_boxes else []
        lines.append("")
        if not self.problems:
            return [*lines, "No problems found."]
        lines += describe(self.problems, shown)
        kinds = dict.fromkeys(problem.kind for problem in self.problems)
        fixes = [
            f"  - {PROBLEM_KINDS[kind].title}: {fix}" for kind in kinds if (fix := PROBLEM_KINDS[kind].fix)
        ]
        if fixes:
            lines += ["", "A copy written with `--fix NEW_FOLDER`:", *fixes]
        return [*lines, "", "Ready for training." if self.is_trainable else "Not ready for training."]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "root": str(self.data.root),
            "format": self.data.format,
            "class_names": list(self.data.class_names),
            "class_ids": list(self.data.class_ids),
            "is_trainable": self.is_trainable,
            "splits": {split: asdict(summary) for split, summary in self.summaries.items()},
            "problems": [asdict(problem) for problem in self.problems],
        }


def check_detection(
    path: str | Path, format: str | None = None, images: str | Path | None = None
) -> DataCheck:
    """Check a dataset; arguments as in `load_detection`.

    Raises: DataError: if no dataset is found, or its format is ambiguous; everything else is a problem in
        the result.
    """
    raw = read_raw(path, format, images)
    data = assemble(raw, decode=True)
    leaks = [leak for leak in _find_leaks(data) if leak not in data.problems]
    problems = [*data.problems, *leaks, *_check_classes(data), *_check_crowded(data)]
    return DataCheck(
        data=data,
        raw=raw,
        summaries={split: _summarise(records, data.class_names) for split, records in data.splits.items()},
        problems=tuple(sorted(problems, key=lambda problem: [*PROBLEM_KINDS].index(problem.kind))),
    )


def save_samples(data: DetectionSet, folder: Path, n_images: int = N_SAMPLES) -> list[Path]:
    """Write samples_SPLIT.png, a grid of labelled images per split. Returns: their paths."""
    paths = []
    for split, records in data.splits.items():
        if records:
            dataset = DetectionDataset(records, keep_crowd=True)
            indices = np.unique(np.linspace(0, len(records) - 1, n_images).round().astype(int))
            panels = [
                Panel(
                    image=sample.image,
                    boxes_xyxy=sample.boxes_xyxy,
                    labels=sample.labels,
                    caption=records[sample.index].path.name,
                )
                for sample in map(dataset.sample, indices.tolist())
            ]
            paths.append(save_image(folder / f"samples_{split}.png", panel_grid(panels, data.class_names)))
    return paths


def save_augmented(data: DetectionSet, folder: Path, size: tuple[int, int] = (INPUT, INPUT)) -> Path | None:
    """Write augmented.png, training images as the network sees them. Returns: its path, if any.

    Args:
        size: height and width of the input, pixels.

    The first half is from epochs with Mosaic and MixUp, the second from those with zoom-out, crop, CopyBlend.
    """
    records = next(iter(data.splits.values()), ())
    if not records:
        return None
    half = N_SAMPLES // 2
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
    for epoch, caption in enumerate(("Mosaic, MixUp", "zoom-out, crop, CopyBlend")):
        batch = collate([images[Draw(epoch, position)] for position in range(min(half, len(images)))])
        for pixels, target in zip(batch["pixel_values"], batch["targets"], strict=True):
            image, labels = pixels.permute(1, 2, 0).numpy(), target["labels"].numpy()
            boxes = cxcywh_to_xyxy(target["boxes"]).numpy() * (size[::-1] * 2)
            panels.append(Panel(image=image, boxes_xyxy=boxes, labels=labels, caption=caption))
    return save_image(folder / "augmented.png", panel_grid(panels, data.class_names))


def place_of(data: DetectionSet, split: str, record: ImageRecord) -> str:
    """Return the name of an image in problems that are about the image itself."""
    return f"{split}: {relative_name(record.path, data.root)}"


def _find_leaks(data: DetectionSet) -> list[Problem]:
    """Find images that are in a split twice, or in two splits; the later split is the held-out one."""
    splits = data.splits
    prints = {split: fingerprint([record.path for record in records]) for split, records in splits.items()}
    problems = []
    for split, records in splits.items():
        by_digest = _group(zip(prints[split].digests, (record.path.name for record in records), strict=True))
        for names in by_digest:
            problems.append(Problem(kind="copies", where=split, detail=" = ".join(names), split=split))
    for first, second in combinations(splits, 2):
        for a, b, is_exact in similar_pairs(prints[first], prints[second]):
            where = place_of(data, first, splits[first][a])
            detail = place_of(data, second, splits[second][b])
            kind = "leak" if is_exact else "near-leak"
            problems.append(Problem(kind=kind, where=where, detail=detail, split=first))
    return problems


def _check_crowded(data: DetectionSet) -> list[Problem]:
    """Find splits with images that hold more boxes than the smallest detector finds."""
    problems = []
    for split, records in data.splits.items():
        counts = [n for n in map(n_learnable, records) if n > FEWEST_QUERIES]
        if counts:
            detail = f"{len(counts)} of {len(records)} images, with up to {max(counts)} boxes; {QUERIES}"
            problems.append(Problem(kind="many-boxes", where=split, detail=detail, split=split))
    return problems


def _check_classes(data: DetectionSet) -> list[Problem]:
    """Find classes without a box in the first split, and classes with almost the same name."""
    problems = []
    first = next(iter(data.splits), "")
    records = data.splits.get(first, ())
    used = {int(label) for record in records for label in record.labels}
    for label, name in enumerate(data.class_names):
        if records and label not in used:
            detail = f"'{name}' (id {data.class_ids[label]})"
            problems.append(Problem(kind="class-unused", where=first, detail=detail, split=first))
    for names in _group((re.sub(r"[\W_]+", "", name.casefold()) or name, name) for name in data.class_names):
        problems.append(Problem(kind="class-alike", where="class list", detail=", ".join(map(repr, names))))
    return problems


def _group(pairs: Iterable[tuple[object, str]]) -> list[list[str]]:
    """Return the names that share a key with another, grouped by key."""
    groups: dict[object, list[str]] = defaultdict(list)
    for key, name in pairs:
        groups[key].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _summarise(records: Sequence[ImageRecord], class_names: Sequence[str]) -> SplitSummary:
    labels = np.concatenate([np.zeros(0, np.int64), *(record.labels for record in records)])
    areas = np.concatenate([np.zeros(0), *(record.area for record in records)])
    boxes = np.concatenate([np.zeros((0, 4)), *(record.boxes_xyxy for record in records)])
    per_image = np.array([len(record.labels) for record in records], int)
    sizes = np.array([(record.width, record.height) for record in records], int).reshape(-1, 2)
    sides = (boxes[:, 2:] - boxes[:, :2]) / sizes.repeat(per_image, axis=0) * INPUT
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    return SplitSummary(
        n_images=len(records),
        n_empty=int((per_image == 0).sum()),
        n_boxes=len(labels),
        boxes_per_class=dict(zip(class_names, counts, strict=True)),
        width=_spread(sizes[:, 0]),
        height=_spread(sizes[:, 1]),
        boxes_per_image=_spread(per_image),
        box_side=_spread(np.sqrt(areas.clip(0))),
        n_small=int((areas < SMALL).sum()),
        n_large=int((areas > LARGE).sum()),
        n_tiny=int((sides < TINY_SIDE).any(1).sum()),
    )


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    """Return minimum, median and maximum, rounded; zeros if there are no values."""
    if not len(values):
        return (0, 0, 0)
    return round(float(values.min())), round(float(np.median(values))), round(float(values.max()))


def _count_table(summaries: dict[str, SplitSummary], class_names: Sequence[str]) -> list[str]:
    """Return counts by split: one row per class, so that many classes do not make long lines."""
    columns = [
        [split, one.n_images, one.n_empty, one.n_boxes, *(one.boxes_per_class[name] for name in class_names)]
        for split, one in summaries.items()
    ]
    titles = ["", "images", "  without boxes", "boxes", *(f"  {name}" for name in class_names)]
    return aligned([[str(cell) for cell in row] for row in zip(titles, *columns, strict=True)]).splitlines()


def _size_lines(split: str, summary: SplitSummary) -> list[str]:
    def spread(values: tuple[int, int, int]) -> str:
        low, median, high = values
        return str(low) if low == high else f"{low}–{high} (median {median})"

    def share(count: int) -> str:
        return f"{count / summary.n_boxes:.0%}"

    n_medium = summary.n_boxes - summary.n_small - summary.n_large
    return [
        f"{split}: images {spread(summary.width)} × {spread(summary.height)}, "
        f"{spread(summary.boxes_per_image)} boxes per image",
        f"  box side √area {spread(summary.box_side)} px: {share(summary.n_small)} small, "
        f"{share(n_medium)} medium, {share(summary.n_large)} large; "
        f"{share(summary.n_tiny)} have a side under {TINY_SIDE} px at {INPUT}×{INPUT} input",
    ]
