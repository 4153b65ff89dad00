"""Cost of preparing training images, compared with the same chain in Pillow and floats.

    python -m thawline.bench.loader --variant pico --out benchmarks/results/loader.json

Both chains draw the same views, colours and Mosaics for the same images, so they are timed in pairs and
their images compared one by one. The Pillow chain is what detection code commonly does: every step makes a
new image, resizes are antialiased, and the results become floats in 0–1, normalised where the network needs
it, and stacked. MixUp and CopyBlend are left out of the Pillow chain only. Times include decoding and
collating, on one thread.
"""

from __future__ import annotations

__all__ = ["PillowImages", "generated_images", "main", "measure_phase"]

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

from thawline.bench.harness import bench_parser, bench_results, markdown
from thawline.data.detection.augment import TrainingImages, TrainingSample
from thawline.data.detection.collate import Collate
from thawline.data.detection.dataset import DetectionDataset, Sample, load_detection
from thawline.data.detection.geometry import View, affine_boxes, large_enough, random_affine
from thawline.data.detection.images import opencv
from thawline.data.detection.mosaic import Tile
from thawline.data.detection.photometric import Colour
from thawline.data.detection.records import ImageRecord
from thawline.data.draws import Draw
from thawline.measure import median_ratio, median_seconds, paired_rounds, write_results
from thawline.models.deimv2.published import PUBLISHED
from thawline.recipe.resolved import Window
from thawline.training.detection.schedule import published_schedule

PHASES: dict[str, Callable[[dict[str, Window]], int]] = {
    "with Mosaic": lambda windows: windows["mosaic"].start,
    "without Mosaic": lambda windows: windows["mosaic"].stop,
    "stage 2": lambda windows: windows["stage_2"].start,
}
"""An epoch of each phase of augmentation."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BILINEAR = Image.Resampling.BILINEAR


class PillowFiles(DetectionDataset):
    """Images decoded by Pillow."""

    def sample(self, index: int) -> Sample:
        """Read one image with its boxes."""
        record = self.records[index]
        return Sample(
            image=np.asarray(Image.open(record.path).convert("RGB")),
            boxes_xyxy=record.boxes_xyxy.astype(np.float32),
            labels=record.labels,
            area=record.area.astype(np.float32),
            iscrowd=record.iscrowd,
            index=index,
            orig_size=(record.width, record.height),
        )


class PillowImages(TrainingImages):
    """The same images, drawn by Pillow step by step."""

    def paint(
        self, image: np.ndarray, boxes: np.ndarray, view: View, colour: Colour
    ) -> tuple[np.ndarray, np.ndarray]:
        """Apply colours, canvas, crop, flip and resize."""
        picture = _recolour(Image.fromarray(image), colour)
        left, top = min(view.left, 0), min(view.top, 0)
        right = max(view.left + view.width, picture.width)
        bottom = max(view.top + view.height, picture.height)
        if (left, top, right, bottom) != (0, 0, *picture.size):
            canvas = Image.new("RGB", (right - left, bottom - top))
            canvas.paste(picture, (-left, -top))
            picture = canvas
        at = (view.left - left, view.top - top)
        picture = picture.crop((*at, at[0] + view.width, at[1] + view.height))
        return self._flip_and_resize(picture, boxes - ([view.left, view.top] * 2), view)

    def paint_mosaic(
        self, tiles: Sequence[Tile], rng: np.random.Generator, view: View, colour: Colour
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Paste the tiles; apply affine, colours, flip and resize."""
        cell_width = max(tile.image.shape[1] for tile in tiles)
        cell_height = max(tile.image.shape[0] for tile in tiles)
        canvas = Image.new("RGB", (2 * cell_width, 2 * cell_height))
        corners = [(column * cell_width, row * cell_height) for row in (0, 1) for column in (0, 1)]
        for tile, corner in zip(tiles, corners, strict=True):
            canvas.paste(Image.fromarray(tile.image), corner)
        matrix = random_affine(rng, *canvas.size)
        inverse = np.linalg.inv(np.concatenate([matrix, [[0, 0, 1]]]))[:2].ravel()
        canvas = canvas.transform(
            canvas.size, Image.Transform.AFFINE, inverse.tolist(), Image.Resampling.NEAREST
        )
        boxes = np.concatenate([t.boxes_xyxy + (at * 2) for t, at in zip(tiles, corners, strict=True)])
        boxes = np.clip(affine_boxes(boxes, matrix), 0, np.array(canvas.size * 2))
        keep = large_enough(boxes, self.settings.min_box_size)
        labels = np.concatenate([tile.labels for tile in tiles])[keep]
        view = replace(view, left=0, top=0, width=canvas.width, height=canvas.height)
        return *self._flip_and_resize(_recolour(canvas, colour), boxes[keep], view), labels

    def _tile(self, sample: Sample) -> Tile:
        rows, columns = self.settings.tile_size
        height, width = sample.image.shape[:2]
        factor = max(rows / height, columns / width)
        small = Image.fromarray(sample.image).resize(
            (round(width * factor), round(height * factor)), _BILINEAR
        )
        scale = np.array([small.width / width, small.height / height] * 2, np.float32)
        return Tile(image=np.asarray(small), boxes_xyxy=sample.boxes_xyxy * scale, labels=sample.labels)

    def _flip_and_resize(
        self, picture: Image.Image, boxes: np.ndarray, view: View
    ) -> tuple[np.ndarray, np.ndarray]:
        if view.hflip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes[:, [0, 2]] = view.width - boxes[:, [2, 0]]
        height, width = self.settings.height_width
        pixels = np.asarray(picture.resize((width, height), _BILINEAR))
        return pixels, (boxes * ([width / view.width, height / view.height] * 2)).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    opencv().setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        records: Sequence[ImageRecord]
        if args.data is None:
            records = generated_images(Path(folder), n_images=args.images)
        else:
            records = load_detection(args.data).records("train")
        phases = {
            phase: measure_phase(records, args.variant, phase, rounds=args.rounds, batch_size=args.batch_size)
            for phase in PHASES
        }
    command = f"python -m thawline.bench.loader --variant {args.variant}"
    source = "generated, 640 × 480, JPEG" if args.data is None else args.data.name
    cpu = torch.device("cpu")
    results = bench_results("loader", command, cpu, images=source, variant=args.variant, phases=phases)
    sys.stdout.write(_table(results) + "\n")
    write_results(args.out, results)
    return 0


