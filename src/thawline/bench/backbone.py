"""What a detector's backbone costs in training: all of it, adapted by LoRA or PaCA, or frozen.

    python -m thawline.bench.backbone --variant s --out benchmarks/results/backbone.json

A step is that of `thawline train` with the tuner on the pretrained part of the backbone: forward, losses,
backward, clipping, fused AdamW. Encoder, decoder and the convolutions beside a ViT train in every form. Each
is a detector of its own from one seed, on the same images and boxes; memory and operations are read from one
step, then all are timed in paired rounds.
"""

from __future__ import annotations

__all__ = ["TUNERS", "main", "measure_backbone"]

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thawline.bench.train_step import OurStep, generated_batch
from thawline.data.detection.collate import to_float
from thawline.measure import (
    count_ops,
    live_bytes,
    machine_stamp,
    median_ratio,
    paired_rounds,
    saved_bytes,
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
        size: side of the pictures, pixels; None: the published one.
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
            row["seconds"] = statistics.median(getattr(sample, clock) for sample in samples[name])
            row[f"time_of_{first}"] = median_ratio(samples[name], samples[first], clock)
    return {"size": size, "batch_size": batch_size, "boxes": _counts(targets), "tuners": rows}


def read_step(step: OurStep) -> dict[str, Any]:
    """Everything but time, after one step that lets lazy state settle."""
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
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    measured = measure_backbone(
        args.variant, batch_size=args.batch_size, size=args.size, rounds=args.rounds, device=args.device
    )
    results = {
        "bench": "backbone",
        "command": f"python -m thawline.bench.backbone --variant {args.variant} "
        f"--batch_size {args.batch_size} --rounds {args.rounds}"
        + (f" --size {args.size}" if args.size else ""),
        "device": args.device,
        "machine": machine_stamp(),
        "variant": args.variant,
        "rounds": args.rounds,
        **measured,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
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
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        kept = {key: f"{n / 2**20:.0f}" for key, n in row["bytes"].items()}
        cells = [name, f"{row['trainable_in_backbone']:,}", kept["saved"], kept["saved_by_backbone"]]
        cells += [kept["resident"], f"{row['ops']['forward']}/{row['ops']['backward']}"]
        cells += [f"{row['seconds']:.2f}", f"{row[f'time_of_{first}']:.3f}"] if timed else []
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="thawline bench backbone", description="What a detector's backbone costs in training."
    )
    parser.add_argument("--variant", choices=PUBLISHED, default="s")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--size", type=int, help="side of the pictures; default: the published one")
    parser.add_argument("--rounds", type=int, default=10, help="paired rounds; 0 measures memory only")
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
