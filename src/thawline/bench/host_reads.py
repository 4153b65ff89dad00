"""Count how often a call waits for the device, by the line that reads a value back.

On a GPU, torch itself reports each synchronising call. Without one, the values are followed: the result of
an operation on a tensor of the device is on the device too, and reading it on the host (`item`, `tolist`,
`cpu`, `numpy`, truth values) or asking for a shape that depends on values (`nonzero`, `unique`, boolean
indexing) would wait. Copies to the device are not followed; those from pinned memory do not wait.
"""

from __future__ import annotations

__all__ = ["HostReads"]

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal"}
_ON_HOST = {"cpu", "numpy", "item", "tolist"}
_VALUE_SHAPED = {
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave", "bincount",
}  # fmt: skip
_INDEXING = {"__getitem__", "__setitem__"}


@dataclass(frozen=True)
class HostReads:
    """Reads of device values during one call."""

    by_place: dict[str, int]
    """Number of waits by place, "file.py:function: operation"."""

    @property
    def total(self) -> int:
        """Total number of waits."""
        return sum(self.by_place.values())

    @classmethod
    def of(cls, call: Callable[[], object], on_device: Iterable[Tensor]) -> HostReads:
        """Count the waits of one `call()`.

        Args:
            call: run once before counting, so that lazy state does not count.
            on_device: tensors on the device: weights, inputs.
        """
        call()
        return cls(_by_debug_mode(call) if torch.cuda.is_available() else _by_following(call, on_device))


def _by_following(call: Callable[[], object], on_device: Iterable[Tensor]) -> dict[str, int]:
    with _Follow(on_device) as follow:
        call()
    return dict(follow.reads)


def _by_debug_mode(call: Callable[[], object]) -> dict[str, int]:
    reads: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            reads[_place("wait")] += 1

    before = torch.cuda.get_sync_debug_mode()
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            warnings.showwarning = shown
    return dict(reads)


class _Follow(TorchFunctionMode):
    def __init__(self, on_device: Iterable[Tensor]) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.on_device = WeakIdKeyDictionary()
        for tensor in on_device:
            self.on_device[tensor] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        given = list(_tensors((args, kwargs)))
        lies_there = any(tensor in self.on_device for tensor in given)
        if lies_there and func == Tensor.is_cpu.__get__:
            return False  # code that reads freely on a CPU must take its path for devices
        if lies_there and self._waits(name, args):
            self.reads[_place(name.strip("_"))] += 1
        out = func(*args, **kwargs)
        if lies_there and name not in _ON_HOST:
            for tensor in _tensors(out):
                self.on_device[tensor] = True
        elif lies_there and isinstance(out, Tensor) and out is args[0]:
            return out.clone()  # stands for the copy from the device
        return out

    def _waits(self, name: str, args: tuple[Any, ...]) -> bool:
        if name in _INDEXING:
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(
                isinstance(key, Tensor)
                and key in self.on_device
                and (key.dtype == torch.bool or not key.dim())
                for key in keys
            )
        return name in _READS or name in _VALUE_SHAPED


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _place(what: str) -> str:
    """Name the innermost function outside of torch and of this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "torch" not in path.parts and path != Path(__file__) and path.name != "warnings.py":
            return f"{path.name}:{frame.name}: {what}"
    return what
