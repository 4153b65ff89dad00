"""Devices: how fast they compute and move bytes, measured here or taken from public figures."""

from __future__ import annotations

__all__ = ["DEVICES", "Device", "available_bytes", "find_device"]

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from thawline.errors import CheckpointError, ConfigError, did_you_mean
from thawline.files import read_json, write_json
from thawline.planning.simulate import StepCost

DEVICES: dict[str, tuple[str, float, float, float]] = {
    "b200": ("NVIDIA B200", 2250, 75, 8000),
    "h200": ("NVIDIA H200", 989, 67, 4800),
    "h100": ("NVIDIA H100 SXM", 989, 67, 3350),
    "a100-80gb": ("NVIDIA A100 80GB", 312, 19.5, 2039),
    "a100": ("NVIDIA A100 40GB", 312, 19.5, 1555),
    "l40s": ("NVIDIA L40S", 362, 91.6, 864),
    "l4": ("NVIDIA L4", 121, 30.3, 300),
    "a10": ("NVIDIA A10", 125, 31.2, 600),
    "t4": ("NVIDIA T4", 65, 8.1, 320),
    "4090": ("NVIDIA GeForce RTX 4090", 165, 82.6, 1008),
    "3090": ("NVIDIA GeForce RTX 3090", 71, 35.6, 936),
}
"""Name → full name, dense bf16 (T4: fp16) and fp32 TFLOP/s, GB/s of memory; the makers' data sheets."""
SHARE_OF_PEAK, SHARE_OF_BANDWIDTH = 0.4, 0.7
"""Assumed shares of the data sheet that training reaches."""
LAUNCH = 6e-6
"""Seconds per operation that a GPU's process needs at least."""
CPU_OVERHEAD, CUDA_OVERHEAD = 500 << 20, 600 << 20
"""Python with torch, transformers and PEFT loaded (a small run: 530 MiB); a CUDA context with workspaces."""


@dataclass(frozen=True)
class Device:
    """The device that a plan is for."""

    key: str
    """cpu, cuda, or a key of `DEVICES`, which is not there."""

    @property
    def on_gpu(self) -> bool:
        """True for a GPU, there or not."""
        return self.key != "cpu"

    @property
    def overhead(self) -> int:
        """Bytes of a process before the first tensor."""
        return CUDA_OVERHEAD if self.on_gpu else CPU_OVERHEAD

    @property
    def name(self) -> str:
        """Name for people."""
        if self.key in DEVICES:
            return f"{DEVICES[self.key][0]} (estimated)"
        is_cpu = self.key == "cpu"
        return f"cpu, {torch.get_num_threads()} threads" if is_cpu else torch.cuda.get_device_name()

    @property
    def precision(self) -> Literal["fp16", "bf16"] | None:
        """Precision that `training.precision: auto` selects there. None: the device is this machine's."""
        if self.key not in DEVICES:
            return None
        return "fp16" if self.key == "t4" else "bf16"

    @cached_property
    def rates(self) -> dict[str, Any]:
        """`flops` a second by type, `bandwidth` in bytes a second, `per_op`: least seconds of an operation.

        Of this machine measured once, and kept in the user's cache.
        """
        if self.key not in DEVICES:
            return _measured(self.name, torch.device(self.key))
        _, half, single, bandwidth = DEVICES[self.key]
        flops = {"bfloat16": half * 1e12 * SHARE_OF_PEAK, "float32": single * 1e12 * SHARE_OF_PEAK}
        return {"flops": flops, "bandwidth": bandwidth * 1e9 * SHARE_OF_BANDWIDTH, "per_op": LAUNCH}

    @property
    def assumptions(self) -> list[str]:
        """Assumptions behind its numbers, in words."""
        what = "the CUDA context and workspaces" if self.on_gpu else "the process"
        time = f"time: rates measured on this machine on {self.rates.get('date')} ({_cache()})"
        if self.key in DEVICES:
            time = (
                f"time: estimated at {SHARE_OF_PEAK:.0%} of the data sheet's arithmetic and "
                f"{SHARE_OF_BANDWIDTH:.0%} of its bandwidth; nothing was run there"
            )
        return [time, f"overhead: {self.overhead >> 20} MiB for {what}, an assumption"]

    def seconds(self, cost: StepCost, dtype: torch.dtype) -> float:
        """Return the time of a forward and backward pass: arithmetic and memory traffic, or launches."""
        half = "bfloat16" if dtype in (torch.bfloat16, torch.float16) else "float32"
        busy = cost.flops / self.rates["flops"][half] + self.seconds_to_move(cost.moved)
        return max(busy, cost.n_ops * self.rates["per_op"])

    def seconds_to_move(self, n_bytes: int) -> float:
        """Return the time of reading or writing bytes."""
        return float(n_bytes / self.rates["bandwidth"])


def find_device(name: str | None) -> Device:
    """Return a device by a name of `DEVICES`, or the machine's own: cpu, cuda; None: where it would train.

    Raises: ConfigError: for an unknown name.
    """
    has_gpu = torch.cuda.is_available()
    key = name.lower() if name else "cuda" if has_gpu else "cpu"
    if key == "cuda" and not has_gpu:
        key = "h100"
    if key not in (known := ["cpu", "cuda", *DEVICES]):
        raise ConfigError(f"Unknown device '{name}'. {did_you_mean(key, known)}")
    return Device(key)


def available_bytes(device: torch.device) -> int:
    """Return the bytes that a process may use on a device, what it already uses included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) + CUDA_OVERHEAD
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thawline" / "rates.json"


def _measured(name: str, device: torch.device) -> dict[str, Any]:
    try:
        known: dict[str, Any] = read_json(_cache())
    except (OSError, CheckpointError):
        known = {}
    if name not in known:
        known[name] = _calibrate(device) | {"date": time.strftime("%Y-%m-%d")}
        try:
            _cache().parent.mkdir(parents=True, exist_ok=True)
            write_json(_cache(), known, indent=1)
        except OSError:
            pass  # a read-only home: measured again next time
    rates: dict[str, Any] = known[name]
    return rates


def _calibrate(device: torch.device) -> dict[str, Any]:
    """Measure matrix products, an addition of large tensors, and the smallest operation."""
    side, large = (4096, 1 << 27) if device.type == "cuda" else (512, 1 << 22)
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(side, side, dtype=dtype, device=device)
        flops[str(dtype).removeprefix("torch.")] = 2 * side**3 / _seconds(partial(torch.matmul, a, a), device)
    x, small = torch.ones(large, device=device), torch.ones(1, device=device)
    return {
        "flops": flops,
        "bandwidth": 3 * x.nbytes / _seconds(lambda: x + x, device),
        "per_op": _seconds(lambda: small + small, device),
    }


def _seconds(call: Callable[[], object], device: torch.device, n: int = 10) -> float:
    """Return the least time of a call, over three rounds."""

    def once() -> float:
        start = time.perf_counter()
        for _ in range(n):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    return min(once() for _ in range(4))
