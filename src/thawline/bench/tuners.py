"""Cost of adapting a network: the frozen floor, full fine-tuning, LoRA, PaCA, Poly and MHR, side by side.

    python -m thawline.bench.tuners --case reference --out benchmarks/results/reference.json

Every method gets its own model, built from the same seed. Memory and operations are read from one step of
each, then all are timed in paired rounds (`thawline.measure`). The table goes to standard output.
"""

from __future__ import annotations

__all__ = ["main", "measure_case"]

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thawline.bench.cases import CASES, Batch, Case
from thawline.bench.harness import bench_parser, bench_results, markdown, use_device
from thawline.bench.host_reads import HostReads
from thawline.bench.methods import METHODS, ROUTED, attach
from thawline.bench.quantised import quantise
from thawline.errors import ConfigError
from thawline.measure import (
    Sample,
    count_ops,
    live_bytes,
    median_ratio,
    median_seconds,
    paired_rounds,
    saved_bytes,
    write_results,
)

LR = 1e-4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    args = _parser().parse_args(argv)
    cases = args.case or ["reference"]
    device = use_device(args)
    command = f"python -m thawline.bench.tuners --case {' '.join(cases)} --rounds {args.rounds}"
    results = bench_results("tuners", command, device, cases={})
    for name in cases:
        measured = measure_case(CASES[name], device=device, rounds=args.rounds, methods=args.variants)
        results["cases"][name] = measured
        sys.stdout.write(f"\n{name}: {measured['what']}\n{_table(measured)}\n")
        sys.stdout.flush()
        write_results(args.out, results)  # after each case, for runs that are stopped
    return 0


