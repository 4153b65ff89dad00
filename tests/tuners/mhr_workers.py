"""What two processes do in test_mhr_systems.py; in a module of its own so that it can be spawned."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from mhr_models import config
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from thawline import route_by_batch, set_task_ids

PROCESSES, TASKS = 2, 3


class Stack(nn.Module):
    """Two blocks to shard one by one; five skills do not divide evenly between two processes."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Rows:
    """The rows of one process, and their tasks."""

    def __init__(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        self.x, self.y = (torch.randn(3, 4, 12, generator=generator) for _ in range(2))
        self.ids = [[2, 0, 1], [1, 1, 0]][rank]


def mhr() -> nn.Module:
    base = Stack()
    torch.manual_seed(4)
    return get_peft_model(base, config(target_modules=["0", "2"], exclude_modules=r"blocks\.\d")).train()


def step(model: nn.Module, wrapped: nn.Module, x: Tensor, y: Tensor, ids: list[int]) -> None:
    set_task_ids(model, ids)
    (wrapped(x) - y).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.5 * p.grad
                p.grad = None


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def report(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p) for name, p in model.named_parameters() if p.requires_grad}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    store = dist.FileStore(str(Path(folder) / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    rows = Rows(rank)

    ddp = mhr()
    wrapped = DistributedDataParallel(ddp)
    for _ in range(TASKS):
        step(wrapped, wrapped, rows.x, rows.y, rows.ids)
    reports = {"ddp": report(ddp)}

    sharded = mhr()
    for block in sharded.get_base_model().blocks:
        fully_shard(block)
    fully_shard(sharded)
    route_by_batch(sharded)
    for _ in range(TASKS):
        (sharded(rows.x, task_ids=torch.tensor(rows.ids)) - rows.y).square().mean().backward()
        with torch.no_grad():
            for p in sharded.parameters():
                if p.grad is not None:
                    p -= 0.5 * p.grad
                    p.grad = None
    reports["fsdp2"] = report(sharded)
    torch.save(reports, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
