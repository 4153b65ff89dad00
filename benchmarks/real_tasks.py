"""PaCA, LoRA and full fine-tuning of a real pretrained model on real tasks, learning rates tuned for each.

    python benchmarks/real_tasks.py --shared ../shared --out benchmarks/results/real_tasks.json

Protocol, fixed before the first run:
- base: stories260K, a Llama of 260 K parameters; eight classification tasks with few choices and short rows,
  at most 500 training rows each. The answer is the choice of highest mean log-likelihood a token.
- PaCA r=15 and LoRA r=8 on all linear layers: 45,000 and 46,240 trainable parameters. LoRA's alpha is 2 r.
  PaCA with random columns, and with a block of adjacent ones in each layer.
- learning rate: for each method and task the best of three, by accuracy on a fifth of the training rows (a
  seed of its own). Test rows are not looked at. Where the grid's edge wins, the results say so.
- then three seeds on the training rows, 100 steps of 16, evaluated once on the test rows (150 of them where
  there are more).

Rows are appended to <out>.rows.jsonl as they come, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bootstrap import interval
from harness import Rows, study_parser, study_results
from thawline.measure import write_results

TASKS = (
    "clinc_out_of_scope",
    "cmudict_syllables",
    "movie_polarity",
    "name_gender",
    "nlu_calendar_intent",
    "nlu_lists_intent",
    "nlu_qa_intent",
    "pros_cons",
)
TUNERS = {
    "paca": {"method": "paca", "r": 15},
    "paca_adjacent": {"method": "paca", "r": 15, "selection": "adjacent"},
    "lora": {"method": "lora", "r": 8},
    "full": {"method": "none"},
}
LEARNING_RATES = {
    "paca": (1e-3, 3e-3, 1e-2),
    "paca_adjacent": (1e-3, 3e-3, 1e-2),
    "lora": (1e-3, 3e-3, 1e-2),
    "full": (3e-4, 1e-3, 3e-3),
}
SEEDS = (0, 1, 2)
TUNING_SEED = 100
N_TRAIN = 500
STEPS, BATCH = 100, 16


@dataclass(frozen=True)
class Job:
    """One training run; `held_out` is "validation" while tuning and "test" after."""

    task: str
    method: str
    lr: float
    seed: int
    held_out: str


def main() -> None:
    parser = study_parser(__doc__, "real_tasks.json")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    args = parser.parse_args()

    rows = Rows(args.out, Job)
    tuning = [
        Job(task, method, lr, TUNING_SEED, "validation")
        for task, method in itertools.product(args.tasks, TUNERS)
        for lr in LEARNING_RATES[method]
    ]
    train = partial(train_one, shared=args.shared)
    rows.run(train, tuning, workers=args.workers)
    best = {key: best_lr(rows.done, *key) for key in itertools.product(args.tasks, TUNERS)}
    final = [Job(task, method, lr, seed, "test") for (task, method), lr in best.items() for seed in SEEDS]
    rows.run(train, final, workers=args.workers)
    results = summarise([(job, rows.done[job]) for job in final], args.tasks)
    write_results(args.out, results)
    sys.stdout.write(table(results))


def train_one(job: Job, shared: Path) -> dict[str, Any]:
    """Train and evaluate once, through the same call as `thawline train`; the run folder is thrown away."""
    import torch
    import transformers

    from thawline.recipe import RunConfig
    from thawline.run import run

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    folder = Path(tempfile.mkdtemp())
    try:
        data = write_rows(job, shared, folder / "rows.jsonl")
        recipe = {
            "base": str(shared / "models" / "stories260K"),
            "tuner": TUNERS[job.method],
            "data": {"path": str(data), "max_length": 256, "max_eval_rows": 150},
            "training": {
                "max_steps": STEPS,
                "batch_size": BATCH,
                "lr": job.lr,
                "warmup": 0.05,
                "eval_batch_size": 64,
                "eval_every": "end",
                "save_every": "end",
                "args": {"disable_tqdm": True},
            },
            "folder": str(folder),
            "name": "run",
            "seed": job.seed,
        }
        result = run(RunConfig.from_mapping(recipe))
        return {
            "accuracy": result.metrics["choice_accuracy"],
            "loss": result.metrics["loss"],
            "trainable": result.trainable,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_rows(job: Job, shared: Path, target: Path) -> Path:
    """The task's rows for this job: the same training rows for every method, drawn by the seed."""
    lines = (shared / "data" / "text" / "tasks" / f"{job.task}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    choices = sorted({row["output"] for row in rows})
    train = [row for row in rows if row["split"] == "train"]
    random.Random(job.seed).shuffle(train)
    train = train[:N_TRAIN]
    if job.held_out == "validation":
        held_out, train = train[: len(train) // 5], train[len(train) // 5 :]
    else:
        held_out = [row for row in rows if row["split"] == "test"]
    with target.open("w") as file:
        for split, some in (("train", train), ("test", held_out)):
            for row in some:
                file.write(json.dumps({**row, "split": split, "choices": choices}) + "\n")
    return target


def best_lr(done: dict[Job, dict[str, Any]], task: str, method: str) -> float:
    """The learning rate of best accuracy on the validation rows; of equals the one of lower loss."""
    tried = [(job, row) for job, row in done.items() if job.held_out == "validation"]
    of_this = [(job, row) for job, row in tried if (job.task, job.method) == (task, method)]
    return max(of_this, key=lambda pair: (pair[1]["accuracy"], -pair[1]["loss"]))[0].lr


def summarise(rows: list[tuple[Job, dict[str, Any]]], tasks: list[str]) -> dict[str, Any]:
    """Accuracy by task and method, and paired differences with a bootstrap over tasks and seeds."""
    accuracy = {(job.task, job.method, job.seed): row["accuracy"] for job, row in rows}
    by_task = {
        task: {
            method: {
                "mean": statistics.mean(accuracy[task, method, seed] for seed in SEEDS),
                "sd": statistics.stdev(accuracy[task, method, seed] for seed in SEEDS),
                "lr": next(job.lr for job, _ in rows if (job.task, job.method) == (task, method)),
            }
            for method in TUNERS
        }
        for task in tasks
    }

    def gain_over(other: str) -> dict[str, float]:
        return difference([[accuracy[t, "paca", s] - accuracy[t, other, s] for s in SEEDS] for t in tasks])

    return {
        **study_results(__file__),
        "trainable": {job.method: row["trainable"] for job, row in rows},
        "macro": {m: statistics.mean(by_task[t][m]["mean"] for t in tasks) for m in TUNERS},
        "paca_minus": {other: gain_over(other) for other in TUNERS if other != "paca"},
        "tasks": by_task,
        "best_lr_at_the_edge": sorted(edges(by_task)),
    }


def difference(by_task: list[list[float]]) -> dict[str, float]:
    """Mean paired difference and its 95 % interval: tasks drawn with replacement, then seeds within each."""
    low, high = interval(by_task, statistics.mean)
    return {"mean": statistics.mean(statistics.mean(d) for d in by_task), "low": low, "high": high}


def edges(by_task: dict[str, Any]) -> Iterator[str]:
    """Find methods whose best learning rate was the grid's last, which might do better still."""
    for task, methods in by_task.items():
        for method, found in methods.items():
            if found["lr"] in (LEARNING_RATES[method][0], LEARNING_RATES[method][-1]):
                yield f"{task}/{method}: {found['lr']}"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: mean ± standard deviation over seeds (learning rate)."""
    lines = ["| task | " + " | ".join(TUNERS) + " |", "|---|" + "---|" * len(TUNERS)]
    for task, found in results["tasks"].items():
        cells = [f"{found[m]['mean']:.3f} ± {found[m]['sd']:.3f} ({found[m]['lr']:g})" for m in TUNERS]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    macro = " | ".join(f"**{results['macro'][m]:.3f}**" for m in TUNERS)
    lines.append(f"| **macro average** | {macro} |")
    for other, d in results["paca_minus"].items():
        lines.append(f"\nPaCA − {other}: {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
