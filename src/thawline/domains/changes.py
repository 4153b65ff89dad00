"""Changes that a domain makes in the fused network of its base, and the exchange that makes them.

Fusing folds norms and scales into weights row by row, so changed columns are still columns there: the fused
network of a domain differs from that of its base in the class heads and in a few columns of other weights.
Those are kept, and exchanged with what stands in the network; after a second exchange every bit is the base's
again. A domain in the network costs no operation, and one outside the memory of its columns.
"""

from __future__ import annotations

__all__ = ["Changes"]

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thawline.ops.cache import TensorCache


@dataclass(eq=False)
class _Slices:
    """Columns, or rows, of one tensor of the network: values at `index` of an axis."""

    tensor: Tensor
    axis: int
    index: Tensor
    values: Tensor

    def exchange(self) -> None:
        inside = self.tensor.index_select(self.axis, self.index)
        self.tensor.index_copy_(self.axis, self.index, self.values)
        self.values = inside


@dataclass(eq=False)
class _Whole:
    """A parameter of the network that is exchanged whole: class heads differ in their number of rows."""

    module: nn.Module
    name: str
    parameter: nn.Parameter

    def exchange(self) -> None:
        parameters = self.module._parameters
        self.parameter, parameters[self.name] = parameters[self.name], self.parameter


class Changes:
    """Difference between two fused networks that share most of their weights.

    Args:
        network: fused network of the base, without any domain inside; the one that is changed.
        domain: fused network of the base with a domain merged. Its class heads are taken over.
    Attributes:
        parts: names of the network's parts with a change (backbone, encoder, decoder).
    """

    def __init__(self, network: nn.Module, domain: nn.Module) -> None:
        self._items: list[_Slices | _Whole] = []
        self._caches: list[TensorCache] = []
        self.parts: set[str] = set()
        others = dict(domain.named_modules())
        for path, module in network.named_modules():
            before = len(self._items)
            self._items += _compare(module, others[path])
            if len(self._items) > before:
                self.parts.add(path.partition(".")[0])
                # What a layer has computed from its weights is no longer true.
                self._caches += [value for value in vars(module).values() if isinstance(value, TensorCache)]

    @property
    def nbytes(self) -> int:
        """Memory of the changes, bytes."""
        return sum(
            item.parameter.nbytes if isinstance(item, _Whole) else item.values.nbytes + item.index.nbytes
            for item in self._items
        )

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the changes into the network, or take them out again."""
        for item in self._items:
            item.exchange()
        for cache in self._caches:
            cache.clear()


def _compare(module: nn.Module, other: nn.Module) -> Iterator[_Slices | _Whole]:
    """Yield what differs between the own tensors of two modules of the same kind."""
    for name, parameter in module._parameters.items():
        theirs = other._parameters[name]
        if parameter is None or theirs is None:
            continue
        if parameter.shape != theirs.shape:
            yield _Whole(
                module, name, nn.Parameter(theirs.detach().to(parameter.device), requires_grad=False)
            )
        elif (slices := _slices(parameter, theirs.detach().to(parameter.device))) is not None:
            yield slices
    for name, buffer in module._buffers.items():
        if buffer is not None and (slices := _slices(buffer, other._buffers[name].to(buffer.device))):
            yield slices


def _slices(tensor: Tensor, other: Tensor) -> _Slices | None:
    """Return the columns or the rows in which two tensors differ, whichever are fewer; None: none."""
    differs = tensor != other
    if not differs.any():
        return None
    choices = []
    for axis in range(min(2, tensor.dim())):
        index = differs.transpose(0, axis).flatten(1).any(dim=1) if tensor.dim() > 1 else differs
        choices.append((index.sum().item() / tensor.shape[axis], axis, index.nonzero().flatten()))
    _, axis, index = min(choices, key=lambda choice: choice[0])
    return _Slices(tensor.detach(), axis, index, other.index_select(axis, index))
