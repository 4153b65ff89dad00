"""What adapting a frozen network costs: the frozen floor, full fine-tuning, LoRA, PaCA, Poly and MHR, side by
side.

    python -m thawline.bench.tuners --case reference --out benchmarks/results/reference.json

Each variant is a model of its own, built from the same seed. Memory and operations are read from one step of
each, then all are timed in paired rounds (`thawline.measure`). The table goes to standard output.
"""

from __future__ import annotations

__all__ = ["main", "measure_case"]

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thawline.bench.cases import CASES, Batch, Case
from thawline.bench.host_reads import HostReads
from thawline.bench.variants import ROUTED, VARIANTS, attach
from thawline.errors import ConfigError
from thawline.measure import (
    Sample,
    count_ops,
    live_bytes,
    machine_stamp,
    median_ratio,
    paired_rounds,
    saved_bytes,
    write_results,
)

LR = 1e-4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    args = _parser().parse_args(argv)
    cases = args.case or ["reference"]
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results: dict[str, Any] = {
        "bench": "tuners",
        "command": f"python -m thawline.bench.tuners --case {' '.join(cases)} --rounds {args.rounds}",
        "machine": machine_stamp(),
        "device": device.type,
        "cases": {},
    }
    for name in cases:
        measured = measure_case(CASES[name], device=device, rounds=args.rounds, variants=args.variants)
        results["cases"][name] = measured
        sys.stdout.write(f"\n{name}: {measured['what']}\n{_table(measured)}\n")
        sys.stdout.flush()
        write_results(args.out, results)  # after each case: a run cut short keeps what it has
    return 0


def measure_case(
    case: Case, *, device: torch.device, rounds: int = 10, variants: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure the variants of one case.

    Args:
        rounds: paired timing rounds; 0 leaves the times out.
        variants: which of the case's; all by default. The first is the yardstick of every ratio.
    Returns: a JSON-ready record. Per variant: `trainable`, `loss`, `ops` (where a step writes tokens: of one
        token) with how many of the forward's wait for the device, `time` by clock, `memory` in bytes.
        Memory is what is `saved` for backward, the `gradients`, what is `resident` between steps (weights,
        optimiser state, a method's own stores), their `total`; on a GPU also `peak_of_step`, the most that a
        step took beyond `resident`.
    Raises:
        ConfigError: if a variant is unknown, or the case needs a GPU and `device` is none.
    """
    if case.needs_gpu and device.type != "cuda":
        raise ConfigError(f"This case needs a GPU, and the device is '{device.type}': {case.what}")
    names = [name for name in case.variants if variants is None or name in variants]
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
    """One variant in training: its model, optimiser and batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    batch: Batch
    case: Case

    @classmethod
    def start(cls, variant: str, case: Case, device: torch.device) -> _Run:
        torch.manual_seed(0)
        batch: Batch = {
            name: value.to(device, case.dtype if value.is_floating_point() else None)
            for name, value in case.batch().items()
        }
        if case.tasks is not None and variant in ROUTED:
            # As Poly takes them, and as the batches of `thawline train` bring them.
            batch["task_ids"] = torch.tensor(case.tasks) if variant == "poly" else list(case.tasks)
        with (
            device
        ):  # a GPU draws a billion random weights at once, one thread of a processor in half a minute
            network = case.build()
        network.to(device, case.dtype).train(not case.new_tokens)
        model = attach(variant, network, case.adapt)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, fused=True) if trained else None
        return cls(model, optimizer, batch, case)

    def loss(self) -> Tensor:
        return self.case.loss(self.model, self.batch)

    def step(self) -> None:
        if self.case.new_tokens:
            self.write()
            return
        self.loss().backward()
        self.update()

    def write(self) -> None:
        """Tokens after the batch, greedily; never fewer than asked for."""
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
        """Times that `call` waits for the device, on which every tensor of the batch lies."""
        inputs = [value for value in self.batch.values() if isinstance(value, Tensor)]
        return HostReads.of(call, [*self.model.parameters(), *inputs]).total

    def read(self) -> dict[str, Any]:
        """Everything but time, after one step that lets lazy state settle."""
        self.step()
        if self.case.new_tokens:
            return self._read_writing()
        forward, loss = count_ops(self.loss)
        backward, _ = count_ops(loss.backward)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        self.update()
        saved = saved_bytes(self.loss, [*self.model.parameters(), *self.model.buffers()])
        memory = {"gradients": gradients, "saved": saved}
        if torch.cuda.is_available():
            memory["peak_of_step"] = _peak_of(self)
        return {
            "trainable": sum(p.numel() for p in trained),
            "memory": memory,
            "ops": {"forward": forward, "backward": backward, "waits": self.waits(self.loss)},
            "loss": float(loss.detach()),
        }

    def _read_writing(self) -> dict[str, Any]:
        n_tokens = self.case.new_tokens
        return {
            "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "memory": {"gradients": 0, "saved": 0},
            "ops": {
                "forward": count_ops(self.write)[0] // n_tokens,
                "backward": 0,
                "waits": self.waits(self.write) // n_tokens,
            },
        }


def _peak_of(run: _Run) -> int:
    """Bytes that one step takes on the GPU on top of what lives between steps."""
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
            "median_s": statistics.median(getattr(sample, clock) for sample in samples[name]),
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
    """The record as a Markdown table: what the docs show is what the command prints."""
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
    lines = [head, ["---"] * len(head)]
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
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


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
    parser = argparse.ArgumentParser(
        prog="thawline bench tuners", description="What adapting a network costs."
    )
    parser.add_argument("--case", action="extend", nargs="+", choices=CASES, help="default: reference")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all that the case names")
    parser.add_argument("--rounds", type=int, default=10, help="paired timing rounds; 0 measures memory only")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
