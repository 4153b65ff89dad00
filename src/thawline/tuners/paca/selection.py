"""Selections: the ways to choose the columns of one layer.

A selection returns `r` of a layer's `n` input features, sorted. `random` is the paper's (Woo et al., PaCA,
ICLR 2025), `adjacent` is ours; the authors' code has the weight norm commented out, and had a gradient-based
one for a while.
Scores from data come from `thawline.select_columns`, which runs batches through the model and returns
explicit indices.
"""

from __future__ import annotations

__all__ = ["SELECTIONS", "choose_columns", "random_columns", "top_columns"]

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from thawline.errors import ConfigError


class Selection(Protocol):
    """Choose `r` columns of `weight`, (O, n, ...), input features on axis 1; `name` is the layer's."""

    def __call__(self, weight: Tensor, r: int, name: str, seed: int) -> Tensor: ...


def random_columns(weight: Tensor, r: int, name: str, seed: int) -> Tensor:
    """Draw `r` columns without replacement, from the seed and the layer's name alone.

    NumPy guarantees the stream of `RandomState` (NEP 19); torch's may change between versions and devices.
    """
    drawn = _stream(name, seed).permutation(weight.shape[1])[:r]
    return torch.from_numpy(np.sort(drawn)).long()


def adjacent_columns(weight: Tensor, r: int, name: str, seed: int) -> Tensor:
    """Return `r` adjacent columns, the first a multiple of `r`, drawn from the seed and the layer's name.

    In each row of the weight they share a cache line or two, so that writing them and switching adapters is
    many times cheaper than with scattered ones. The blocks of two seeds are equal or disjoint; the last
    n % r columns are in none.
    """
    first = r * _stream(name, seed).randint(weight.shape[1] // r)
    return torch.arange(first, first + r, device="cpu")


def _stream(name: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState((seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**32)


def weight_norm_columns(weight: Tensor, r: int, name: str, seed: int) -> Tensor:
    """Return the `r` columns of largest L2 norm."""
    if weight.device.type == "meta":
        raise ConfigError(
            f"selection='weight_norm' needs the weights of '{name}', which are not loaded yet (meta device). "
            "Load the base model first, or use selection='random'."
        )
    return top_columns(column_energy(weight), r)


def calibrated_columns(weight: Tensor, r: int, name: str, seed: int) -> Tensor:
    """Refuse: without data there is nothing to choose by.

    Raises: ConfigError: always; called only if `indices` are missing.
    """
    raise ConfigError(
        f"'{name}': selections 'activation' and 'gradient' need data. Choose the columns first: "
        "config = thawline.select_columns(model, config, batches)."
    )


SELECTIONS: dict[str, Selection] = {
    "random": random_columns,
    "adjacent": adjacent_columns,
    "weight_norm": weight_norm_columns,
    "activation": calibrated_columns,
    "gradient": calibrated_columns,
    "explicit": calibrated_columns,
}


def choose_columns(
    weight: Tensor, r: int, name: str, selection: str, seed: int, indices: Sequence[int] | None
) -> Tensor:
    """Return the columns to adapt: `indices` if given, otherwise those that `selection` chooses.

    Args:
        weight: (O, n, ...), input features on axis 1.
        r: number of columns.
        name: of the layer, for messages and for the seed.
        selection: a key of SELECTIONS.
        seed: of the random choice.
        indices: explicit columns, or None.
    Returns: (r,), int64, sorted, unique, on the CPU.
    Raises: ConfigError: for r above n; indices that repeat, leave [0, n) or are not r; a selection that needs
        data.
    """
    n = weight.shape[1]
    if r > n:
        raise ConfigError(
            f"r={r} is more than the {n} input features of '{name}'. Use r <= {n}, set "
            f"rank_pattern={{'{name}': {n}}}, or exclude the module."
        )
    if indices is None:
        return SELECTIONS[selection](weight, r, name, seed)
    chosen = sorted(indices)
    if len(chosen) != r:
        raise ConfigError(
            f"r={r} but {len(chosen)} indices for '{name}'. Set r={len(chosen)}, or "
            f"rank_pattern={{'{name}': {len(chosen)}}}."
        )
    repeated = sorted({i for i, j in pairwise(chosen) if i == j})
    if repeated:
        raise ConfigError(f"The indices of '{name}' repeat {repeated}. List every column once.")
    outside = [i for i in chosen if not 0 <= i < n]
    if outside:
        raise ConfigError(f"The indices {outside} of '{name}' are outside its input features, 0 to {n - 1}.")
    return torch.tensor(chosen, dtype=torch.long, device="cpu")


def top_columns(scores: Tensor, r: int) -> Tensor:
    """Return the sorted indices of the `r` highest scores, on the CPU; ties go to the lower index."""
    order = torch.sort(scores.detach().double().cpu(), descending=True, stable=True).indices
    return order[:r].sort().values


def column_energy(weight: Tensor) -> Tensor:
    """Return the squared L2 norm of every column of (O, n, ...): (n,), double."""
    return weight.detach().double().square().transpose(0, 1).flatten(1).sum(1)
