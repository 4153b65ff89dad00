"""Cost of a training step: time in paired rounds, bytes kept for backward, operations dispatched.

Two identical models differ by a few percent on a busy machine, and the difference drifts. Variants are
therefore timed side by side, in rounds of rotated order, and compared by the median over rounds of their
ratio. Memory and operation counts do not vary and are read once.
"""

from __future__ import annotations

__all__ = [
    "Sample",
    "count_ops",
    "live_bytes",
    "machine_stamp",
    "median_ratio",
    "median_seconds",
    "paired_rounds",
    "saved_bytes",
    "write_results",
]

import gc
import importlib.metadata
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import thawline
from thawline.files import write_json


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Seconds that one variant took in one round."""

    wall: float
    """Wall-clock time, including the device's work."""
    cpu: float
    """CPU time of this process, all threads: the clock that a busy machine disturbs least."""
    cuda: float | None = None
    """Time between two CUDA events around the steps; `None` without a GPU."""


def paired_rounds(
    steps: Mapping[str, Callable[[], object]], *, rounds: int, steps_per_round: int = 1, warmup: int = 2
) -> dict[str, list[Sample]]:
    """Time each of `steps` once per round; every round starts one variant later than the last.

    Args:
        steps: name → a call that takes one training step.
        rounds: samples per variant; medians want ten or more.
        steps_per_round: steps per sample, for steps too short to time alone.
        warmup: untimed steps of each variant first (lazy optimiser state, allocator, autotuning).
    Returns: name → samples, one per round, in the order of the rounds.
    """
    names = list(steps)
    for step in steps.values():
        for _ in range(warmup):
            step()
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(_time(steps[name], steps_per_round))
    return samples


def median_ratio(samples: Sequence[Sample], reference: Sequence[Sample], clock: str = "cpu") -> float:
    """Return the median over rounds of this variant's time over the reference's in the same round.

    Args:
        clock: "wall", "cpu" or "cuda".
    """
    pairs = zip(samples, reference, strict=True)
    return statistics.median(getattr(ours, clock) / getattr(theirs, clock) for ours, theirs in pairs)


def median_seconds(samples: Sequence[Sample], clock: str = "cpu") -> float:
    """Return the median time by one clock: "wall", "cpu" or "cuda"."""
    return statistics.median(getattr(sample, clock) for sample in samples)


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for the backward of `forward()`: whole storages, each once.

    Args:
        forward: runs the model and returns the loss; nothing is propagated back.
        parameters: tensors that exist anyway; they and what shares their storage are not counted.
    """
    parameter_storages = {_storage_key(p) for p in parameters}
    kept: list[weakref.ref[Tensor]] = []

    def note(tensor: Tensor) -> Tensor:
        twin = tensor.detach()  # an output would keep its own graph alive
        if _storage_key(tensor) not in parameter_storages:
            kept.append(weakref.ref(twin))
        return twin

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    # A forward may drop parts of its graph, as DoRA drops that of its norms: only what lives counts.
    alive = [tensor for tensor in (reference() for reference in kept) if tensor is not None]
    del loss
    return sum({_storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in alive}.values())


def count_ops(call: Callable[[], Any]) -> tuple[int, Any]:
    """Return the number of ATen operations that `call()` dispatches, without views, and its result.

    Each is at least one kernel launch on a GPU, which decides the speed of small steps.
    """
    with _OpCounter() as counter:
        result = call()
    return counter.n_ops, result


def live_bytes() -> int:
    """Count the bytes of all tensors alive in this process; each storage once.

    The difference before and after building something is what it keeps: weights, optimiser state, buffers.
    """
    gc.collect()
    # By type, not isinstance: a lazy proxy would load what it stands for.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    # Those on the meta device, such as the compiler's fake tensors, hold nothing.
    real = [t for t in tensors if t.untyped_storage().device.type != "meta"]
    return sum({_storage_key(t): t.untyped_storage().nbytes() for t in real}.values())


def machine_stamp() -> dict[str, Any]:
    """Describe the machine: processor, GPU, threads, versions. No host or user names, no paths."""
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
    """Write a bench's results as JSON, atomically. None: write nothing."""
    if file is not None:
        write_json(file, results, indent=1)


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
    # Not its address: tensors without data have none.
    return tensor.device, tensor.untyped_storage()._cdata


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return models[0] if models else platform.processor() or platform.machine()
