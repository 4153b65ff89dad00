"""Exponential moving average of a model's weights: the weights that are evaluated and saved.

After every optimiser step, average = d · average + (1 - d) · weights. The decay warms up: update n, counted
from 1, uses d = decay · (1 - exp(-n / warmup_steps)), so that the average follows the first, fast steps and
only later reaches 1 / (1 - decay) steps back. Trainable parameters and floating buffers (batch-norm
statistics) are averaged; everything else never changes and is not copied. `EMA.applied` swaps the averaged
weights into the model for an evaluation and puts the trained ones back.

The published code iterates over the state dict, so a tensor listed under k names is averaged k times per
step: its decay is d^k. `once_per_name` repeats that (DEIMv2's lite sizes list one box head three times);
without it every tensor is averaged once. The published code also sets a new decay at the start of stage 2,
but on an attribute that nothing reads, so its decay never restarts; neither does it here.
"""

from __future__ import annotations

__all__ = ["EMA"]

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thawline.errors import CheckpointError, ConfigError


class EMA:
    """Exponential moving average of `model`'s weights.

    Args:
        model: on its training device, with `requires_grad` set: parameters made trainable later are not
            averaged.
        decay: share of the average that one update keeps, after warm-up, in [0, 1).
        warmup_steps: updates after which the decay has reached 63 % of `decay`; 0 is no warm-up.
        once_per_name: average a tensor once for each of its names, as the published code does.
    Raises: ConfigError: a decay or warm-up out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.9999,
        warmup_steps: int = 1000,
        once_per_name: bool = False,
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"`decay={decay}`: expected 0 to below 1; published is 0.9999.")
        if warmup_steps < 0:
            raise ConfigError(f"`warmup_steps={warmup_steps}`: expected 0 or more; published is 1000.")
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.n_updates = 0
        self._places, self._names_of = _find_averaged(model)
        self._repeats = [len(names) if once_per_name else 1 for names in self._names_of]
        self._average = [_as_average(tensor) for tensor in self._live()]

    @property
    def current_decay(self) -> float:
        """Decay of the latest update; 0 before the first."""
        if self.n_updates == 0:
            return 0.0
        if self.warmup_steps == 0:
            return self.decay
        return self.decay * (1 - math.exp(-self.n_updates / self.warmup_steps))

    @torch.no_grad()
    def update(self) -> None:
        """Average in the current weights. Call after every optimiser step; does not wait for the device."""
        self.n_updates += 1
        decay = self.current_decay
        live = [tensor.to(mine) for tensor, mine in zip(self._live(), self._average, strict=True)]
        weights: list[float | complex | bool] = [1 - decay**repeats for repeats in self._repeats]
        torch._foreach_lerp_(self._average, live, weights)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights inside the context, then its own again."""
        own = [tensor.detach().clone() for tensor in self._live()]
        self._write(self._average)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs. The tensors are live, not copies."""
        return {"n_updates": self.n_updates, "tensors": self._by_name()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state.

        Raises: CheckpointError: it averages other tensors than this model's.
        """
        tensors = state["tensors"]
        here = self._by_name()
        wrong = sorted(here.keys() ^ tensors.keys())
        wrong += [name for name in here.keys() & tensors.keys() if here[name].shape != tensors[name].shape]
        if wrong:
            raise CheckpointError(
                f"The saved average does not fit the model: {len(wrong)} tensors differ, such as "
                f"'{wrong[0]}'. Resume with the model and tuner that the run started with."
            )
        for name, mine in here.items():
            mine.copy_(tensors[name])
        self.n_updates = int(state["n_updates"])

    def _by_name(self) -> dict[str, Tensor]:
        return {names[0]: mine for names, mine in zip(self._names_of, self._average, strict=True)}

    def _live(self) -> list[Tensor]:
        return [getattr(module, name).detach() for module, name in self._places]

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._live(), values)


def _find_averaged(model: nn.Module) -> tuple[list[tuple[nn.Module, str]], list[list[str]]]:
    """Find the averaged tensors: module and attribute of each, and all its names in the state dict."""
    saved = set(model.state_dict())
    names_of: dict[int, list[str]] = {}
    places: dict[int, tuple[nn.Module, str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = [(name, p) for name, p in module._parameters.items() if p is not None and p.requires_grad]
        own += [(name, b) for name, b in module._buffers.items() if b is not None and _is_averaged(b)]
        for name, tensor in own:
            full = f"{prefix}.{name}" if prefix else name
            if full in saved:
                places.setdefault(id(tensor), (module, name))
                names_of.setdefault(id(tensor), []).append(full)
    return list(places.values()), list(names_of.values())


def _is_averaged(buffer: Tensor) -> bool:
    """Return whether a buffer is averaged: tables with infinities (DEIMv2's anchors) never change."""
    return buffer.is_floating_point() and bool(buffer.isfinite().all())


def _as_average(tensor: Tensor) -> Tensor:
    """Copy to at least float32: an update of a ten-thousandth would be lost in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
