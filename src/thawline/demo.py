"""`thawline demo`: the main job, offline, in a minute or two.

Makes a small base (a Llama that has learned to spell made-up words), freezes it, and teaches it three
questions about words: untouched, with LoRA and with PaCA. Then measures what a training step of each costs.
"""

from __future__ import annotations

__all__ = ["run_demo"]

import copy
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thawline.bench.measure import median_ratio, paired_rounds, saved_bytes
from thawline.bench.variants import Adapt, attach
from thawline.data.toy import ALPHABET, TASKS, make_rows, make_word
from thawline.recipe import RunConfig
from thawline.run import RunResult, run

logger = logging.getLogger(__name__)

TUNERS: dict[str, dict[str, Any]] = {
    "frozen": {"tuner": "frozen"},
    "lora": {"tuner": {"method": "lora", "r": 8}, "lr": 1e-2},
    "paca": {"tuner": {"method": "paca", "r": 16}, "lr": 1e-2},
}
"""Each with the better of 3e-3 and 1e-2; at 3e-2 both are worse."""
VARIANTS = {"frozen": "floor", "lora": "lora", "paca": "paca"}
N_TRAIN, N_TEST = 400, 100


def run_demo(folder: Path, *, pretraining_steps: int = 250, rounds: int = 15) -> str:
    """Make base and tasks in `folder`, train, measure.

    Args:
        folder: made; where it is taken, the next free "folder-2", "folder-3", … is.
        pretraining_steps: of the base.
        rounds: paired measurements of a training step.
    Returns: a table, what it shows, and what to type next.
    """
    folder = _free(folder)
    torch.set_num_threads(1)  # networks this small are several times faster so
    logger.info("1/3  A base: a tiny Llama reads made-up words")
    tokenizer = build_tokenizer()
    base = pretrain(tokenizer, pretraining_steps)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = write_tasks(folder / "tasks")

    logger.info("2/3  Three questions it was never asked: %s", ", ".join(TASKS))
    results = {name: _train(name, folder) for name in TUNERS}

    logger.info("3/3  What a training step costs, in paired rounds")
    costs = measure(base, tokenizer, rows[:32], rounds)
    text = f"{_table(results, costs)}\n\n{_next(folder)}"
    (folder / "demo.txt").write_text(text + "\n", encoding="utf-8")
    return text


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(("</s>", "<unk>", *ALPHABET))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """A Llama of some 250,000 parameters that has read words, each twice."""
    torch.manual_seed(0)
    rng = random.Random(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    progress = tqdm(range(steps), unit="step", desc="pretraining")
    for step in progress:
        words = [make_word(rng) for _ in range(32)]
        batch = tokenizer([f"{word}\n{word}" for word in words], padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")
    return model


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """A file of rows for every task; returns all training rows, shuffled."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    train = []
    for task in TASKS:
        rows = make_rows(task, N_TRAIN, N_TEST, rng)
        lines = [json.dumps(row) for row in rows]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
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
    return run(RunConfig.from_mapping(recipe))


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
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    chance = sum(1 / len(choices) for choices, _ in TASKS.values()) / len(TASKS)
    return (
        f"{text}\n\n"
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


def _free(folder: Path) -> Path:
    """`folder`, or the next name that is not taken: nothing is overwritten."""
    candidate, n = folder, 2
    while candidate.exists():
        candidate, n = folder.with_name(f"{folder.name}-{n}"), n + 1
    return candidate