def measure_case(
    case: Case, *, device: torch.device, rounds: int = 10, methods: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure the methods of one case.

    Args:
        rounds: paired timing rounds. 0: no times.
        methods: names among the case's. None: all. Ratios are relative to the first.
    Returns: a JSON-ready record. Per method: `trainable`, `loss`, `ops` (per token where a step generates
        text) with the number of the forward's that wait for the device, `time` by clock, `memory` in bytes:
        `saved` for backward, `gradients`, `resident` between steps (weights, optimiser state, buffers),
        their `total`; on a GPU also `peak_of_step`, the maximum of a step beyond `resident`.
    Raises:
        ConfigError: if the case needs a GPU and `device` is none.
    """
    if case.needs_gpu and device.type != "cuda":
        raise ConfigError(f"This case needs a GPU, and the device is '{device.type}': {case.what}")
    names = [name for name in case.methods if methods is None or name in methods]
    runs, rows = {}, {}
    before = live_bytes()
    for name in names:
        runs[name] = _Run.start(name, case, device)
        rows[name] = runs[name].read()
        after = live_bytes()
        rows[name]["memory"]["resident"] = after - before
        before = after
    samples = {} if not rounds else paired_rounds({n: run.step for n, run in runs.items()}, rounds=rounds)
    for name, row in rows.items():
        memory = row["memory"]
        memory["total"] = memory["resident"] + memory["gradients"] + memory["saved"]
        memory["saved_of_floor"] = memory["saved"] / max(rows[names[0]]["memory"]["saved"], 1)
        if samples:
            row["time"] = _times(samples, name, names[0])
    record = {"what": case.what, "dtype": str(case.dtype).removeprefix("torch."), "rounds": rounds}
    del runs
    gc.collect()
    return record | {"lora_r": case.adapt.lora_r, "paca_r": case.adapt.paca_r, "variants": rows}


@dataclass(frozen=True)
class _Run:
    """One method in training: its model, optimiser and batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    batch: Batch
    case: Case

    @classmethod
    def start(cls, method: str, case: Case, device: torch.device) -> _Run:
        torch.manual_seed(0)
        batch: Batch = {
            name: value.to(device, case.dtype if value.is_floating_point() else None)
            for name, value in case.batch().items()
        }
        if case.tasks is not None and method in ROUTED:
            # Poly takes a tensor; the batches of `thawline train` bring a list.
            batch["task_ids"] = torch.tensor(case.tasks) if method == "poly" else list(case.tasks)
        with device:  # a CPU thread takes half a minute to draw a billion random weights
            network = case.build()
        network.to(device, case.dtype).train(not case.new_tokens)
        if case.quantised:
            quantise(network, case.quantised)
        model = attach(method, network, case.adapt)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, fused=True) if trained else None
        return cls(model, optimizer, batch, case)

    def loss(self) -> Tensor:
        return self.case.loss(self.model, self.batch)

    def step(self) -> None:
        if self.case.new_tokens:
            self.generate()
            return
        self.loss().backward()
        self.update()

    def generate(self) -> None:
        """Generate exactly `new_tokens` tokens after the batch, greedily."""
        n = self.case.new_tokens
        self.model.generate(
            **self.batch,
            attention_mask=torch.ones_like(self.batch["input_ids"]),
            pad_token_id=0,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
        )

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def waits(self, call: Callable[[], object]) -> int:
        """Count how often `call` waits for the device, on which every tensor of the batch lies."""
        inputs = [value for value in self.batch.values() if isinstance(value, Tensor)]
        return HostReads.of(call, [*self.model.parameters(), *inputs]).total

    def read(self) -> dict[str, Any]:
        """Read everything but time, after one step that builds lazy state."""
        self.step()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        trainable = sum(p.numel() for p in trained)
        if n_tokens := self.case.new_tokens:
            forward, waits = count_ops(self.generate)[0], self.waits(self.generate)
            return {
                "trainable": trainable,
                "memory": {"gradients": 0, "saved": 0},
                "ops": {"forward": forward // n_tokens, "backward": 0, "waits": waits // n_tokens},
            }
        forward, loss = count_ops(self.loss)
        backward, _ = count_ops(loss.backward)
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        self.update()
        saved = saved_bytes(self.loss, [*self.model.parameters(), *self.model.buffers()])
        memory = {"gradients": gradients, "saved": saved}
        if torch.cuda.is_available():
            memory["peak_of_step"] = _peak_of(self)
        return {
            "trainable": trainable,
            "memory": memory,
            "ops": {"forward": forward, "backward": backward, "waits": self.waits(self.loss)},
            "loss": float(loss.detach()),
        }


def _peak_of(run: _Run) -> int:
    """Bytes that one step takes on the GPU beyond what lives between steps."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _times(samples: dict[str, list[Sample]], name: str, floor: str) -> dict[str, Any]:
    clocks = ["wall", "cpu"] + (["cuda"] if samples[name][0].cuda is not None else [])
    return {
        clock: {
            "median_s": median_seconds(samples[name], clock),
            "of_floor": median_ratio(samples[name], samples[floor], clock),
        }
        | {
            f"of_{peer}": median_ratio(samples[name], samples[peer], clock)
            for peer in ("lora", "poly")
            if peer in samples
        }
        for clock in clocks
    }


def _table(record: dict[str, Any]) -> str:
    """Format the record as a Markdown table; the docs show the same."""
    rows = record["variants"]
    first = next(iter(rows.values()))
    timed, peaked = "time" in first, "peak_of_step" in first["memory"]
    clock = "cuda" if timed and "cuda" in first["time"] else "cpu"
    routed = any(name in ROUTED for name in rows)
    head = ["variant", "trained", "saved MiB", "× floor", "total MiB", "ops f/b"]
    head += ["waits"] if routed else []
    head += ["peak MiB"] if peaked else []
    head += [f"{clock} ms", "× floor", "× LoRA"] if timed else []
    head += ["× Poly"] if timed and routed else []
    lines = []
    for name, row in rows.items():
        memory = row["memory"]
        cells = [
            name,
            _short(row["trainable"]),
            _mib(memory["saved"]),
            f"{memory['saved_of_floor']:.2f}",
            _mib(memory["total"]),
            f"{row['ops']['forward']}/{row['ops']['backward']}",
        ]
        cells += [str(row["ops"]["waits"])] if routed else []
        if peaked:
            cells.append(_mib(memory["resident"] + memory["peak_of_step"]))
        if timed:
            took = row["time"][clock]
            cells += [f"{took['median_s'] * 1e3:.1f}", f"{took['of_floor']:.3f}", _ratio(took.get("of_lora"))]
            cells += [_ratio(took.get("of_poly"))] if routed else []
        lines.append(cells)
    return markdown(head, lines)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(count: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser("tuners", "Cost of adapting a network. --rounds 0 measures memory only.", threads=1)
    parser.add_argument("--case", action="extend", nargs="+", choices=CASES, help="Default: reference.")
    parser.add_argument("--variants", nargs="+", choices=METHODS, help="Methods. Default: all of the case.")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
