"""Three questions about words, taught to a frozen base, and what a step of learning them costs."""

from __future__ import annotations

__all__ = ["run"]

import copy
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from thawline.bench.methods import Adapt, attach
from thawline.demo.toy_tasks import TASKS, make_rows, save_rows
from thawline.demo.words import save_base
from thawline.measure import median_ratio, paired_rounds, saved_bytes
from thawline.recipe import RunConfig
from thawline.run import RunResult
from thawline.run import run as run_recipe
from thawline.tables import aligned

logger = logging.getLogger(__name__)

TUNERS: dict[str, dict[str, Any]] = {
    "frozen": {"tuner": "frozen"},
    "lora": {"tuner": {"method": "lora", "r": 8}, "lr": 1e-2},
    "paca": {"tuner": {"method": "paca", "r": 16}, "lr": 1e-2},
}
"""Each with the better of 3e-3 and 1e-2; at 3e-2 both are worse."""
VARIANTS = {"frozen": "floor", "lora": "lora", "paca": "paca"}
N_TRAIN, N_TEST = 400, 100


def run(folder: Path, *, pretraining_steps: int = 250, rounds: int = 15) -> str:
    """Make base and tasks in `folder`, train, measure.

    Args:
        pretraining_steps: of the base.
        rounds: paired measurements of a training step.
    Returns: a table, what it shows, and what to type next.
    """
    logger.info("1/3  A base: a tiny Llama reads made-up words")
    base, tokenizer = save_base(folder / "base", pretraining_steps)
    rows = write_tasks(folder / "tasks")

    logger.info("2/3  Three questions it was never asked: %s", ", ".join(TASKS))
    results = {name: _train(name, folder) for name in TUNERS}

    logger.info("3/3  What a training step costs, in paired rounds")
    costs = measure(base, tokenizer, rows[:32], rounds)
    return f"{_table(results, costs)}\n\n{_next(folder)}"


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """A file of rows for every task; returns all training rows, shuffled."""
    rng = random.Random(1)
    train = []
    for task in TASKS:
        rows = make_rows(task, N_TRAIN, N_TEST, rng)
        save_rows(folder, rows)
        train += rows[:N_TRAIN]
    rng.shuffle(train)
    return train


def measure(
    base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], rounds: int
) -> dict[str, tuple[float, int]]:
    """Step time over the frozen floor's, and bytes kept for backward, on one batch: tuner → both.

    The floor runs backward through the whole network too, and trains nothing.
    """
    texts = [f"{row['input']}\n{row['output']}" for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    adapt = Adapt(entry="model.embed_tokens", targets="all-linear")
    steps: dict[str, Callable[[], object]] = {}
    kept = {}
    for name, variant in VARIANTS.items():
        model = attach(variant, copy.deepcopy(base), adapt)

        def forward(model: torch.nn.Module = model) -> Tensor:
            loss: Tensor = model(**batch, labels=batch.input_ids).loss
            return loss

        steps[name] = _step(forward, [p for p in model.parameters() if p.requires_grad])
        kept[name] = saved_bytes(forward, model.parameters())
    samples = paired_rounds(steps, rounds=rounds, steps_per_round=3)
    return {name: (median_ratio(samples[name], samples["frozen"]), kept[name]) for name in steps}


def _step(forward: Callable[[], Tensor], trainable: list[torch.nn.Parameter]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, fused=True) if trainable else None

    def step() -> None:
        forward().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _train(name: str, folder: Path) -> RunResult:
    """Through the same call as `thawline train`."""
    settings = TUNERS[name]
    recipe = {
        "name": name,
        "folder": str(folder),
        "base": str(folder / "base"),
        "data": {"path": str(folder / "tasks"), "max_length": 32},
        "tuner": settings["tuner"],
        "training": {
            "epochs": 4,
            "batch_size": 32,
            "lr": settings.get("lr"),
            "eval_batch_size": 64,
            "eval_every": "end",
            "save_every": "end",
        },
    }
    return run_recipe(RunConfig.from_mapping(recipe))


def _table(results: dict[str, RunResult], costs: dict[str, tuple[float, int]]) -> str:
    head = ("tuner", "trainable", "accuracy", *TASKS, "step / floor", "kept for backward")
    lines = [head]
    for name, result in results.items():
        ratio, kept = costs[name]
        parts = [f"{result.parts[task]['choice_accuracy']:.2f}" for task in TASKS]
        accuracy = f"{result.metrics['choice_accuracy']:.2f}"
        lines.append(
            (name, f"{result.trainable:,}", accuracy, *parts, f"{ratio:.2f}", f"{kept / 2**20:.2f} MiB")
        )
    chance = sum(1 / len(choices) for choices, _ in TASKS.values()) / len(TASKS)
    return (
        f"{aligned(lines)}\n\n"
        f"Accuracy on {N_TEST} held-out words a task; guessing reaches {chance:.2f}. LoRA at r=8, PaCA\n"
        "at r=16 train about as many parameters. Step: forward, backward and optimiser on 32 rows,\n"
        "median of paired rounds over the frozen floor, which trains nothing. A network so small\n"
        "shows overhead more than arithmetic; `thawline bench tuners` measures larger ones."
    )


def _next(folder: Path) -> str:
    return (
        "Next:\n"
        f'  thawline predict {folder}/paca "end banodi" --choices a,e,i,o,u\n'
        f"  thawline train --config {folder}/paca/config.yaml --name paca-r4 --tuner.r 4\n"
        f"  thawline eval {folder}/lora"
    )
