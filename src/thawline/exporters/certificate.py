"""Comparison of the detections of an exported file with those of the model in torch.

Detections are compared by box and class, not by rank: two that score equally may come in either order. Torch
detects with the queries that the file has chosen, if they score as high as those of its own choice: which of
two tokens with equal scores becomes a query hangs on rounding, and changes all boxes of an untrained model.
Detections that tie with the last one are not judged.

    box error     pixels from a detection to the nearest one of the same class in the other list, both ways;
                  one without any counts as far as the image is long
    score error   difference of their scores
    agreement     share of detections whose partner is within the budget, and within 4 pixels
"""

from __future__ import annotations

__all__ = [
    "BUDGETS",
    "SCORE_BUDGETS",
    "Detections",
    "Reference",
    "Row",
    "average_precision",
    "compare",
    "detect",
    "generated_images",
]

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thawline.metrics.detection import AnnotatedImage, DetectionEvaluator
from thawline.models.deimv2.model import DEIMv2
from thawline.sessions import OUTPUTS, Session

BUDGETS = {"fp32": 0.5, "fp16": 4.0, "int8": math.inf}
"""Precision → largest box error in pixels, if the user names none; int8 is judged by AP."""
SCORE_BUDGETS = {"fp32": 2e-3, "fp16": 0.03, "int8": math.inf}
"""Precision → largest score error."""
TIES = {"fp32": 1e-4, "fp16": 1e-2, "int8": 3e-2}
"""Precision → difference up to which two scores count as equal."""
N_IMAGES = 6
"""Most images that are compared box by box."""
CLOSE = 0.1
"""Share of the budget below which it does not matter which queries torch detects with."""
SHOWN_SCORE = 0.1
"""In lower precision, detections below this share of the image's best score are not judged."""
SCORE_WEIGHT = 1e3
"""Pixels that a difference of 1 in score is worth when partners are chosen."""

Detections = Mapping[str, np.ndarray]
"""`labels` (K,), `boxes` (K, 4) in pixels and `scores` (K,)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Result of one batch size and precision."""

    precision: str
    batch: int
    images: int
    box_error_px: float
    score_error: float
    agreement: float


