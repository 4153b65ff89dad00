"""Train, adapt (PaCA, LoRA) or freeze a detector's backbone on a new set, and compare.

    python benchmarks/detection_backbone.py --shared ../shared

Protocol, fixed before the first run. DEIMv2-S (a ViT-Tiny backbone) at 192 × 192 with 100 queries and 50 for
denoising, fp32 on one thread, batch 8, flips alone for augmentation, all that trains at 5e-4; else the
derived schedule of `thawline train`. There are no pretrained weights to start from, so one detector is first
trained from random weights for 10 epochs of cards and aerial_cars together (341 images). From it bccd (292
images, 72 held out), 6 epochs each:

none      the whole backbone trains
paca      16 input columns of every linear layer of the ViT
frozen    the ViT stays
lora      rank 8 on the same layers

Encoder, decoder and the convolutions beside the ViT always train. AP is of the last evaluation, of averaged
weights. What the four cost is measured by `backbone.py`. Rows are appended to <out>.rows.jsonl as they come,
so that a stopped benchmark goes on where it was; run folders stay in --runs.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detection_real import join_sets, train_recipe
from harness import Rows, study_parser, study_results
from thawline.measure import write_results

TUNERS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "paca": {"method": "paca", "r": 16},
    "frozen": {"method": "frozen"},
    "lora": {"method": "lora", "r": 8},
}
START, START_SETS = "start", ("cards", "aerial_cars")
START_EPOCHS, EPOCHS = 10, 6
SIZE, BATCH, LR = 192, 8, 5e-4
NETWORK = {"num_queries": 100, "num_denoising": 50}


@dataclass(frozen=True)
class Job:
    """One training run: `START`, or a tuner from there."""

    method: str
    seed: int


def main() -> None:
    parser = study_parser(__doc__, "detection_backbone.json", workers=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/detection_backbone"))
    parser.add_argument("--seeds", type=int, default=1, help="runs of every tuner, all from one start")
    args = parser.parse_args()

    rows = Rows(args.out, Job)
    train = partial(train_one, shared=args.shared, runs=args.runs)
    tuned = [Job(method, seed) for seed in range(args.seeds) for method in TUNERS]
    for wave in ([Job(START, 0)], tuned):
        rows.run(train, wave, workers=args.workers, jobs_per_process=1)
        write_results(args.out, summarise(rows.done))


def train_one(job: Job, shared: Path, runs: Path) -> dict[str, Any]:
    """Train and evaluate once; return the scores and their curve."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    folder = runs / f"{job.method}-{job.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    start = time.process_time()
    outcome = train_recipe(recipe(job, shared, folder), folder)
    return {**outcome, "cpu_seconds": round(time.process_time() - start, 1)}


def recipe(job: Job, shared: Path, folder: Path) -> dict[str, Any]:
    """The recipe of a run, as a YAML file would say it."""
    sets = shared / "data" / "detection"
    base: dict[str, Any] = {"variant": "s", "size": SIZE, "overrides": NETWORK}
    if job.method == START:
        joint = join_sets(shared, folder.parent / "joint", START_SETS)
        data = {"path": str(joint), "format": "coco", "images": str(sets)}
    else:
        data = {"path": str(sets / "bccd"), "format": "coco"}
        base["weights"] = str(folder.parent / f"{START}-0" / "last")
    return {
        "objective": {"kind": "detection", "strong_augmentation": False, "multi_scale": False},
        "base": base,
        "tuner": TUNERS.get(job.method, "none"),
        "data": data,
        "training": {
            "epochs": START_EPOCHS if job.method == START else EPOCHS,
            "batch_size": BATCH,
            "lr": LR,
            "backbone_lr": LR,
            "eval_every": "end" if job.method == START else "epoch",
            "save_every": "end",
            "workers": 0,
            "precision": "fp32",
            "args": {"disable_tqdm": True},
        },
        "folder": str(folder.parent),
        "name": folder.name,
        "seed": job.seed,
    }


def summarise(done: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """Every tuner: AP over seeds, what trained, curves."""
    found: dict[str, Any] = {}
    for method in (START, *TUNERS):
        rows = [row for job, row in done.items() if job.method == method]
        if rows:
            found[method] = {
                "AP": statistics.mean(row["AP"] for row in rows),
                "AP50": statistics.mean(row["AP50"] for row in rows),
                "AP_of_seeds": [row["AP"] for row in rows],
                "AP50_by_class": rows[0]["by_class"],
                "trainable": rows[0]["trainable"],
                "images": rows[0]["images"],
                "steps": rows[0]["steps"],
                "cpu_seconds": statistics.mean(row["cpu_seconds"] for row in rows),
                "curve_epoch_AP_AP50": [row["curve"] for row in rows],
            }
    return study_results(__file__, **found)


if __name__ == "__main__":
    sys.exit(main())
