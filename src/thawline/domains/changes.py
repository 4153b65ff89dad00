"""Changes that a domain makes in the fused network of its base, and the exchange that makes them.

Fusing folds norms and scales into weights row by row, so changed columns are still columns there: the fused
network of a domain differs from that of its base in the class heads and in a few columns of other weights.
Those are kept, and exchanged with what stands in the network; after a second exchange every bit is the base's
again. A domain in the network costs no operation, and one outside the memory of its columns.
"""

from __future__ import annotations

__all__ = ["Changes", "JoinedWeights"]

import ctypes
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from thawline.models.deimv2.fused.conv import FusedConv

ALIGNMENT = 64
"""Bytes; the memory of a weight begins at a multiple of them, as that of torch's own tensors."""

LINES = (16, 8, 4, 2, 1)
"""Numbers of neighbouring values of a packed kernel that may be exchanged together."""


class JoinedWeights:
    """A network whose matrices lie in few tensors, so that a domain is exchanged in few copies.

    A row of these tensors is a column of a matrix, which an adapter changes as a whole. Rows of one length
    are together, whichever layers they belong to. Kernels that oneDNN has packed are kept in its layout alone
    and exchanged there: packing them again takes longer than all else. Other kernels stay as they are.

    Args:
        network: fused network of the base, after a call; its weights are moved, and keep their values.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.places: dict[Tensor, tuple[Tensor, int]] = {}
        """Matrix → the tensor that holds its rows, and the first of them."""
        for module in network.modules():
            if isinstance(module, FusedConv):
                module.keep_packed()
        by_length: dict[tuple[int, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        for weight in network.parameters():
            if _is_matrix(weight):
                by_length[rows_of(weight)[0].numel(), weight.dtype].append(weight)
        for (length, dtype), weights in by_length.items():
            step = ALIGNMENT // math.gcd(ALIGNMENT, length * dtype.itemsize)
            starts, end = [], 0
            for weight in weights:
                starts.append(end)
                end += math.ceil(len(rows_of(weight)) / step) * step
            joined = torch.zeros(end, length, dtype=dtype, device=weights[0].device)
            for weight, start in zip(weights, starts, strict=True):
                rows, axis = rows_of(weight), _axis(weight)
                moved = joined[start : start + len(rows)].copy_(rows)
                weight.data = moved.view(weight.movedim(axis, 0).shape).movedim(0, axis)
                self.places[weight] = joined, start


@dataclass(eq=False)
class _Rows:
    """Rows of memory that belong to one weight or to many; on a CPU numpy's, which takes half as long."""

    joined: Tensor | np.ndarray
    index: Tensor | np.ndarray
    """Numbers of the rows, int32."""
    values: Tensor | np.ndarray

    @classmethod
    def of(cls, joined: Tensor, index: Tensor, values: Tensor) -> _Rows:
        """Return rows of a tensor that get other values."""
        tensors = joined, index.int(), values
        is_numpys = joined.device.type == "cpu" and joined.dtype != torch.bfloat16
        return cls(*([one.numpy() for one in tensors] if is_numpys else tensors))

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.values.nbytes

    def exchange(self) -> None:
        inside = self.joined[self.index]
        self.joined[self.index] = self.values
        self.values = inside


@dataclass(eq=False)
class _Whole:
    """A tensor or layer that is exchanged whole: class heads differ in their number of rows, or of groups."""

    owner: dict[str, Any]
    name: str
    values: Tensor | nn.Module

    def exchange(self) -> None:
        self.owner[self.name], self.values = self.values, self.owner[self.name]

    @property
    def nbytes(self) -> int:
        values = self.values
        return values.nbytes if isinstance(values, Tensor) else sum(p.nbytes for p in values.parameters())


