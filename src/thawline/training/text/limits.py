"""Limits of a base that would end training in an IndexError: rows of its tables of positions and of tokens.

Models that compute positions (rotary, ALiBi, relative) take any length. Those that look them up take as many
tokens as their table has rows for, fewer than there are where positions start behind zero (RoBERTa, BART).
"""

from __future__ import annotations

__all__ = ["Limits", "read_limits"]

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel

from thawline.recipe import TextBase
from thawline.training.text.pretrained import build_without_weights

TABLES = ("wpe", "position_embeddings", "positions_embed", "embed_positions")
"""Names of the modules and buffers in which transformers' models look positions up."""


@dataclass(frozen=True)
class Limits:
    """Most tokens of a sequence, and most ids of tokens; None: no limit, or not known."""

    positions: int | None = None
    tokens: int | None = None


def read_limits(base: TextBase, n_virtual: int = 0) -> Limits:
    """Return a base's limits, from its config alone. `n_virtual`: tokens that a tuner puts in front."""
    try:
        model = build_without_weights(AutoModel, base, torch.float32)
        embedding = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embedding)
        n_tokens = embedding.weight.shape[0]
    except Exception:  # code that comes with a model may do without AutoModel, meta tensors or an embedding
        return Limits()
    # Towers for images and sound have tables of their own.
    text = model.get_submodule(name.rpartition(".")[0])
    tables = [
        _n_positions(module)
        for name, module in text.named_modules()
        if _is_table(name) and isinstance(module, nn.Embedding)  # others compute what they lack
    ]
    tables += [len(buffer) for name, buffer in text.named_buffers() if _is_table(name) and buffer.ndim == 2]
    stated = getattr(model.config, "max_position_embeddings", None)
    if tables and stated is not None:
        tables.append(stated)
    return Limits(min(tables) - n_virtual if tables else None, n_tokens)


def _is_table(name: str) -> bool:
    return name.rpartition(".")[2] in TABLES


def _n_positions(table: nn.Embedding) -> int:
    """Return for how many tokens a table has positions; some start behind padding, or at an offset."""
    offset = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(offset)
