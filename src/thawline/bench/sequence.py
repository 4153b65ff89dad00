"""Longest sequence and highest throughput of a language model within a memory budget, by method.

    python -m thawline.bench.sequence --out benchmarks/results/sequence.json

The longest sequence at a batch of one is derived by `thawline plan`, then checked by running: on a processor
the bytes that the real step keeps must be those planned, on a GPU the step must fit. QLoRA and QPaCA are
derived alone. The model has the proportions of Llama 3 8B at a sixteenth of its width, with four blocks; the
budget is five times its weights, as 80 GB are of the 8B's.
"""

from __future__ import annotations

__all__ = ["main"]

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from thawline.bench.harness import bench_parser, bench_results, markdown, use_device
from thawline.measure import median_seconds, paired_rounds, saved_bytes, write_results
from thawline.ops.lean import apply_lean
from thawline.planning.plan import Plan, cast_trained, plan_run, read_bytes
from thawline.planning.search import LENGTH_STEP, largest, variants
from thawline.recipe import RunConfig
from thawline.tuners.build import attach_tuner

CONFIG = LlamaConfig(
    vocab_size=8192, hidden_size=256, intermediate_size=896, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, architectures=["LlamaForCausalLM"],
)  # fmt: skip
COMPARED = ("LoRA", "LoRA bf16", "DoRA", "PaCA", "PaCA + lean", "QLoRA", "QPaCA")
DERIVED = ("QLoRA", "QPaCA")
SHARE = 5
"""Budget, in weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    parser = bench_parser("sequence", "Longest sequence and throughput within a budget.", rounds=3, threads=1)
    parser.add_argument("--budget", help="Memory beyond the process, e.g. 100MB. Default: 5 × the weights.")
    args = parser.parse_args(argv)
    device = use_device(args)
    with tempfile.TemporaryDirectory() as folder:
        CONFIG.save_pretrained(folder)
        recipe = {
            "base": {"model": folder, "dtype": "bfloat16"},
            "data": "none",
            "training": {"batch_size": 1},
        }
        config = RunConfig.from_mapping(recipe)
        weights = plan_run(config, length=LENGTH_STEP, device=device.type).bytes["weights"]
        budget = read_bytes(args.budget) if args.budget else SHARE * weights
        rows = {
            name: _derive(one, options, budget, device)
            for name, one, options in variants(config, methods=COMPARED)
        }
        steps = {}
        for name, one, options in variants(config, methods=COMPARED):
            if name not in DERIVED:
                steps[name] = _check(one, options, rows[name], device)
        if args.rounds:
            for name, samples in paired_rounds(steps, rounds=args.rounds, warmup=1).items():
                rows[name]["tokens_per_second"] = rows[name]["length"] / median_seconds(samples, "wall")
    for row in rows.values():
        row["of_lora"] = row["length"] / rows["LoRA"]["length"]
    command = f"python -m thawline.bench.sequence --rounds {args.rounds}"
    results = bench_results("sequence", command, device, budget=budget, weights=weights, variants=rows)
    sys.stdout.write(_table(rows) + "\n")
    write_results(args.out, results)
    return 0


def _derive(config: RunConfig, options: Any, budget: int, device: torch.device) -> dict[str, Any]:
    def plan(length: int) -> Plan:
        return plan_run(config, length=length, device=device.type, **options)

    def total(length: int) -> int:
        found = plan(length)
        return found.bytes["total"] - found.bytes["overhead"]

    length = largest(total, budget, LENGTH_STEP)
    found = plan(max(length, LENGTH_STEP))
    return {"length": length, "trained": found.trained, "planned": dict(found.bytes), "ran": False}


def _check(config: RunConfig, options: Any, row: dict[str, Any], device: torch.device) -> Any:
    """Run the longest sequence, note what it keeps, and return its training step."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    if config.lean:
        apply_lean(model, loss=True)
    model = attach_tuner(model, config.tuner).train().to(device)
    if options.get("half_adapter"):
        cast_trained(model)
    ids = torch.randint(CONFIG.vocab_size, (1, row["length"]), device=device)
    loss = partial(_loss, model, ids)
    row["saved"] = saved_bytes(loss, [*model.parameters(), *model.buffers()])
    row["saved_of_planned"] = row["saved"] / row["planned"]["saved"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    row["ran"] = True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        row["peak_beyond_weights"] = torch.cuda.max_memory_allocated() - before
    return step


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        [
            name,
            f"{row['length']:,}",
            f"{row['of_lora'] - 1:+.0%}",
            f"{row['saved_of_planned']:.4f}" if row["ran"] else "derived",
            f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "-",
        ]
        for name, row in rows.items()
    ]
    return markdown(["method", "longest sequence", "over LoRA", "saved, of planned", "tokens/s"], lines)


if __name__ == "__main__":
    raise SystemExit(main())
