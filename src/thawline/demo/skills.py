"""MHR demo: six tasks that rewrite words share skills, and two new tasks recombine them."""

from __future__ import annotations

__all__ = ["run"]

import logging
import random
from pathlib import Path
from typing import Any

from thawline.demo.toy_tasks import REWRITES, make_rewrites, save_rows
from thawline.demo.words import save_base, train
from thawline.run import RunResult
from thawline.tables import aligned

logger = logging.getLogger(__name__)

UNSEEN = ("round-plural", "hard-plural")
SEEN = tuple(task for task in REWRITES if task not in UNSEEN)
TUNERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4},
    "poly": {"method": "poly", "r": 4, "n_skills": 4},
    "mhr": {"method": "mhr", "r": 4, "n_skills": 4},
}
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "poly": ("poly", {"adapt": "full"}),
    "mhr": ("mhr", {"adapt": "full"}),
    "mhr-z": ("mhr", {"adapt": "z"}),
}
"""Row of the table → the run whose skills it starts from, and the tuner's settings."""
N_TRAIN, N_TEST, SHOTS = 400, 100, 8


def run(folder: Path, *, pretraining_steps: int = 250, steps: int = 250, adaptation_steps: int = 80) -> str:
    """Create the base and the tasks in `folder`, train on six tasks, adapt to two.

    Returns: a table, its explanation, and the commands to try next.
    """
    logger.info("1/3  A base: a tiny Llama reads made-up words")
    save_base(folder / "base", pretraining_steps)
    rng = random.Random(1)
    for task in REWRITES:
        save_rows(folder / "tasks", make_rewrites(task, N_TRAIN, N_TEST, rng))

    logger.info("2/3  Six tasks at once: %s", ", ".join(SEEN))
    seen = {}
    for name, tuner in TUNERS.items():
        training = {"max_steps": steps, "batch_size": 32, "lr": 1e-2}
        data = {"tasks": list(SEEN), "sampling": "equal"}
        seen[name] = train(name, folder, tuner, data=data, eval_batch_size=128, **training)

    logger.info("3/3  %d examples of each of two unseen ones: %s", SHOTS, ", ".join(UNSEEN))
    unseen = {}
    for name, (source, how) in ADAPTED.items():
        tuner = {"method": TUNERS[source]["method"], "start_from": str(seen[source].folder), **how}
        training = {"max_steps": adaptation_steps, "batch_size": SHOTS, "lr": 3e-3}
        unseen[name] = [
            train(
                f"{name}-{task}",
                folder,
                tuner,
                data={"tasks": [task], "shots": SHOTS},
                eval_batch_size=128,
                **training,
            )
            for task in UNSEEN
        ]
    return f"{_table(seen, unseen)}\n\n{_next(folder)}"


def _table(seen: dict[str, RunResult], unseen: dict[str, list[RunResult]]) -> str:
    def score(result: RunResult) -> str:
        return f"{result.metrics['exact_match']:.2f}"

    rows = [["", "six tasks at once", *UNSEEN, "trained for these"]]
    for name, results in unseen.items():
        of_six = score(seen[name]) if name in seen else ""
        rows.append([name, of_six, *map(score, results), f"{results[0].trainable:,}"])
    return (
        f"{aligned(rows)}\n\n"
        f"Share of {N_TEST} held-out words per task that are written correctly. banodi is bonodos in\n"
        "round-plural and tatotis in hard-plural: each half is known from other tasks, the two together\n"
        "are not.\n"
        f"The unseen ones are learned from {SHOTS} examples each. A word does not say which task is meant:\n"
        "LoRA, one adapter for all six, can only guess there; on a new task it has only that one to learn.\n"
        "z trains the mixing of the skills and nothing else."
    )


def _next(folder: Path) -> str:
    return (
        "Next:\n"
        f"  thawline predict {folder}/mhr banodi --task hard-short\n"
        f"  thawline eval {folder}/mhr\n"
        f"  thawline align {folder}/mhr\n"
        f"  thawline train --config {folder}/mhr-z-{UNSEEN[0]}/config.yaml --name mhr-mu --tuner.adapt mu"
    )
