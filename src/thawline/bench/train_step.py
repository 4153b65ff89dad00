"""What a detector's training step costs, beside transformers' port with its own loss.

    python -m thawline.bench.train_step --out benchmarks/results/train-step.json

A step is forward, losses, backward, clipping and AdamW on the same images and boxes, from the same weights:
ours as the trainer takes it (bytes in, layout, parameter groups and optimiser of `thawline train`), the
port's as transformers' Trainer does (float pixels, its loss at its defaults, fused AdamW). Both normalise by
the batch's statistics, though the port would freeze those of its backbone. The two networks and losses differ
in details (docs/models/detect.md); what they are asked to learn is the same.

Beside the time, how often a step waits for the device (`thawline.bench.host_reads`).
"""

from __future__ import annotations

__all__ = ["OurStep", "PortStep", "generated_batch", "main"]

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from thawline.bench.host_reads import HostReads
from thawline.bench.port import build_port
from thawline.measure import machine_stamp, median_ratio, paired_rounds, write_results
from thawline.models.deimv2.loss.targets import Target
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.published import PUBLISHED
from thawline.recipe import Full, TunerSettings
from thawline.training.detection.backbone import fast_parameters, tune_backbone
from thawline.training.detection.groups import build_groups
from thawline.training.detection.learner import HostTargets, Learner

GOALS = {"atto": 0.85, "pico": 0.78, "n": 0.78, "s": 0.92}
"""Wanted of our time over the port's, on two threads, batch 4."""
EPOCH = 10
"""Any before the matcher changes."""


class Step(Protocol):
    """A training step, state and all."""

    parameters: list[nn.Parameter]

    def __call__(self) -> Tensor:
        """Take it. Returns: the loss."""


class OurStep:
    """As `DetectionTrainer` takes it."""

    def __init__(
        self,
        detector: DEIMv2,
        pixels: Tensor,
        targets: list[Target],
        variant: str,
        tuner: TunerSettings | None = None,
    ) -> None:
        tuner = tuner or Full()
        self.detector = tune_backbone(detector, tuner)
        self.learner = Learner(self.detector).train()
        self.pixels, self.targets = pixels, HostTargets(targets)
        settings = replace(PUBLISHED[variant], group_patterns=())
        groups = build_groups(self.detector, settings, fast=fast_parameters(self.detector, tuner))
        self.optimizer = AdamW([group.for_optimizer() for group in groups], fused=True)
        self.parameters = [p for p in self.detector.parameters() if p.requires_grad]

    def __call__(self) -> Tensor:
        """One step."""
        loss = self.loss()
        loss.backward()
        self.update()
        return loss.detach()

    def loss(self) -> Tensor:
        """Forward and losses: the sum of all terms."""
        terms = self.learner(self.pixels, self.targets, epoch=EPOCH)
        return torch.stack(list(terms.values())).sum()

    def update(self) -> None:
        """Clip, step, forget the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()


class PortStep:
    """transformers' port of the same weights, as its Trainer would take it."""

    def __init__(self, detector: DEIMv2, pixels: Tensor, targets: list[Target], variant: str) -> None:
        self.model = build_port(detector).to(pixels.device)
        self.model.train()
        mean, std = (
            torch.tensor(values, device=pixels.device).view(3, 1, 1)
            for values in (detector.config.image_mean, detector.config.image_std)
        )
        self.pixels = (pixels / 255 - mean) / std
        self.labels = [
            {"class_labels": t["labels"].to(pixels.device), "boxes": t["boxes"].to(pixels.device)}
            for t in targets
        ]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        settings = PUBLISHED[variant]
        self.optimizer = AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )

    def __call__(self) -> Tensor:
        """One step."""
        loss = self.model(pixel_values=self.pixels, labels=self.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def generated_batch(
    batch_size: int, size: int, *, num_classes: int = 80, boxes_an_image: int = 8
) -> tuple[Tensor, list[Target]]:
    """Random pictures, uint8, and around `boxes_an_image` boxes each, on the host."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator)
    targets: list[Target] = []
    for index in range(batch_size):
        n = boxes_an_image + (-1) ** index * (index % 4)
        centre = torch.rand(n, 2, generator=generator) * 0.8 + 0.1
        side = torch.rand(n, 2, generator=generator) * 0.2 + 0.02
        labels = torch.randint(0, num_classes, (n,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat([centre, side], dim=1)})
    return pixels, targets


def measure_variant(
    variant: str, *, batch_size: int, size: int | None, rounds: int, device: str
) -> dict[str, Any]:
    """Times, losses and host reads of both steps."""
    torch.manual_seed(0)
    detector = DEIMv2.from_variant(variant).to(device)
    size = size or detector.config.image_size[0]
    pixels, targets = generated_batch(batch_size, size)
    pixels = pixels.to(device)
    steps: dict[str, Step] = {
        # The port first: it copies weights that ours then trains.
        "transformers": PortStep(detector, pixels, targets, variant),
        "thawline": OurStep(detector, pixels, targets, variant),
    }
    losses = {name: float(step()) for name, step in steps.items()}
    samples = paired_rounds(steps, rounds=rounds, warmup=2)
    reads = {name: HostReads.of(step, [*step.parameters, pixels]) for name, step in steps.items()}
    clock = "wall" if device == "cpu" else "cuda"
    return {
        "size": size,
        "batch_size": batch_size,
        "boxes": [len(target["labels"]) for target in targets],
        "first_loss": losses,
        "seconds": {
            name: statistics.median(getattr(sample, clock) for sample in taken)
            for name, taken in samples.items()
        },
        "of_transformers": median_ratio(samples["thawline"], samples["transformers"], clock),
        "of_transformers_by_round": [
            round(getattr(ours, clock) / getattr(theirs, clock), 3)
            for ours, theirs in zip(samples["thawline"], samples["transformers"], strict=True)
        ],
        "goal": GOALS.get(variant),
        "host_reads": {name: found.by_place for name, found in reads.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    args = _parser().parse_args(argv)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "bench": "train-step",
        "command": "python -m thawline.bench.train_step",
        "device": args.device,
        "machine": machine_stamp(),
        "rounds": args.rounds,
        "variants": _read(args.out) if args.keep else {},
    }
    for variant in args.variants:
        results["variants"][variant] = measure_variant(
            variant, batch_size=args.batch_size, size=args.size, rounds=args.rounds, device=args.device
        )
        write_results(args.out, results)
    sys.stdout.write(_table(results) + "\n")
    return 0


def _read(file: Path | None) -> dict[str, Any]:
    if file is None or not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8"))["variants"]


def _table(results: dict[str, Any]) -> str:
    lines = [
        "| size | transformers s | thawline s | ratio | goal | waits a step: transformers, thawline |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["variants"].items():
        seconds, reads = row["seconds"], row["host_reads"]
        waits = ", ".join(str(sum(reads[which].values())) for which in ("transformers", "thawline"))
        lines.append(
            f"| {name} | {seconds['transformers']:.3f} | {seconds['thawline']:.3f} | "
            f"{row['of_transformers']:.3f} | {row['goal'] or '–'} | {waits} |"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="thawline bench train-step", description="What a detector's training step costs."
    )
    parser.add_argument("--variants", nargs="+", choices=PUBLISHED, default=list(GOALS))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--size", type=int, help="side of the pictures; default: the published one")
    parser.add_argument("--rounds", type=int, default=10, help="paired rounds")
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--keep", action="store_true", help="keep the other sizes' results in --out")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
