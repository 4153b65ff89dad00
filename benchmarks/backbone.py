"""Cost of a detector's backbone in training: all of it, adapted by LoRA or PaCA, or frozen.

    python benchmarks/backbone.py --variant s --out benchmarks/results/backbone.json

A step is that of `thawline train` with the tuner on the pretrained part of the backbone: forward, losses,
backward, clipping, fused AdamW. Encoder, decoder and the convolutions beside a ViT train in every form. Each
is a detector of its own from one seed, on the same images and boxes; memory and operations are read from one
step, then all are timed in paired rounds.
"""

from __future__ import annotations

__all__ = ["TUNERS", "main", "measure_backbone"]

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness import study_results
from thawline.bench.harness import bench_parser, markdown, use_device
from thawline.bench.train_step import OurStep, generated_batch
from thawline.data.detection.collate import to_float
from thawline.measure import (
    count_ops,
    live_bytes,
    median_ratio,
    median_seconds,
    paired_rounds,
    saved_bytes,
    write_results,
)
from thawline.models.deimv2.loss.targets import Target
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.published import PUBLISHED
from thawline.recipe import Frozen, Full, Lora, Paca, TunerSettings

TUNERS: dict[str, TunerSettings] = {
    "none": Full(),
    "lora": Lora(r=8),
    "paca": Paca(r=16),
    "frozen": Frozen(),
}
"""Name → the tuner's section of a recipe. The first is the yardstick; LoRA and PaCA train about as much."""


def measure_backbone(
    variant: str, *, batch_size: int, size: int | None = None, rounds: int = 10, device: str = "cpu"
) -> dict[str, Any]:
    """Measure a step of one size under every tuner.

    Args:
        variant: a size of DEIMv2.
        batch_size: images a step.
        size: side of the images, pixels; None: the published one.
        rounds: paired timing rounds; 0 leaves the times out.
        device: "cpu" or "cuda".
    Returns: a JSON-ready record. Per tuner: `trainable` parameters, in all and in the backbone; bytes `saved`
        for backward, by the whole step and by the backbone alone, of `gradients`, and `resident` ones
        (weights, optimiser state, a tuner's own stores); `ops` dispatched; `seconds`, their ratio to "none".
    """
    steps: dict[str, OurStep] = {}
    rows: dict[str, dict[str, Any]] = {}
    size = size or DEIMv2.from_variant(variant).config.image_size[0]
    pixels, targets = generated_batch(batch_size, size)
    pixels = pixels.to(device)
    before = live_bytes()
    for name, tuner in TUNERS.items():
        torch.manual_seed(0)
        detector = DEIMv2.from_variant(variant).to(device)
        steps[name] = OurStep(detector, pixels, targets, variant, tuner)
        rows[name] = read_step(steps[name])
        after = live_bytes()
        rows[name]["bytes"]["resident"] = after - before
        before = after
    if rounds:
        samples = paired_rounds(steps, rounds=rounds, warmup=1)
        clock = "wall" if device == "cpu" else "cuda"
        first = next(iter(steps))
        for name, row in rows.items():
            row["seconds"] = median_seconds(samples[name], clock)
            row[f"time_of_{first}"] = median_ratio(samples[name], samples[first], clock)
    return {"size": size, "batch_size": batch_size, "boxes": _counts(targets), "tuners": rows}


def read_step(step: OurStep) -> dict[str, Any]:
    """Read everything but time, after one step that builds lazy state."""
    step()
    forward, loss = count_ops(step.loss)
    backward, _ = count_ops(loss.backward)
    gradients = sum(p.grad.nbytes for p in step.parameters if p.grad is not None)
    step.update()
    backbone, config = step.detector.backbone, step.detector.config
    inputs = to_float(step.pixels, mean=config.image_mean, std=config.image_std)
    own = [*step.detector.parameters(), *step.detector.buffers()]

    def maps() -> Tensor:
        # Adding up keeps nothing for backward.
        return torch.stack([found.sum() for found in backbone(inputs)]).sum()

    return {
        "trainable": sum(p.numel() for p in step.parameters),
        "trainable_in_backbone": sum(p.numel() for p in backbone.parameters() if p.requires_grad),
        "bytes": {
            "saved": saved_bytes(step.loss, own),
            "saved_by_backbone": saved_bytes(maps, own),
            "gradients": gradients,
        },
        "ops": {"forward": forward, "backward": backward},
        "loss": float(loss.detach()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    args = _parser().parse_args(argv)
    use_device(args)
    measured = measure_backbone(
        args.variant, batch_size=args.batch_size, size=args.size, rounds=args.rounds, device=args.device
    )
    settings = {"variant": args.variant, "rounds": args.rounds}
    results = study_results(__file__, bench="backbone", device=args.device, **settings, **measured)
    options = settings | {"batch_size": args.batch_size} | ({"size": args.size} if args.size else {})
    results["command"] += "".join(f" --{name} {value}" for name, value in options.items())
    write_results(args.out, results)
    sys.stdout.write(_table(measured) + "\n")
    return 0


def _counts(targets: list[Target]) -> list[int]:
    return [len(target["labels"]) for target in targets]


def _table(measured: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    rows = measured["tuners"]
    first = next(iter(rows))
    timed = "seconds" in rows[first]
    head = ["tuner", "trained in the backbone", "saved MiB", "of it backbone", "resident MiB", "ops f/b"]
    head += ["s", f"× {first}"] if timed else []
    lines = []
    for name, row in rows.items():
        kept = {key: f"{n / 2**20:.0f}" for key, n in row["bytes"].items()}
        cells = [name, f"{row['trainable_in_backbone']:,}", kept["saved"], kept["saved_by_backbone"]]
        cells += [kept["resident"], f"{row['ops']['forward']}/{row['ops']['backward']}"]
        cells += [f"{row['seconds']:.2f}", f"{row[f'time_of_{first}']:.3f}"] if timed else []
        lines.append(cells)
    return markdown(head, lines)


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser("backbone", "Cost of a detector's backbone in training.")
    parser.prog = "backbone.py"
    parser.add_argument("--variant", choices=PUBLISHED, default="s")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--size", type=int, help="Side of the images. Default: the published one.")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
