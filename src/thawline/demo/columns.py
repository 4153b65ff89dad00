"""PaCA demo: a frozen base learns three questions about words; the cost of a training step is measured."""

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
from thawline.demo.words import save_base, train
from thawline.measure import median_ratio, paired_rounds, saved_bytes
from thawline.run import RunResult
from thawline.tables import aligned

logger = logging.getLogger(__name__)

TUNERS: dict[str, tuple[dict[str, Any], float | None]] = {
    "frozen": ({"method": "frozen"}, None),
    "lora": ({"method": "lora", "r": 8}, 1e-2),
    "paca": ({"method": "paca", "r": 16}, 1e-2),
}
"""Tuner and learning rate of each run, the better of 3e-3 and 1e-2; at 3e-2 both tuners are worse."""
METHODS = {"frozen": "floor", "lora": "lora", "paca": "paca"}
"""Tuner → method of `thawline.bench.methods` that measures its step."""
N_TRAIN, N_TEST = 400, 100


def run(folder: Path, *, pretraining_steps: int = 250, rounds: int = 15) -> str:
    """Create the base and the tasks in `folder`, train, and measure.

    Args:
        pretraining_steps: training steps of the base.
        rounds: paired measurements of a training step.
    Returns: a table, its explanation, and the commands to try next.
    """
    logger.info("1/3  A base: a tiny Llama reads made-up words")
    base, tokenizer = save_base(folder / "base", pretraining_steps)
    rows = write_tasks(folder / "tasks")

    logger.info("2/3  Three questions it was never asked: %s", ", ".join(TASKS))
    results = {
        name: train(name, folder, tuner, epochs=4, batch_size=32, lr=lr, eval_batch_size=64)
        for name, (tuner, lr) in TUNERS.items()
    }

    logger.info("3/3  What a training step costs, in paired rounds")
    costs = measure(base, tokenizer, rows[:32], rounds)
    return f"{_table(results, costs)}\n\n{_next(folder)}"


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """Write a file of rows for every task; return all training rows, shuffled."""
    rng = random.Random(1)
    train_rows = []
    for task in TASKS:
        rows = make_rows(task, N_TRAIN, N_TEST, rng)
        save_rows(folder, rows)
        train_rows += rows[:N_TRAIN]
    rng.shuffle(train_rows)
    return train_rows


def measure(
    base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], rounds: int
) -> dict[str, tuple[float, int]]:
    """Measure a step on one batch: tuner → time relative to the frozen floor, bytes kept for backward.

    The floor also runs backward through the whole network, and trains nothing.
    """
    texts = [f"{row['input']}\n{row['output']}" for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    adapt = Adapt(entry="model.embed_tokens", targets="all-linear")
    steps: dict[str, Callable[[], object]] = {}
    kept = {}
    for name, method in METHODS.items():
        model = attach(method, copy.deepcopy(base), adapt)

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
