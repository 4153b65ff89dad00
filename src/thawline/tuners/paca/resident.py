"""The columns that live, changed, inside one frozen weight: what was there before, and who is in now.

The weight holds W₀ + Σ s·δ at the selected columns, so the base layer runs as it is. This file keeps the
original values, which bring back every bit of W₀, and the marks by which a change is noticed. It knows
tensors, not PEFT.

A weight sharded by rows (FSDP2) is written shard by shard: the change is sharded alike, so no rank asks
another.
"""

from __future__ import annotations

__all__ = ["Change", "Resident", "is_sharded"]

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from thawline.errors import ConfigError
from thawline.ops.partial_linear import write_columns


class Change(NamedTuple):
    """One adapter's part in a weight: weight[:, index] += scale · delta."""

    delta: Tensor
    index: Tensor
    scale: float

    def mark(self) -> tuple[float, ...]:
        """Numbers that differ once the change does, found without reading the tensors.

        They miss steps of fused optimisers and writes to `.data`, which leave no trace on a tensor.
        """
        delta = self.delta
        return id(delta), delta.data_ptr(), delta._version, id(self.index), self.scale


class Resident:
    """Keeper of the columns inside one weight.

    Args:
        name: of the layer, for messages.
        view: gives a weight with its input features on axis 1, sharing storage.
    """

    def __init__(self, name: str, view: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self._changes: list[Change] = []
        self._marks: list[tuple[float, ...]] = []
        self._view = view
        self._weight: Any = None  # the weight as written last, and where
        self._place = 0
        self._index: Tensor | None = None
        self._original: Tensor | None = None

    def is_in(self, weight: Tensor) -> bool:
        """Whether `weight` is the tensor, at the place, that was written last."""
        return weight is self._weight and weight.data_ptr() == self._place

    def holds(self, weight: Tensor, changes: list[Change]) -> bool:
        """Whether `weight` holds these changes, as far as can be told without reading it."""
        marks = [change.mark() for change in changes]
        return marks == self._marks and (not marks or self.is_in(weight))

    def is_elsewhere(self, weight: Tensor) -> bool:
        """Whether columns are in another tensor than `weight`."""
        return self._original is not None and not self.is_in(weight)

    @torch.no_grad()
    def install(self, weight: Tensor, changes: list[Change]) -> None:
        """Make the weight W₀ + Σ changes, whatever is inside now.

        Raises: ConfigError: if the weight was replaced from outside while columns were inside it.
        """
        self._follow(weight)
        if [id(change.index) for change in changes] != [id(change.index) for change in self._changes]:
            self.evict(weight)
            if changes:
                self._remember(weight, changes)
        self._changes, self._marks = changes, [change.mark() for change in changes]
        if self._original is not None and self._index is not None:
            write_columns(self._columns_of(weight), self._index, self._changed())

    @torch.no_grad()
    def evict(self, weight: Tensor) -> None:
        """Bring back every bit of W₀."""
        self._follow(weight)
        if self._original is not None and self._index is not None:
            write_columns(self._columns_of(weight), self._index, self._original)
        self.forget()

    def forget(self) -> None:
        """Let go of the original values: what is in the weight now stays."""
        self._changes, self._marks = [], []
        self._index = self._original = self._weight = None

    @torch.no_grad()
    def original(self, weight: Tensor) -> Tensor:
        """A copy of the weight as it was, W₀."""
        copy = weight.detach().clone()
        if self._original is not None and self._index is not None:
            write_columns(self._columns_of(copy), self._index, self._original)
        return copy

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether the columns that are inside are free of NaN and infinity."""
        return self._original is None or bool(torch.isfinite(self._changed()).all())

    def _remember(self, weight: Tensor, changes: list[Change]) -> None:
        columns = self._columns_of(weight)
        # Never the adapter's own index: another one can be loaded into that tensor.
        self._index = torch.cat([change.index for change in changes]).to(columns.device)
        if len(changes) > 1:
            self._index = torch.unique(self._index)
        self._original = columns.index_select(1, self._index)
        self._weight, self._place = weight, weight.data_ptr()

    def _changed(self) -> Tensor:
        """W₀ + Σ scale · delta at the columns, summed in fp32 or wider and rounded once."""
        assert self._original is not None
        assert self._index is not None
        if len(self._changes) == 1:
            change = self._changes[0]
            return torch.add(self._original, _local(change.delta), alpha=change.scale).to(
                self._original.dtype
            )
        total = self._original.to(torch.promote_types(self._original.dtype, torch.float32), copy=True)
        for change in self._changes:
            position = torch.searchsorted(self._index, change.index)
            total.index_add_(1, position, _local(change.delta).to(total.dtype), alpha=change.scale)
        return total.to(self._original.dtype)

    def _columns_of(self, weight: Tensor) -> Tensor:
        return self._view(_local(weight))

    def _follow(self, weight: Tensor) -> None:
        """Find the columns again after the weight became another tensor: sharded, moved, or replaced."""
        if self._original is None or self._index is None or self.is_in(weight):
            return
        if isinstance(weight, DTensor) and not isinstance(self._weight, DTensor):
            self._original = _rows_like(self._original, weight, self.name)
        else:
            self._original = self._original.to(weight.device)
            self._index = self._index.to(weight.device)
            columns = self._columns_of(weight).index_select(1, self._index)
            if torch.equal(columns, self._original):
                self._changes, self._marks = [], []
            elif not torch.equal(columns, self._changed()):
                raise ConfigError(
                    f"The weight of '{self.name}' was replaced while adapted columns were inside it, so its "
                    "original columns are unknown. Replace base weights inside `with "
                    "model.disable_adapter():`, or before get_peft_model."
                )
        self._weight, self._place = weight, weight.data_ptr()


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is one rank's part of a larger one."""
    return isinstance(weight, DTensor)


def _mark(delta: Tensor) -> tuple[int, int]:
    return (delta.data_ptr(), delta._version)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows_like(columns: Tensor, weight: DTensor, name: str) -> Tensor:
    """This rank's rows of `columns`, (O, R, ...), sharded as `weight` is."""
    if any(placement.is_shard() and placement.dim != 0 for placement in weight.placements):
        raise ConfigError(
            f"'{name}' is sharded along its input features ({weight.placements}). PaCA writes whole columns: "
            "shard rows (FSDP2's default), or use DDP."
        )
    return distribute_tensor(columns, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
