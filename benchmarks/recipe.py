"""What each part of the derived detection recipe is worth on small sets, by budget.

    python benchmarks/recipe.py --shared ../shared --arms derived before+batch8 --budgets 10 --data bccd

One run: Atto (or --variant) from random weights at 320 × 320 (or --size) on 160 images of a set (all, where
it has fewer), fp32, one thread, with the derived schedule for the epochs of the budget and the changes of an
arm. An arm joins changes by "+":

    derived        the derived recipe as it is
    before         the scaled published recipe, without the rules for short runs, at the derived batch
    lr4            all rates × 4               bb2       the backbone's rate × 2 more
    plain          flips only                  nomosaic  no Mosaic, MixUp, CopyBlend
    nocolour, nozoom, nocrop                   one operation off
    strong.5       strong augmentation ends after half of the epochs (mosaic.5: Mosaic alone)
    batch16        images per step             warm.1    warm-up, share of the run
    flat.5         end of the full rate, share of the run
    final.1        share of the run at the final rate          gamma.05  final rate over full rate
    ema.05         reach of the average, share of the run
    match.5        share of the run after which matching is by overlap alone (match1: never)
    wd.01, clip1   weight decay, gradient clipping             box1      smallest box trained on, pixels
    beta.99        AdamW's second beta                         bn.03     momentum of batch norms
    focal, vfl     classification loss                         dn200     denoising queries

AP is of the averaged weights at the end of the run (`AP`), and of the raw ones (`raw_AP`). Rows are appended
to <out>.rows.jsonl as they come, so that a stopped study resumes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import Rows, study_parser, study_results
from thawline.measure import write_results

N_IMAGES = 160
SIZE = 320
ELSEWHERE = ("derived", "batch", "bn", "focal", "vfl", "dn")
"""Changes of an arm that `train_one` makes."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    data: str
    epochs: int
    arm: str
    seed: int = 0
    variant: str = "atto"
    n_images: int = N_IMAGES
    size: int = SIZE


def main() -> None:
    parser = runs_parser(__doc__, "recipe.json")
    parser.add_argument("--arms", nargs="*", default=["derived"], help="Changes of the recipe.")
    args = parser.parse_args()
    rows = Rows(args.out, Job)
    jobs = [
        Job(data, epochs, arm, seed, args.variant, args.images, args.size)
        for seed in args.seeds
        for epochs in args.budgets
        for data in args.data
        for arm in args.arms
    ]
    rows.run(partial(train_one, shared=args.shared), jobs, workers=args.workers, jobs_per_process=1)
    write_results(args.out, study_results("recipe.py", table=summarise(rows.done)))


