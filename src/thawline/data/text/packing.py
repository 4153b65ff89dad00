"""Packed rows: several rows joined into one sequence, none of which attends to another.

Positions restart at every row, and batches carry no attention mask: from the positions transformers builds
block-diagonal masks for sdpa and eager attention, and sequence boundaries for flash attention, which it does
in batches of one sequence only (`flatten`). Rows go, longest first, where they leave the least room (best-fit
decreasing): packs depend on the rows alone.
"""

from __future__ import annotations

__all__ = ["AUTO_FILL", "collate_packs", "fill", "flatten", "pack_rows"]

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thawline.data.text.encode import IGNORED

AUTO_FILL = 0.7
"""`data.packing: auto` packs rows that fill less than this share of `max_length`."""

Row = Mapping[str, Any]


def fill(rows: Sequence[Row], max_length: int) -> float:
    """Return the share of `max_length` that the rows' tokens fill."""
    return sum(len(row["input_ids"]) for row in rows) / (max_length * len(rows))


def pack_rows(rows: Sequence[Row], max_length: int) -> list[dict[str, Any]]:
    """Join rows into packs of at most `max_length` tokens.

    Args:
        rows: with `input_ids`, `labels` of the same length, `task` and `example`.
    Returns: packs with `input_ids`, `labels`, `position_ids`; `tasks`, one per token; `task` and `example` of
        the first row. A row's first token is not learned: nothing in the pack may predict it.
    """
    packs: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # tokens left, number of the pack; sorted
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        size = len(row["input_ids"])
        place = bisect_left(room, (size, -1))
        if place == len(room):
            room.append((max_length, len(packs)))
            packs.append([])
        left, number = room.pop(place)
        packs[number].append(row)
        insort(room, (left - size, number))
    return [_join(pack) for pack in packs]


def collate_packs(packs: Sequence[Row], pad_token_id: int) -> dict[str, Any]:
    """Build a batch: `input_ids`, `labels`, `position_ids` (B, T); `use_cache` off, for packs have no cache.

    Padding is a row of its own, with positions from 0.
    """
    width = max(len(pack["input_ids"]) for pack in packs)
    room = [width - len(pack["input_ids"]) for pack in packs]
    padded = {
        "input_ids": [list(p["input_ids"]) + [pad_token_id] * n for p, n in zip(packs, room, strict=True)],
        "labels": [list(p["labels"]) + [IGNORED] * n for p, n in zip(packs, room, strict=True)],
        "position_ids": [list(p["position_ids"]) + list(range(n)) for p, n in zip(packs, room, strict=True)],
    }
    return {key: torch.tensor(values) for key, values in padded.items()} | {"use_cache": False}


def flatten(packs: Sequence[Row]) -> dict[str, Any]:
    """Return one pack of all rows of some."""
    keys = ("input_ids", "labels", "position_ids", "tasks")
    return {key: [value for pack in packs for value in pack[key]] for key in keys}


def _join(rows: Sequence[Row]) -> dict[str, Any]:
    joined: dict[str, Any] = {key: [] for key in ("input_ids", "labels", "position_ids", "tasks")}
    for row in rows:
        n_tokens = len(row["input_ids"])
        joined["input_ids"] += row["input_ids"]
        joined["labels"] += [IGNORED, *row["labels"][1:]]
        joined["position_ids"] += range(n_tokens)
        joined["tasks"] += [row["task"]] * n_tokens
    return joined | {"task": rows[0]["task"], "example": rows[0]["example"]}