def measure_phase(
    records: Sequence[ImageRecord], variant: str, phase: str, *, rounds: int, batch_size: int
) -> dict[str, Any]:
    """Time and compare the chains in one phase of the published schedule.

    Args:
        records: images to prepare, in turn.
        variant: size whose published probabilities are used.
        phase: key of `PHASES`.
        rounds: batches of each chain.
    Returns: for each chain images/s, its speed relative to Pillow's, and the difference of its images from
        Pillow's: the median over images of the mean absolute difference, in levels of 255.
    """
    schedule = published_schedule(variant, 1000)
    epoch = PHASES[phase](schedule.windows)
    settings, ours, theirs = schedule.settings, DetectionDataset(records), PillowFiles(records)
    merged = replace(settings, merged_mosaic=True)
    one_lane: dict[str, Any] = {"batch_size": batch_size, "n_lanes": 1}
    chains: dict[str, TrainingImages] = {
        "pillow": PillowImages(theirs, settings, **one_lane),
        "thawline": TrainingImages(ours, settings, **one_lane),
        "merged": TrainingImages(ours, merged, **one_lane),
    }
    blend = Collate(settings)
    normalised = variant in ("s", "m", "l", "x")
    finish: dict[str, Callable[[list[TrainingSample]], object]] = {
        "pillow": lambda samples: _as_floats(samples, normalised=normalised),
        "thawline": blend,
        "merged": blend,
    }

    def step(name: str) -> Callable[[], object]:
        draws = itertools.cycle(Draw(epoch, position) for position in range(len(records)))
        return lambda: finish[name]([chains[name][draw] for draw in itertools.islice(draws, batch_size)])

    samples = paired_rounds({name: step(name) for name in chains}, rounds=rounds, warmup=4)
    off: dict[str, list[float]] = {name: [] for name in chains}
    for position in range(min(24, len(records))):
        images = {name: chain[Draw(epoch, position)].image.astype(int) for name, chain in chains.items()}
        for name, image in images.items():
            off[name].append(np.abs(image - images["pillow"]).mean())
    return {
        name: {
            "images_per_second": batch_size / median_seconds(samples[name]),
            "times_pillow": 1 / median_ratio(samples[name], samples["pillow"]),
            "levels_from_pillow": float(statistics.median(off[name])),
        }
        for name in chains
    }