def runs_parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Options of a study whose runs are a `Job` each, but for its arms."""
    parser = study_parser(doc, out)
    parser.add_argument("--data", nargs="+", default=["bccd"], help="Sets in data/detection.")
    parser.add_argument("--budgets", nargs="+", type=int, default=[10], help="Epochs.")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="None: only the results file.")
    parser.add_argument("--variant", default="atto", help="Size of the detector.")
    parser.add_argument("--images", type=int, default=N_IMAGES, help="Training images.")
    parser.add_argument("--size", type=int, default=SIZE, help="Side of the input, pixels.")
    return parser


def train_one(job: Job, shared: Path) -> dict[str, Any]:
    """Train and evaluate once."""
    import torch
    import transformers

    from thawline.training.detection.schedule import DetectionSchedule
    from thawline.training.objective import build_objective

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    start = time.process_time()
    folder = Path(tempfile.mkdtemp(prefix="recipe-"))
    config = run_config(job, shared, folder)
    torch.manual_seed(job.seed)
    transformers.set_seed(job.seed)
    objective: Any = build_objective(config)
    schedule: DetectionSchedule = objective.schedule
    objective.__dict__["schedule"] = replace(schedule, settings=changed(schedule, job))
    model = objective.build_model()
    if momentum := re.search(r"bn([\d.]+)", job.arm):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = float(momentum[1])
    trainer = objective.build_trainer(model, [])
    trainer.train()
    s = objective.schedule.settings
    raw = objective.measure(trainer.evaluated_model, 2 * s.batch_size)[0].statistics
    outcome = {"raw_AP": raw["AP"], "raw_AP50": raw["AP50"]}
    if trainer.average is not None:
        with trainer.average.applied():
            found = objective.measure(trainer.evaluated_model, 2 * s.batch_size)[0].statistics
        outcome = {"AP": found["AP"], "AP50": found["AP50"], **outcome}
    shutil.rmtree(folder)
    return {
        **{k: round(v, 5) for k, v in outcome.items()},
        "steps": trainer.state.global_step,
        "lr": s.lr,
        "batch": s.batch_size,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def run_config(job: Job, shared: Path, folder: Path) -> Any:
    """Return the recipe of a job, which saves to `folder`."""
    from thawline.recipe import RunConfig

    batch, denoising = (re.search(rf"{name}(\d+)", job.arm) for name in ("batch", "dn"))
    class_loss = next((name for name in ("focal", "vfl") if name in job.arm), "mal")
    return RunConfig.from_mapping(
        {
            "objective": {"kind": "detection", "class_loss": class_loss},
            "base": {
                "variant": job.variant, "size": job.size,
                "overrides": {"num_denoising": int(denoising[1])} if denoising else {},
            },
            "tuner": "none",
            "data": {
                "path": str(shared / "data" / "detection" / job.data), "format": "coco",
                "max_images": job.n_images,
            },
            "training": {
                "epochs": job.epochs, "save_every": "end", "eval_every": "end", "workers": 0,
                "precision": "fp32", "log_every": 10_000, "args": {"disable_tqdm": True},
                "batch_size": int(batch[1]) if batch else None,
            },
            "folder": str(folder), "name": "run", "seed": job.seed,
        }
    )  # fmt: skip


def changed(schedule: Any, job: Job) -> Any:
    """Return the settings of a schedule with the changes of a job's arm."""
    from thawline.recipe.resolved import NEVER, Window

    s, n_steps = schedule.settings, schedule.n_steps
    for change in job.arm.split("+"):
        match = re.fullmatch(r"([a-z]+)([\d.]*)", change)
        if match is None:
            raise SystemExit(f"Cannot read the change {change!r}.")
        name, value = match[1], float(match[2]) if match[2] else 1.0
        if name in ELSEWHERE:
            continue
        epoch = round(value * s.epochs)
        first = s.strong_epochs.start
        mosaic = Window(first, max(first, min(epoch, s.mosaic_epochs.stop)))
        reach = max(1.0, value * n_steps)
        no_mixing: dict[str, Any] = {"mixup_epochs": NEVER, "copyblend_epochs": NEVER}
        s = replace(s, **{
            "before": without_short_runs(s, job),
            "lr": {"lr": s.lr * value, "backbone_lr": s.backbone_lr * value},
            "bb": {"backbone_lr": s.backbone_lr * value},
            "plain": {"strong_epochs": NEVER, "mosaic_epochs": NEVER, **no_mixing},
            "nomosaic": {"mosaic_epochs": Window(first, first), **no_mixing},
            "nocolour": {"colour_prob": 0.0},
            "nozoom": {"zoom_out_prob": 0.0},
            "nocrop": {"crop_prob": 0.0},
            "strong": {"strong_epochs": Window(first, max(first, epoch)), "mosaic_epochs": mosaic},
            "mosaic": {"mosaic_epochs": mosaic},
            "warm": {"warmup_steps": max(1, round(value * n_steps))},
            "flat": {"flat_epoch": epoch},
            "final": {"no_aug_epochs": epoch},
            "gamma": {"lr_gamma": value},
            "ema": {"ema_decay": 1 - 1 / reach, "ema_warmup_steps": max(1, round(reach / 10))},
            "match": {"matcher_change_epoch": epoch},
            "wd": {"weight_decay": value},
            "clip": {"max_grad_norm": value},
            "beta": {"betas": (0.9, value)},
            "box": {"min_box_size": int(value)},
        }[name])  # fmt: skip
    return s


def without_short_runs(s: Any, job: Job) -> dict[str, Any]:
    """Return what the rules for short runs change, as it was without them."""
    from thawline.models.deimv2.published import PUBLISHED
    from thawline.training.schedule import derive_schedule

    published = PUBLISHED[job.variant]
    lr = published.lr * (s.batch_size / published.batch_size) ** 0.5
    # They are not for detectors that start from one.
    long = derive_schedule(job.epochs, variant=job.variant, n_images=job.n_images, start="detector").settings
    windows = ("strong_epochs", "mosaic_epochs", "mixup_epochs", "copyblend_epochs", "matcher_change_epoch")
    return {"lr": lr, "backbone_lr": lr, **{name: getattr(long, name) for name in windows}}


def summarise(done: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each arm."""
    groups: dict[Job, list[dict[str, Any]]] = {}
    for job, outcome in done.items():
        groups.setdefault(replace(job, seed=0), []).append(outcome)
    return [
        {
            "data": job.data, "epochs": job.epochs, "variant": job.variant, "n_images": job.n_images,
            "size": job.size, "arm": job.arm, "seeds": len(found),
            **{
                name: round(statistics.mean(row[name] for row in found if name in row), 4)
                for name in ("AP", "AP50", "raw_AP")
            },
            "AP_by_seed": [row["AP"] for row in found],
        }
        for job, found in groups.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
