"""Layers with a row for each class, in groups: the classes that a detector had, and those that were added.

Each group is a parameter of its own, so that one trains while another stays, and a product of its own: the
logits of a group keep every bit when others are added, where one product of more rows might round in another
order. State dicts hold the rows of all groups together, as those of the plain layers do.
"""

from __future__ import annotations

__all__ = ["ClassEmbedding", "ClassHead"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ClassRows(nn.Module):
    """Tensors whose rows lie in groups, `NAME_0`, `NAME_1`, …; `NAME` is all of them."""

    def __init__(self, sizes: Sequence[int], **tensors: Tensor) -> None:
        super().__init__()
        self.sizes, self._names = tuple(sizes), tuple(tensors)
        for name, tensor in tensors.items():
            for number, rows in enumerate(tensor.detach().split(self.sizes)):
                self.register_parameter(f"{name}_{number}", nn.Parameter(rows.clone()))

    def groups(self, name: str) -> list[nn.Parameter]:
        """Return the groups of a tensor."""
        return [self.get_parameter(f"{name}_{number}") for number in range(len(self.sizes))]

    @property
    def weight(self) -> Tensor:
        """Rows of all groups, (C, D)."""
        return torch.cat(self.groups("weight"))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self._names:
            destination[f"{prefix}{name}"] = torch.cat([part.detach() for part in self.groups(name)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = dict(state_dict)
        for name in self._names:
            if (tensor := state.pop(f"{prefix}{name}", None)) is not None:
                parts = tensor.split(self.sizes)
                state |= {f"{prefix}{name}_{number}": rows for number, rows in enumerate(parts)}
        super()._load_from_state_dict(state, prefix, *args)


class ClassHead(_ClassRows):
    """Linear layer with a row for each class.

    Args:
        linear: the plain layer.
        sizes: classes of each group.
    """

    def __init__(self, linear: nn.Linear, sizes: Sequence[int]) -> None:
        super().__init__(sizes, weight=linear.weight, bias=linear.bias)

    @property
    def bias(self) -> Tensor:
        """Biases of all groups, (C,)."""
        return torch.cat(self.groups("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to logits (…, C)."""
        parts = zip(self.groups("weight"), self.groups("bias"), strict=True)
        return torch.cat([F.linear(x, weight, bias) for weight, bias in parts], dim=-1)

    def lay_out(self, form: Callable[[Tensor], Tensor]) -> ClassHead:
        """Give each group's weight another layout in memory; return the layer itself."""
        for weight in self.groups("weight"):
            weight.data = form(weight.data)
        return self


class ClassEmbedding(_ClassRows):
    """Embedding of class labels; a last row of zeros, that of padding, is part of the last group."""

    def __init__(self, embedding: nn.Embedding, sizes: Sequence[int]) -> None:
        super().__init__((*sizes[:-1], sizes[-1] + 1), weight=embedding.weight)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (…) to vectors (…, D)."""
        weight = self.weight
        return F.embedding(labels, weight, padding_idx=len(weight) - 1)