def generated_images(folder: Path, n_images: int) -> list[ImageRecord]:
    """Write images with detail of every size and a few boxes, as 640 × 480 JPEG files of about 90 KB."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(n_images):
        path = folder / f"{i}.jpg"
        layers = [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (h, h * 4 // 3, 3), np.uint8)).resize((640, 480)), int
            )
            for h in (6, 24, 96, 480)
        ]
        pixels = sum(layer * share for layer, share in zip(layers, (0.5, 0.25, 0.15, 0.1), strict=True))
        Image.fromarray(np.asarray(pixels, np.uint8)).save(path, quality=90)
        start = rng.uniform([0, 0], [400, 300], (5, 2))
        boxes = np.concatenate([start, start + rng.uniform(20, 180, (5, 2))], axis=1)
        records.append(
            ImageRecord(
                image_id=i,
                path=path,
                width=640,
                height=480,
                boxes_xyxy=boxes,
                labels=rng.integers(0, 80, 5),
                iscrowd=np.zeros(5, bool),
                area=np.ones(5),
            )
        )
    return records


def _recolour(picture: Image.Image, colour: Colour) -> Image.Image:
    if colour.brightness is not None:
        picture = ImageEnhance.Brightness(picture).enhance(colour.brightness)
    if colour.contrast is not None and colour.contrast_first:
        picture = ImageEnhance.Contrast(picture).enhance(colour.contrast)
    if colour.saturation is not None:
        picture = ImageEnhance.Color(picture).enhance(colour.saturation)
    if colour.hue is not None:
        hue, saturation, value = picture.convert("HSV").split()
        turned = np.asarray(hue) + np.uint8(round(colour.hue * 256) % 256)
        picture = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    if colour.contrast is not None and not colour.contrast_first:
        picture = ImageEnhance.Contrast(picture).enhance(colour.contrast)
    if colour.channels != (0, 1, 2):
        bands = picture.split()
        picture = Image.merge("RGB", [bands[channel] for channel in colour.channels])
    return picture


def _as_floats(samples: list[TrainingSample], *, normalised: bool) -> torch.Tensor:
    images = [
        torch.from_numpy(sample.image.transpose(2, 0, 1).astype(np.float32) / 255) for sample in samples
    ]
    if normalised:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        images = [(image - mean) / std for image in images]
    return torch.stack(images)


def _table(results: dict[str, Any]) -> str:
    rows = [
        [
            phase,
            name,
            f"{row['images_per_second']:.0f}",
            f"{row['times_pillow']:.2f}",
            f"{row['levels_from_pillow']:.2f}",
        ]
        for phase, chains in results["phases"].items()
        for name, row in chains.items()
    ]
    return markdown(["phase", "chain", "images/s and core", "× Pillow", "levels from Pillow"], rows)


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser("loader", "Cost of preparing training images.", rounds=20, on_device=False)
    parser.add_argument("--variant", choices=PUBLISHED, default="pico", help="Size whose schedule is used.")
    parser.add_argument("--data", type=Path, help="Detection dataset. Default: generated images.")
    parser.add_argument("--images", type=int, default=64, help="Number of images to generate.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images per round.")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
