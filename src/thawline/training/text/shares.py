"""Distribute held-out rows over processes, and gather what each process found."""

from __future__ import annotations

__all__ = ["gather", "own_share"]

from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

Row = TypeVar("Row")


def own_share(model: nn.Module) -> slice:
    """Return the rows that this process judges: every n-th, of n processes.

    All of them where the weights are sharded (FSDP, tensor parallel, ZeRO-3): a forward then involves all
    processes, and each must run as many.
    """
    if not (dist.is_available() and dist.is_initialized()) or _is_sharded(model):
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def gather(found: list[Row], share: slice) -> list[Row]:
    """Return what all processes found on their `own_share`, in the order of the rows, to every process."""
    if share.step is None:
        return found
    parts: list[list[Row]] = [[] for _ in range(share.step)]
    dist.all_gather_object(parts, found)
    rows: list[Row] = [row for part in parts for row in part]
    for rank, part in enumerate(parts):
        rows[rank :: share.step] = part
    return rows


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()) or any(
        isinstance(module, FullyShardedDataParallel) for module in model.modules()
    )