def generated_images(n: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw images of blurred and sharp noise with rectangles in them.

    Returns: images (n, 3, H, W) in 0–1, float32, and the sizes they stand for, (n, 2; width, height).
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(n, 3, *size)
    for side in (4, 16, 64):
        noise = torch.rand(n, 3, side, side, generator=generator)
        images += F.interpolate(noise, size, mode="bilinear") / 3
    for image in images:
        for _ in range(6):
            x, y, w, h = (torch.rand(4, generator=generator) * torch.tensor([0.8, 0.8, 0.4, 0.4])).tolist()
            rows = slice(int(y * size[0]), int((y + h) * size[0]) + 2)
            columns = slice(int(x * size[1]), int((x + w) * size[1]) + 2)
            image[:, rows, columns] = torch.rand(3, 1, 1, generator=generator)
    sizes = torch.randint(300, 1200, (n, 2), generator=generator)
    return images.numpy(), sizes.numpy()


class Reference:
    """A detector in torch, eager and in float32, on a few images.

    Args:
        model: not fused.
        images: (N, 3, H, W) in 0–1.        sizes: (N, 2), width and height of the originals.
    """

    def __init__(self, model: DEIMv2, images: np.ndarray, sizes: np.ndarray) -> None:
        self.inputs = {"images": images, "orig_target_sizes": sizes}
        self.model = model.fuse()
        self._found: dict[tuple[int, bytes | None], tuple[Detections, float]] = {}
        self.mean, self.std = (
            torch.tensor(values)[:, None, None]
            for values in (model.config.image_mean, model.config.image_std)
        )

    def detect(self, index: int, queries: np.ndarray | None = None) -> tuple[Detections, float]:
        """Detect in one image, with queries that were chosen elsewhere; each is computed once.

        Args:
            queries: (Q,), tokens. None: those with the highest scores.
        Returns: the detections, and by how much a query scores below the worst that torch would choose.
        """
        key = index, None if queries is None else np.sort(queries).tobytes()
        if key not in self._found:
            self._found[key] = self._detect(index, queries)
        return self._found[key]

    @torch.inference_mode()
    def _detect(self, index: int, queries: np.ndarray | None) -> tuple[Detections, float]:
        shortfall = 0.0

        def choose(scores: Tensor) -> Tensor:
            nonlocal shortfall
            own = type(decoder).choose(decoder, scores)
            if queries is None:
                return own
            given = torch.from_numpy(queries.astype(np.int64))[None]
            if given.unique().numel() < own.numel():
                shortfall = float("inf")
            worst = (scores.gather(1, tokens).amin() for tokens in (own, given))
            shortfall = max(shortfall, float(next(worst) - next(worst)))
            return given

        decoder: Any = self.model.decoder
        decoder.choose = choose
        pixels, size = (torch.from_numpy(values[index]) for values in self.inputs.values())
        output = self.model(((pixels - self.mean) / self.std)[None])
        (found,) = self.model.postprocess(output, size.flip(0)[None])
        return {name: np.asarray(value) for name, value in found.items()}, shortfall


def compare(
    session: Session,
    choices: Callable[[], Session],
    reference: Reference,
    batch: int,
    precision: str,
    budget: float,
) -> Row:
    """Run a session over the first of the reference's images and compare what it finds.

    Args:
        choices: opens a session that also returns `queries` (N, Q), the tokens that were chosen. It is
            called if the detections are far from torch's own.
    """
    rows, chosen = [], None
    inputs = {name: values[:N_IMAGES] for name, values in reference.inputs.items()}
    for index, found in enumerate(detect(session, inputs, batch)):
        expected, _ = reference.detect(index)
        row = _differences(expected, found, precision, budget)
        if not row[0] <= CLOSE * budget:
            chosen = chosen or [given["queries"] for given in run(choices(), inputs, batch)]
            expected, shortfall = reference.detect(index, chosen[index])
            row = _differences(expected, found, precision, budget)
            if shortfall > TIES[precision]:
                row = max(row[0], _length(expected)), max(row[1], min(shortfall, 1.0)), row[2]
        rows.append(row)
    boxes, scores, agreements = np.array(rows).T
    return Row(
        precision=precision, batch=batch, images=len(rows), box_error_px=float(boxes.max()),
        score_error=float(scores.max()), agreement=float(agreements.mean()),
    )  # fmt: skip


def average_precision(
    detections: Iterable[Detections], records: Sequence[AnnotatedImage], names: Sequence[str]
) -> float:
    """Measure AP of the detections in annotated images. `names`: of the classes."""
    evaluator = DetectionEvaluator(records, names)
    tensors = [{key: torch.from_numpy(value) for key, value in found.items()} for found in detections]
    evaluator.update(range(len(records)), [{**found, "labels": found["labels"].long()} for found in tensors])
    return evaluator.compute().statistics["AP"]


def detect(session: Session, inputs: Mapping[str, np.ndarray], batch: int) -> Iterator[Detections]:
    """Yield the detections of each image in pixels, also of a file that returns boxes in 0–1."""
    for index, found in enumerate(run(session, inputs, batch)):
        detections = {name: found[name].astype(np.float32) for name in OUTPUTS}
        if session.takes_images_only:
            detections["boxes"] = detections["boxes"] * np.tile(inputs["orig_target_sizes"][index], 2)
        yield detections


def run(session: Session, inputs: Mapping[str, np.ndarray], batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the outputs of each image; the last batch is filled up with its last image."""
    n = len(inputs["images"])
    for start in range(0, n, batch):
        index = np.arange(start, start + batch).clip(max=n - 1)
        found = session({name: values[index] for name, values in inputs.items()})
        for i in range(min(batch, n - start)):
            yield {name: values[i] for name, values in found.items()}


def _differences(
    expected: Detections, found: Detections, precision: str, budget: float
) -> tuple[float, float, float]:
    """Return the box error, the score error and the agreement of one image."""
    tie, is_full = TIES[precision], precision == "fp32"
    if not all(np.isfinite(values).all() for values in found.values()):
        return _length(expected), 1.0, 0.0
    rises = np.diff(found["scores"]).max(initial=0)  # they come best first
    cut = max(expected["scores"].min(), found["scores"].min()) + tie
    lowest = cut if is_full else max(cut, SHOWN_SCORE * float(expected["scores"].max()))
    far = _length(expected)
    pairs = [_to_nearest(one, other, far, lowest) for one, other in ((expected, found), (found, expected))]
    box, score = np.concatenate(pairs, axis=1)
    if not len(box):  # all detections tie: compare them all
        box, score = np.concatenate([_to_nearest(expected, found, far, -1.0)], axis=1)
    agreed = float((box <= min(budget, BUDGETS["fp16"])).mean())
    largest = float(box.max() if is_full else np.quantile(box, 0.99))
    return largest, max(float(score.max()), float(rises)), agreed


def _length(found: Detections) -> float:
    """Return what a box counts that has no partner: how far the boxes reach, at least 100 pixels."""
    return max(100.0, float(np.ptp(found["boxes"])))


def _to_nearest(one: Detections, other: Detections, far: float, lowest: float) -> np.ndarray:
    """Return how far in box and score each detection of `one` is from its partner in `other`, (2, n)."""
    judged = one["scores"] > lowest
    box = np.abs(one["boxes"][judged][:, None] - other["boxes"]).max(axis=-1)
    score = np.abs(one["scores"][judged][:, None] - other["scores"])
    is_other_class = one["labels"][judged][:, None] != other["labels"]
    cost = box + SCORE_WEIGHT * score + 1e9 * is_other_class
    partner = cost.argmin(axis=1)[:, None]
    missed = np.take_along_axis(is_other_class, partner, axis=1)
    box = np.where(missed, far, np.take_along_axis(box, partner, axis=1))
    score = np.where(missed, 1.0, np.take_along_axis(score, partner, axis=1))
    return np.concatenate([box, score], axis=1).T
