"""What a training step costs: time in paired rounds, bytes kept for backward, operations dispatched.

Two identical models differ by a few percent on a busy machine, and the difference drifts. So variants are
timed side by side, in rounds of rotated order, and compared by the median over rounds of their ratio.
Memory and operation counts do not vary and are read once.
"""

from __future__ import annotations

__all__ = [
    "Sample",
    "count_ops",
    "machine_stamp",
    "median_ratio",
    "paired_rounds",
    "saved_bytes",
    "write_results",
]

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import thawline


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The seconds one variant took in one round."""

    wall: float
    """Wall-clock time, the device's work included."""
    cpu: float
    """Processor time of this process, all threads: a busy machine lengthens it least."""
    cuda: float | None = None
    """Time between two CUDA events around the steps; `None` without a GPU."""


def paired_rounds(
    steps: Mapping[str, Callable[[], object]], *, rounds: int, steps_per_round: int = 1, warmup: int = 2
) -> dict[str, list[Sample]]:
    """Time each of `steps` once per round; every round starts one variant later than the last.

    Args:
        steps: name → one training step, state and all.
        rounds: samples per variant; medians want ten or more.
        steps_per_round: steps behind one sample, for steps too short to time alone.
        warmup: untimed steps of each variant first (lazy optimiser state, allocator, autotuning).
    Returns: name → samples, one per round, in the order of the rounds.
    """
    names = list(steps)
    for name in names:
        for _ in range(warmup):
            steps[name]()
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(_time(steps[name], steps_per_round))
    return samples


def median_ratio(samples: Sequence[Sample], reference: Sequence[Sample], clock: str = "cpu") -> float:
    """Median over rounds of this variant's time over the reference's in the same round.

    Args:
        clock: "wall", "cpu" or "cuda".
    """
    pairs = zip(samples, reference, strict=True)
    return statistics.median(getattr(ours, clock) / getattr(theirs, clock) for ours, theirs in pairs)


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps alive for the backward of `forward()`: whole storages, each counted once.

    Args:
        forward: runs the model and returns the loss; nothing is propagated back.
        parameters: tensors that live anyway and so are not counted, nor is what shares their storage.
    """
    live = {_storage_key(p) for p in parameters}
    kept: dict[tuple[torch.device, int], int] = {}

    def note(tensor: Tensor) -> Tensor:
        key = _storage_key(tensor)
        if key not in live:
            kept[key] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself, where it is an output, would hold its own graph for ever

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss  # it held the graph, and so every storage, until here: no address was used twice
    return sum(kept.values())


def count_ops(call: Callable[[], Any]) -> tuple[int, Any]:
    """How many ATen operations `call()` dispatches, views excluded, and what it returned.

    Each is at least one kernel launch on a GPU, which is what decides the speed of small steps.
    """
    with _OpCounter() as counter:
        result = call()
    return counter.n_ops, result


def live_bytes() -> int:
    """Bytes of every tensor alive in this process, whoever holds it; each storage once.

    The difference before and after building something is what it keeps: weights, optimiser state, and what a
    method stores on the side.
    """
    gc.collect()
    # By type, not isinstance: a lazy proxy would load what it stands for.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    # Those on the meta device, such as the compiler's fake tensors, hold nothing.
    real = [t for t in tensors if t.untyped_storage().device.type != "meta"]
    return sum({_storage_key(t): t.untyped_storage().nbytes() for t in real}.values())


def machine_stamp() -> dict[str, Any]:
    """What places the numbers: processor, GPU, threads, versions. No names of hosts or users, no paths."""
    stamp: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "thawline": thawline.__version__,
    }
    for package in ("torch", "transformers", "peft"):
        stamp[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        stamp |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        }
    return stamp


def write_results(file: Path | None, results: Mapping[str, Any]) -> None:
    """Write a bench's results as JSON, whole or not at all: a bench stopped while it writes leaves the last.

    Args:
        file: its folder is made. None: nothing is written.
    """
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(file)


class _OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.n_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # `_unsafe_view` is a view too; only its schema does not say so.
        self.n_ops += not (func.is_view or func is torch.ops.aten._unsafe_view.default)
        return func(*args, **(kwargs or {}))


def _time(step: Callable[[], object], n_steps: int) -> Sample:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(n_steps):
        step()
    if on_gpu:
        end.record()
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Sample(wall=wall, cpu=cpu, cuda=begin.elapsed_time(end) / 1e3 if on_gpu else None)


def _storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return models[0] if models else platform.processor() or platform.machine()
