"""Work of each of two processes in test_mhr_processes.py."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.mhr import config
from thawline import RoutingError, route_by_batch, set_task_ids, to_lora

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


def shard(model: nn.Module) -> nn.Module:
    for block in model.get_base_model().blocks:
        fully_shard(block)
    return fully_shard(model)


@torch.no_grad()
def distances_to_a_plain_model(wrapped: nn.Module, rows: Rows) -> dict[str, float]:
    """Distance of the outputs from those of an unwrapped model, for each way of giving ids to the wrapper."""
    plain = mhr()
    set_task_ids(plain, rows.ids)
    expected, found = plain(rows.x), {}

    def compare(way: str, out: Tensor) -> None:
        found[way] = (out - expected).abs().max().item()

    set_task_ids(wrapped, rows.ids)
    compare("set", wrapped(rows.x))
    with set_task_ids(wrapped, 0):
        wrapped(rows.x)
    compare("after a context", wrapped(rows.x))
    set_task_ids(wrapped, None)
    route_by_batch(wrapped)
    compare("tensor in the batch", wrapped(rows.x, task_ids=torch.tensor(rows.ids)))
    compare("list in the batch", wrapped(rows.x, task_ids=rows.ids))
    try:
        wrapped(rows.x)
        found["refused without ids"] = 1.0
    except RoutingError:
        found["refused without ids"] = 0.0
    return found


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
    to_lora(wrapped, Path(folder) / f"lora of {rank}", task=1)

    sharded = shard(mhr())
    route_by_batch(sharded)
    for _ in range(TASKS):
        (sharded(rows.x, task_ids=torch.tensor(rows.ids)) - rows.y).square().mean().backward()
        with torch.no_grad():
            for p in sharded.parameters():
                if p.grad is not None:
                    p -= 0.5 * p.grad
                    p.grad = None
    reports["fsdp2"] = report(sharded)
    reports["ways of giving ids"] = {
        f"{kind}, {way}": error
        for kind, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard))
        for way, error in distances_to_a_plain_model(wrap(mhr()), rows).items()
    }
    lora = PeftModel.from_pretrained(Stack(), Path(folder) / f"lora of {rank}")
    set_task_ids(ddp, 1)
    reports["lora"] = (lora(rows.x) - ddp(rows.x)).abs().max().item()
    torch.save(reports, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
