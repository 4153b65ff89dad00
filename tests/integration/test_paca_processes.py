"""Two processes train what one would: DDP, and FSDP2 with its columns written shard by shard."""

from __future__ import annotations

import pytest
import torch

from tests.support.paca_processes import STEPS, Stack, batch, optimizer_of, paca, report, worker

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # fork saves importing everything twice more; a process that has touched a GPU cannot be forked.
    method = "spawn" if torch.cuda.is_initialized() else "fork"
    torch.multiprocessing.start_processes(worker, (str(folder),), nprocs=2, start_method=method)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def one_process(dtype: torch.dtype = torch.float32):
    """The same batches in one process; what it should come to."""
    model = paca(dtype)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        for micro in range(2):
            for rank in range(2):
                (model(batch(2 * step + micro, rank)).float().square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return report(model), model(batch(-1, 0)).detach()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 kept gathered", "fsdp2 bf16 base"])
def test_two_processes_train_what_one_would(two_processes, kind):
    deltas, output = one_process(torch.bfloat16 if "bf16" in kind else torch.float32)
    # A sum over processes rounds otherwise than one over a batch.
    tolerance = {"rtol": 0, "atol": 2e-2 if "bf16" in kind else 1e-6}
    for result in two_processes:
        for name, expected in deltas.items():
            torch.testing.assert_close(result[kind]["deltas"][name], expected, **tolerance)
        torch.testing.assert_close(result[kind]["output"], output, **tolerance)


def test_fsdp2_trains_under_mixed_precision(two_processes):
    first, second = (result["fsdp2 mixed"] for result in two_processes)
    assert all(
        torch.equal(d, second["deltas"][n]) and d.abs().max() > 0.05 for n, d in first["deltas"].items()
    )
    assert first["losses"][-1] < first["losses"][0]


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 bf16 base"])
def test_an_fsdp2_checkpoint_holds_the_original_weights_and_disabling_brings_them_back(two_processes, kind):
    assert all(result[kind]["saved the original"] for result in two_processes)
    base = Stack(torch.bfloat16 if "bf16" in kind else torch.float32)
    assert torch.equal(two_processes[1][kind]["disabled"], base(batch(-1, 0)))


def test_switching_a_gathered_layer_is_refused(two_processes):
    assert "reshard()" in two_processes[0]["gathered"]
