"""A new domain from few images: by the skills of other datasets, and without them.

    python benchmarks/few_images.py --base runs/base --keep runs/few --data shapes cards --seeds 0 1 2

For each new set, MHR first learns skills on the sets of --skills but this one, on the frozen base. Then a
domain of the new set is trained from --images of its images, which the seed draws, and judged on all of its
held-out ones; one thread, fp32, the derived schedule.

    z       from the skills: their mixture for the new set, and class heads
    mu      from the skills: one adapter that starts as their average, and class heads
    full    from the skills: all of them, their mixture, and class heads
    heads   class heads alone              paca    three columns of every layer, and class heads
    whole   the whole detector, fine-tuned
    @F      after an arm: F times the derived learning rate

Rows are appended to <out>.rows.jsonl as they come, so that a stopped study resumes.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from domains import Job, prepare, summarise, train
from harness import Rows, study_parser, study_results
from thawline.measure import write_results

SKILLS = "skills"
"""Arm of the runs that learn skills for a new set on the others."""


def main() -> None:
    parser = study_parser(__doc__, "few-images.json")
    parser.add_argument("--base", type=Path, required=True, help="Trained detector.")
    parser.add_argument("--keep", type=Path, required=True, help="Folder for runs.")
    parser.add_argument("--data", nargs="+", default=["shapes", "cards"], help="New sets.")
    parser.add_argument(
        "--skills", nargs="+", default=["bccd", "cards", "aerial_cars"], help="Sets of skills."
    )
    parser.add_argument("--arms", nargs="*", default=["z", "mu", "full", "heads", "paca", "whole"])
    parser.add_argument("--images", type=int, default=16, help="Training images of a new set.")
    parser.add_argument("--epochs", type=int, default=40, help="On a new set.")
    parser.add_argument("--skill-images", type=int, default=96, help="Training images of each set of skills.")
    parser.add_argument("--skill-epochs", type=int, default=12)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    paths = {name: prepare(name, args.shared, args.keep / "sets") for name in (*args.data, *args.skills)}
    call = partial(train_one, base=args.base, keep=args.keep, paths=paths, skills=args.skills)
    rows = Rows(args.out, Job)
    learned = [Job(data, SKILLS, args.skill_epochs, 0, args.skill_images) for data in args.data]
    jobs = [
        Job(data, arm, args.epochs, seed, args.images)
        for seed in args.seeds
        for data in args.data
        for arm in args.arms
    ]
    for stage in (learned, jobs):
        rows.run(call, stage, workers=args.workers, jobs_per_process=1)
    table = summarise({job: row for job, row in rows.done.items() if job.arm != SKILLS})
    write_results(args.out, study_results("few_images.py", table=table))


def train_one(job: Job, base: Path, keep: Path, paths: dict[str, Path], skills: list[str]) -> dict[str, Any]:
    """Train and evaluate once; the run's folder is kept."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    name = run_name(job)
    shutil.rmtree(keep / "runs" / name, ignore_errors=True)
    arm, _, factor = job.arm.partition("@")
    data = [one for one in skills if one != job.data] if arm == SKILLS else [job.data]
    start = time.process_time()
    result = train(
        {
            "objective": "detection",
            "base": {"variant": "atto", "weights": str(base)},
            "tuner": tuner(arm, keep / "runs" / f"{job.data}-{SKILLS}"),
            "domain": None if arm in (SKILLS, "whole") else job.data,
            "data": {"path": [str(paths[one]) for one in data], "format": "coco", "max_images": job.n_images},
            "training": {
                "epochs": job.epochs, "save_every": "end", "eval_every": "end", "workers": 0,
                "precision": "fp32", "log_every": 10_000, "args": {"disable_tqdm": True},
            },
            "folder": str(keep / "runs"), "name": name, "seed": job.seed,
        } | ({"rate_factor": float(factor)} if factor else {})
    )  # fmt: skip
    domain = result.folder / "domains" / job.data
    stored = domain if domain.is_dir() else result.folder / "model"
    return {
        "AP": round(result.metrics["AP"], 5), "AP50": round(result.metrics["AP50"], 5),
        "trained": result.trainable, "lr": float(factor or 1), "steps": result.steps,
        "bytes": sum(file.stat().st_size for file in stored.rglob("*") if file.is_file()),
        "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def run_name(job: Job) -> str:
    if job.arm == SKILLS:
        return f"{job.data}-{SKILLS}"
    return f"{job.data}-{job.arm}-{job.n_images}-{job.epochs}-{job.seed}"


def tuner(arm: str, skills: Path) -> Any:
    """Return the tuner of an arm; `skills` is the run that learned them for the new set."""
    if arm in ("z", "mu", "full"):
        return {"method": "mhr", "start_from": str(skills), "adapt": arm}
    return {
        SKILLS: {"method": "mhr", "r": 4, "n_skills": 4},
        "paca": {"method": "paca", "r": 3},
        "heads": "frozen",
        "whole": "none",
    }[arm]


if __name__ == "__main__":
    main()
