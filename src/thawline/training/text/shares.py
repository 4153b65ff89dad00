"""Held-out rows shared out over processes, and what each found put together again."""

from __future__ import annotations

__all__ = ["gathered", "own_share"]

from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

Row = TypeVar("Row")


def own_share(model: nn.Module) -> slice:
    """The rows that this process judges: every n-th, of n processes.

    All of them where the weights are sharded (FSDP, tensor parallel, ZeRO-3): a forward is then one of all
    processes together, and each must take as many.
    """
    if not (dist.is_available() and dist.is_initialized()) or _is_sharded(model):
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def gathered(found: list[Row], share: slice) -> list[Row]:
    """What all processes found on their `own_share`, in the order of the rows; the same in every process."""
    if share.step is None:
        return found
    parts: list[list[Row]] = [[] for _ in range(share.step)]
    dist.all_gather_object(parts, found)
    places = sorted(
        (rank + i * share.step, rank, i) for rank, part in enumerate(parts) for i in range(len(part))
    )
    return [parts[rank][i] for _, rank, i in places]


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()) or any(
        isinstance(module, FullyShardedDataParallel) for module in model.modules()
    )
