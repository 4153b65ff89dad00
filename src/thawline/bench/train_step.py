"""Cost of a detector's training step, compared with transformers' port and its own loss.

    python -m thawline.bench.train_step --out benchmarks/results/train-step.json

A step is forward, losses, backward, clipping and AdamW on the same images and boxes, from the same weights:
ours as the trainer takes it (bytes in, layout, parameter groups and optimiser of `thawline train`), the
port's as transformers' Trainer does (float pixels, its loss at its defaults, fused AdamW). Both normalise by
the batch's statistics, though the port would freeze those of its backbone. The two networks and losses differ
in details (docs/models/detect.md); the task they learn is the same.

The results also count how often a step waits for the device (`thawline.bench.host_reads`).
"""

from __future__ import annotations

__all__ = ["OurStep", "PortStep", "generated_batch", "main"]

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from thawline.bench.harness import bench_parser, bench_results, markdown, use_device
from thawline.bench.host_reads import HostReads
from thawline.bench.port import build_port
from thawline.files import read_json
from thawline.measure import median_ratio, median_seconds, paired_rounds, write_results
from thawline.models.deimv2.loss.targets import Target
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.published import PUBLISHED
from thawline.recipe import Full, TunerSettings
from thawline.training.detection.backbone import fast_parameters, tune_backbone
from thawline.training.detection.groups import build_groups
from thawline.training.detection.learner import HostTargets, Learner

GOALS = {"atto": 0.85, "pico": 0.78, "n": 0.78, "s": 0.92}
"""Goal for our time relative to the port's, on two threads, batch 4."""
EPOCH = 10
"""Any epoch before the matcher changes."""


class Step(Protocol):
    """Training step that owns its state."""

    parameters: list[nn.Parameter]

    def __call__(self) -> Tensor:
        """Take the step and return the loss."""


class OurStep:
    """Training step of `DetectionTrainer`."""

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
        """Take the step and return the loss."""
        loss = self.loss()
        loss.backward()
        self.update()
        return loss.detach()

    def loss(self) -> Tensor:
        """Run the forward and return the sum of all loss terms."""
        terms = self.learner(self.pixels, self.targets, epoch=EPOCH)
        return torch.stack(list(terms.values())).sum()

    def update(self) -> None:
        """Clip, step and clear the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()


class PortStep:
    """Training step of transformers' port with the same weights, as its Trainer takes it."""

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
        """Take the step and return the loss."""
        loss = self.model(pixel_values=self.pixels, labels=self.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def generated_batch(
    batch_size: int, size: int, *, num_classes: int = 80, boxes_an_image: int = 8
) -> tuple[Tensor, list[Target]]:
    """Generate uint8 images with about `boxes_an_image` boxes each, on the host."""
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
    variant: str, *, batch_size: int, size: int | None, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Measure times, losses and host reads of both steps."""
    torch.manual_seed(0)
    detector = DEIMv2.from_variant(variant).to(device)
    size = size or detector.config.image_size[0]
    pixels, targets = generated_batch(batch_size, size)
    pixels = pixels.to(device)
    steps: dict[str, Step] = {
        # The port first: it copies the weights that our step then trains.
        "transformers": PortStep(detector, pixels, targets, variant),
        "thawline": OurStep(detector, pixels, targets, variant),
    }
    losses = {name: float(step()) for name, step in steps.items()}
    samples = paired_rounds(steps, rounds=rounds, warmup=2)
    reads = {name: HostReads.of(step, [*step.parameters, pixels]) for name, step in steps.items()}
    clock = "wall" if device.type == "cpu" else "cuda"
    return {
        "size": size,
        "batch_size": batch_size,
        "boxes": [len(target["labels"]) for target in targets],
        "first_loss": losses,
        "seconds": {name: median_seconds(taken, clock) for name, taken in samples.items()},
        "of_transformers": median_ratio(samples["thawline"], samples["transformers"], clock),
        "of_transformers_by_round": [
            round(getattr(ours, clock) / getattr(theirs, clock), 3)
            for ours, theirs in zip(samples["thawline"], samples["transformers"], strict=True)
        ],
        "goal": GOALS.get(variant),
        "host_reads": {name: found.by_place for name, found in reads.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    args = _parser().parse_args(argv)
    device = use_device(args)
    kept = read_json(args.out).get("variants", {}) if args.keep and args.out else {}
    command = "python -m thawline.bench.train_step"
    results = bench_results("train-step", command, device, rounds=args.rounds, variants=kept)
    for variant in args.variants:
        results["variants"][variant] = measure_variant(
            variant, batch_size=args.batch_size, size=args.size, rounds=args.rounds, device=device
        )
        write_results(args.out, results)
    sys.stdout.write(_table(results) + "\n")
    return 0


def _table(results: dict[str, Any]) -> str:
    head = ["size", "transformers s", "thawline s", "ratio", "goal", "waits a step: transformers, thawline"]
    rows = []
    for name, row in results["variants"].items():
        seconds, reads = row["seconds"], row["host_reads"]
        waits = ", ".join(str(sum(reads[which].values())) for which in ("transformers", "thawline"))
        ratios = [seconds["transformers"], seconds["thawline"], row["of_transformers"]]
        rows.append([name, *(f"{value:.3f}" for value in ratios), str(row["goal"] or "–"), waits])
    return markdown(head, rows)


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser("train-step", "Cost of a detector's training step.")
    parser.add_argument("--variants", nargs="+", choices=PUBLISHED, default=list(GOALS))
    parser.add_argument("--batch_size", type=int, default=4, help="Images per step.")
    parser.add_argument("--size", type=int, help="Side of the images. Default: the published one.")
    parser.add_argument("--keep", action="store_true", help="Keep the other sizes' results in --out.")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
