"""Adapted columns inside one frozen weight, and the original values they replaced.

The weight holds W₀ + Σ s·δ at the selected columns, so the base layer runs as it is. `Resident` keeps the
original values, which restore W₀ bit for bit, and marks by which it recognises changes it has written. It
knows tensors, not PEFT.

A weight sharded by rows (FSDP2) is written shard by shard: δ is sharded alike, so ranks need not communicate.
"""

from __future__ import annotations

__all__ = ["Change", "Resident", "is_sharded"]

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from thawline.errors import ConfigError
from thawline.ops.partial_linear import place_of, read_columns, write_columns


class Change(NamedTuple):
    """One adapter's part in a weight: weight[:, index] += scale · delta."""

    delta: Tensor
    index: Tensor
    scale: float

    def mark(self) -> tuple[float, ...]:
        """Return numbers that differ if the change does, without reading the tensors.

        They miss steps of fused optimisers and writes to `.data`, which leave no trace on a tensor.
        """
        return id(self.delta), self.delta.data_ptr(), self.delta._version, id(self.index), self.scale


class Columns(NamedTuple):
    """Values (O, R, ...) of a weight at the columns `index`, (R,); `place`: the same, a slice if adjacent."""

    index: Tensor
    values: Tensor
    place: Tensor | slice


class Resident:
    """Writes columns into one weight, and restores it.

    Args:
        name: of the layer, for messages.
        view: gives a weight with its input features on axis 1, sharing storage.
    """

    def __init__(self, name: str, view: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self._view = view
        self.forget()

    def forget(self) -> None:
        """Drop the original values: what is in the weight now stays."""
        self._changes: list[Change] = []
        self._marks: list[tuple[float, ...]] = []
        self._original: Columns | None = None
        self._weight: Any = None  # the weight written last, and its address
        self._address = 0

    def is_in(self, weight: Tensor) -> bool:
        """Return whether `weight` is the tensor, at the address, that was written last."""
        return weight is self._weight and weight.data_ptr() == self._address

    def is_elsewhere(self, weight: Tensor) -> bool:
        """Return whether another tensor than `weight` holds columns."""
        return self._original is not None and not self.is_in(weight)

    def holds(self, weight: Tensor, changes: list[Change]) -> bool:
        """Return whether `weight` holds these changes, as far as can be known without reading it."""
        marks = [change.mark() for change in changes]
        return marks == self._marks and (not marks or self.is_in(weight))

    @torch.no_grad()
    def install(self, weight: Tensor, changes: list[Change]) -> None:
        """Make the weight W₀ + Σ changes, whatever it holds now.

        Raises: ConfigError: if the weight was replaced from outside while it held columns.
        """
        self._follow(weight)
        if [id(change.index) for change in changes] != [id(change.index) for change in self._changes]:
            self._keep_original(weight, changes)
        self._changes, self._marks = changes, [change.mark() for change in changes]
        if self._original is not None:
            write_columns(self._columns_of(weight), self._original.place, self._changed(self._original))

    def _keep_original(self, weight: Tensor, changes: list[Change]) -> None:
        """Keep the original values of the columns that are to change; restore those changed before."""
        if not changes:
            self.evict(weight)
            return
        index = changes[0].index.to(weight.device)
        if len(changes) > 1:
            index = torch.cat([change.index for change in changes]).to(weight.device).unique()
        if self._original is not None and torch.equal(index, self._original.index):
            return  # adapters of one seed have the same columns: the next write replaces them
        index = index.clone()  # another one can be loaded into the adapter's
        self.evict(weight)
        place = place_of(index)
        self._original = Columns(index, read_columns(self._columns_of(weight), place), place)
        self._weight, self._address = weight, weight.data_ptr()

    @torch.no_grad()
    def evict(self, weight: Tensor) -> None:
        """Restore every bit of W₀."""
        self._follow(weight)
        if self._original is not None:
            write_columns(self._columns_of(weight), self._original.place, self._original.values)
        self.forget()

    @torch.no_grad()
    def original(self, weight: Tensor) -> Tensor:
        """Return a copy of the weight as it was, W₀."""
        copy = weight.detach().clone()
        if self._original is not None:
            write_columns(self._columns_of(copy), self._original.place, self._original.values)
        return copy

    @torch.no_grad()
    def original_columns(self, weight: Tensor, index: Tensor) -> Tensor:
        """Return a copy of the columns `index` of W₀."""
        columns = read_columns(self._columns_of(weight), index.to(weight.device))
        if self._original is not None:
            for position, column in enumerate(self._original.index.tolist()):
                columns[:, index == column] = self._original.values[:, position, None]
        return columns

    def index(self, weight: Tensor) -> Tensor:
        """Return the columns of `weight` that are not its own, sorted."""
        if self._original is None:
            return torch.empty(0, dtype=torch.long, device=weight.device)
        return self._original.index

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Return whether the columns inside the weight are free of NaN and infinity."""
        return self._original is None or bool(torch.isfinite(self._changed(self._original)).all())

    def _changed(self, original: Columns) -> Tensor:
        """Return W₀ + Σ scale · delta at the columns, summed in fp32 or wider and rounded once."""
        index, values, _ = original
        if len(self._changes) == 1:
            change = self._changes[0]
            return torch.add(values, _local(change.delta), alpha=change.scale).to(values.dtype)
        total = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
        for change in self._changes:
            position = torch.searchsorted(index, change.index)
            total.index_add_(1, position, _local(change.delta).to(total.dtype), alpha=change.scale)
        return total.to(values.dtype)

    def _columns_of(self, weight: Tensor) -> Tensor:
        return self._view(_local(weight))

    def _follow(self, weight: Tensor) -> None:
        """Adopt a weight that has become another tensor: sharded, moved, or replaced."""
        if self._original is None or self.is_in(weight):
            return
        index, values, _ = self._original
        if isinstance(weight, DTensor) and not isinstance(self._weight, DTensor):
            self._original = self._original._replace(values=_rows_like(values, weight, self.name))
        else:
            index = index.to(weight.device)
            self._original = Columns(index, values.to(weight.device), place_of(index))
            columns = read_columns(self._columns_of(weight), self._original.place)
            if torch.equal(columns, self._original.values):
                self._changes, self._marks = [], []
            elif not torch.equal(columns, self._changed(self._original)):
                raise ConfigError(
                    f"The weight of '{self.name}' was replaced while adapted columns were inside it, so its "
                    "original columns are unknown. Replace base weights inside `with "
                    "model.disable_adapter():`, or before get_peft_model."
                )
        self._weight, self._address = weight, weight.data_ptr()


def is_sharded(weight: Tensor) -> bool:
    """Return whether a weight is one rank's shard of a larger one."""
    return isinstance(weight, DTensor)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows_like(columns: Tensor, weight: DTensor, name: str) -> Tensor:
    """Return this rank's rows of `columns` (O, R, ...), sharded as `weight` is."""
    if any(placement.is_shard() and placement.dim != 0 for placement in weight.placements):
        raise ConfigError(
            f"'{name}' is sharded along its input features ({weight.placements}). PaCA writes whole columns: "
            "shard rows (FSDP2's default), or use DDP."
        )
    return distribute_tensor(columns, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
