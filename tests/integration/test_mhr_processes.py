"""MHR trained by two processes, under DDP and FSDP2, equals MHR trained by one."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing import start_processes

from tests.support.mhr_processes import PROCESSES, TASKS, Rows, mhr, run, step


@pytest.fixture(scope="module")
def from_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    start_processes(run, (str(folder),), nprocs=PROCESSES, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(from_two_processes: list[dict], kind: str) -> None:
    torch.manual_seed(0)
    model = mhr()
    batches = [Rows(rank) for rank in range(PROCESSES)]
    x, y = torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])
    ids = [task for b in batches for task in b.ids]
    for _ in range(TASKS):
        step(model, model, x, y, ids)
    for name, p in model.named_parameters():
        if p.requires_grad:
            for report in from_two_processes:
                torch.testing.assert_close(report[kind][name], p.detach(), msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_wrapper_takes_ids_in_every_way(from_two_processes: list[dict], kind: str) -> None:
    for report in from_two_processes:
        distances = {w: d for w, d in report["ways of giving ids"].items() if w.startswith(kind)}
        assert len(distances) == 5
        assert max(distances.values()) < 1e-6, distances


def test_a_task_of_a_wrapped_model_is_written_as_a_lora(from_two_processes: list[dict]) -> None:
    assert max(report["lora"] for report in from_two_processes) < 1e-6
