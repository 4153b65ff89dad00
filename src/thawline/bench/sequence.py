"""Longest sequence and throughput of a language model within a memory budget, by method.

    python -m thawline.bench.sequence --out benchmarks/results/sequence.json

The longest sequence at a batch of one is derived by `thawline plan`, then checked by running: on a processor
the bytes that the real step keeps must be those planned, on a GPU the step must fit. QLoRA and QPaCA are
derived alone. Steps are timed in paired rounds, all methods at LoRA's longest sequence and each at its own.

The model has the proportions of Llama 3 8B at a sixteenth of its width, with four blocks, in bfloat16; the
budget is five times its weights, as 80 GB are of the 8B's. A processor is timed in float32, since few
multiply bfloat16 fast.
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from thawline.bench.harness import bench_parser, bench_results, markdown, use_device
from thawline.measure import median_ratio, median_seconds, paired_rounds, saved_bytes, write_results
from thawline.ops.lean import apply_lean
from thawline.planning.plan import Planner, cast_trained, read_bytes
from thawline.planning.search import LENGTH_STEP, METHODS, largest, variants
from thawline.recipe import RunConfig
from thawline.tuners.build import attach_tuner

CONFIG = LlamaConfig(
    vocab_size=8192, hidden_size=256, intermediate_size=896, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, architectures=["LlamaForCausalLM"],
)  # fmt: skip
COMPARED = {
    "LoRA": METHODS["LoRA"],
    "LoRA bf16": METHODS["LoRA bf16"],
    "DoRA": ({"method": "dora", "r": 8}, frozenset[str]()),
    **{name: METHODS[name] for name in ("PaCA", "PaCA + lean", "QLoRA", "QPaCA")},
}
SHARE = 5
"""Budget, in weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    args = _parser().parse_args(argv)
    device = use_device(args)
    with tempfile.TemporaryDirectory() as folder:
        CONFIG.save_pretrained(folder)
        recipe = {
            "base": {"model": folder, "dtype": "bfloat16"},
            "data": "none",
            "training": {"batch_size": 1},
        }
        methods = list(variants(RunConfig.from_mapping(recipe), COMPARED))
        budget = read_bytes(args.budget) if args.budget else None
        rows: dict[str, dict[str, Any]] = {}
        for name, config, differing in methods:
            planner = Planner(config, device=device.type, half_adapter="half_adapter" in differing)
            budget = budget or SHARE * _base_bytes(planner)
            rows[name] = _derive(planner, "quantised" in differing, budget)
        steps: dict[str, Callable[[], None]] = {}
        for name, config, differing in methods:
            if "quantised" not in differing:
                _check(rows[name], partial(_build, config, differing, device), device)
                steps |= _steps(name, rows, partial(_build, config, differing, device), device)
    if args.rounds:
        samples = paired_rounds(steps, rounds=args.rounds, warmup=1)
        clock = "cuda" if device.type == "cuda" else "cpu"
        shared = rows["LoRA"]["length"]
        for name, row in rows.items():
            if row["ran"]:
                at_lora = samples[f"{name} {shared}"], samples[f"LoRA {shared}"]
                row["time_of_lora"] = median_ratio(*at_lora, clock)
                seconds = median_seconds(samples[f"{name} {row['length']}"], clock)
                row["tokens_per_second"] = row["length"] / seconds
    for row in rows.values():
        row["of_lora"] = row["length"] / rows["LoRA"]["length"]
    command = f"python -m thawline.bench.sequence --rounds {args.rounds}"
    results = bench_results("sequence", command, device, budget=budget, variants=rows)
    sys.stdout.write(_table(rows) + "\n")
    write_results(args.out, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser(
        "sequence", "Longest sequence and throughput within a budget.", rounds=10, threads=1
    )
    parser.add_argument("--budget", help="Memory beyond the process, e.g. 100MB. Default: 5 × the weights.")
    return parser


def _base_bytes(planner: Planner) -> int:
    return sum(p.nbytes for p in planner.blueprint.model.parameters() if not p.requires_grad)


def _derive(planner: Planner, quantised: bool, budget: int) -> dict[str, Any]:
    """Return the longest sequence within a budget, and its bytes by part."""
    trained = sum(p.numel() for p in planner.blueprint.model.parameters() if p.requires_grad)

    def total(length: int) -> int:
        found = planner.bytes(1, length, quantised=quantised)
        return found["total"] - found["overhead"]

    length = largest(total, budget, LENGTH_STEP)
    planned = planner.bytes(1, max(length, LENGTH_STEP), quantised=quantised)
    return {"length": length, "trained": trained, "planned": planned, "ran": False}


def _build(
    config: RunConfig, differing: Collection[str], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype)
    if config.lean:
        apply_lean(model, loss=True)
    model = attach_tuner(model, config.tuner).train().to(device)
    if "half_adapter" in differing:
        cast_trained(model)
    return model


def _check(row: dict[str, Any], build: Callable[..., nn.Module], device: torch.device) -> None:
    """Run the longest sequence and note what it keeps for backward and, on a GPU, its peak."""
    model = build(torch.bfloat16)
    loss = partial(_loss, model, torch.randint(CONFIG.vocab_size, (1, row["length"]), device=device))
    row["saved"] = saved_bytes(loss, [*model.parameters(), *model.buffers()])
    row["saved_of_planned"] = row["saved"] / row["planned"]["saved"]
    row["ran"] = True
    if device.type == "cuda":
        step = _step(model, row["length"], device)
        step()  # optimiser state and libraries' workspaces come with the first
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak"] = torch.cuda.max_memory_allocated()
        planned = row["planned"]["total"] - row["planned"]["overhead"]
        row["peak_of_planned"] = row["peak"] / planned


def _steps(
    name: str, rows: dict[str, dict[str, Any]], build: Callable[..., nn.Module], device: torch.device
) -> dict[str, Callable[[], None]]:
    """Return training steps at LoRA's longest sequence and at a method's own."""
    model = build(torch.bfloat16 if device.type == "cuda" else torch.float32)
    lengths = {rows["LoRA"]["length"], rows[name]["length"]}
    return {f"{name} {length}": _step(model, length, device) for length in lengths}


def _step(model: nn.Module, length: int, device: torch.device) -> Callable[[], None]:
    ids = torch.randint(CONFIG.vocab_size, (1, length), device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        _loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _table(rows: dict[str, dict[str, Any]]) -> str:
    head = [
        "method",
        "longest sequence",
        "over LoRA",
        "saved, of planned",
        "time at LoRA's length",
        "tokens/s",
    ]
    lines = [
        [
            name,
            f"{row['length']:,}",
            f"{row['of_lora'] - 1:+.0%}",
            f"{row['saved_of_planned']:.4f}" if row["ran"] else "derived",
            f"{row['time_of_lora']:.2f}" if "time_of_lora" in row else "-",
            f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "-",
        ]
        for name, row in rows.items()
    ]
    return markdown(head, lines)


if __name__ == "__main__":
    raise SystemExit(main())