class Changes:
    """Difference between two fused networks that share most of their weights.

    Args:
        weights: of the base, without any domain inside; the network that is changed.
        domain: fused network of the base with a domain merged. Its class heads are taken over.
    Attributes:
        parts: names of the network's parts with a change (backbone, encoder, decoder).
    """

    def __init__(self, weights: JoinedWeights, domain: nn.Module) -> None:
        self._items: list[_Rows | _Whole] = []
        self._changed: list[Tensor] = []
        self.parts: set[str] = set()
        found: dict[Tensor, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        others = dict(domain.named_modules())
        for path, module in weights.network.named_modules():
            if type(module) is not type(others[path]):
                parent, _, name = path.rpartition(".")
                layer = others[path].to(next(module.parameters()).device)
                self._items.append(_Whole(weights.network.get_submodule(parent)._modules, name, layer))
                self.parts.add(path.partition(".")[0])
                continue
            for kind in ("_parameters", "_buffers"):
                owner, theirs = getattr(module, kind), getattr(others[path], kind)
                for name, tensor in owner.items():
                    if tensor is None or theirs[name] is None:
                        continue
                    other = theirs[name].detach().to(tensor.device)
                    if tensor.is_mkldnn:
                        if (item := _change_of_kernel(module, others[path])) is not None:
                            self.parts.add(path.partition(".")[0])
                            self._items.append(item)
                        continue
                    if tensor.shape == other.shape and torch.equal(tensor, other):
                        continue
                    self.parts.add(path.partition(".")[0])
                    if tensor.shape != other.shape or tensor not in weights.places:
                        whole = other if kind == "_buffers" else nn.Parameter(other, requires_grad=False)
                        self._items.append(_Whole(owner, name, whole))
                        continue
                    self._changed.append(tensor)
                    joined, start = weights.places[tensor]
                    rows = rows_of(other, _axis(tensor))
                    index = (rows_of(tensor) != rows).any(dim=1).nonzero().flatten()
                    found[joined].append((start + index, rows[index]))
        self._addresses = [tensor.data_ptr() for tensor in self._changed]
        for joined, parts in found.items():
            index, values = (torch.cat(part) for part in zip(*parts, strict=True))
            self._items.append(_Rows.of(joined, index, values))

    @property
    def nbytes(self) -> int:
        """Memory of the changes, bytes."""
        return sum(item.nbytes for item in self._items)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the changes into the network, or take them out again.

        Raises: RuntimeError: the network's weights are elsewhere than when the changes were found.
        """
        if [tensor.data_ptr() for tensor in self._changed] != self._addresses:
            raise RuntimeError(
                "The network was moved or cast after its domains were prepared, so they cannot be exchanged. "
                "Load it again, on the device that it is for."
            )
        for item in self._items:
            item.exchange()
        increment_version(self._changed)  # what a layer has computed from them is no longer true


def rows_of(weight: Tensor, axis: int | None = None) -> Tensor:
    """Return a weight as rows, (N, L): slices along an axis. None: its own."""
    rows = weight.detach().movedim(_axis(weight) if axis is None else axis, 0)
    return rows.flatten(1)


def _is_matrix(weight: Tensor) -> bool:
    """Return whether a weight is a matrix, (O, I) or (O, I, 1, 1), that torch lays out."""
    return not weight.is_mkldnn and weight.dim() > 1 and weight.numel() == math.prod(weight.shape[:2])


def _axis(weight: Tensor) -> int:
    """Return the axis of a matrix whose slices are contiguous: columns, unless it has few rows."""
    return 0 if weight.stride(0) > weight.stride(1) else 1


def _change_of_kernel(conv: FusedConv, other: FusedConv) -> _Rows | _Whole | None:
    """Return what a domain changes in a kernel that oneDNN has packed; None: nothing.

    The layout depends on the processor and the number of threads, so lines of it are exchanged only if the
    kernel then reads as the domain's. Else it is exchanged whole, in a layout of its own.
    """
    assert conv.packed_for is not None
    if torch.equal(conv.weight.to_dense(), other.weight):
        return None
    packed = other.pack(conv.packed_for)
    memory, theirs = _memory(conv.weight), _memory(packed)
    if memory.shape == theirs.shape:
        lines = _changed_lines(memory, theirs)
        lines.exchange()
        is_right = torch.equal(conv.weight.to_dense(), other.weight)
        lines.exchange()
        if is_right:
            return lines
    return _Whole(conv._parameters, "weight", nn.Parameter(packed, requires_grad=False))


def _changed_lines(memory: Tensor, theirs: Tensor) -> _Rows:
    """Return what differs between two memories of one layout.

    A channel is several lines of some length there, depending on the layout: the length that takes the least
    memory is chosen.
    """
    found = []
    for length in LINES:
        if memory.numel() % length == 0:
            rows, changed = memory.view(-1, length), theirs.view(-1, length)
            index = (rows != changed).any(dim=1).nonzero().flatten()
            found.append(_Rows.of(rows, index, changed[index]))
    return min(found, key=lambda one: one.nbytes)


def _memory(packed: Tensor) -> Tensor:
    """Return the memory of a weight in oneDNN's layout, as a flat tensor that keeps the weight alive."""
    kind: Any = ctypes.c_char * torch.ops.mkldnn._nbytes(packed)
    memory = kind.from_address(torch.ops.mkldnn.data_ptr(packed))
    memory.owner = packed
    return torch.frombuffer(memory, dtype=packed.dtype)
