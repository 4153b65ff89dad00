"""Two processes train what one would: DDP, FSDP2 with its columns written shard by shard, and FSDP1."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin

from tests.support.paca_processes import (
    STEPS,
    Stack,
    batch,
    launch_environment,
    llama,
    optimizer_of,
    paca,
    report,
    train_llama,
    worker,
)

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


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "fsdp2 kept gathered", "fsdp2 bf16 base"])
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


@pytest.mark.parametrize("kind", ["recipe", "recipe nf4"])
def test_the_fsdp2_recipe_shards_and_trains_what_one_process_would(two_processes, kind):
    expected = train_llama(llama(kind.endswith("nf4")), [0, 1])
    for result in (ranks[kind] for ranks in two_processes):
        assert any("layers.0" in name and "delta" in name for name in result["sharded"])
        assert any("base_layer.weight" in name for name in result["sharded"]) == (kind == "recipe")
        for name, delta in expected["deltas"].items():
            torch.testing.assert_close(result["deltas"][name], delta, rtol=0, atol=1e-4)
        torch.testing.assert_close(result["output"], expected["output"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_the_deepspeed_recipes_make_accelerates_plugin(monkeypatch, name, stage):
    for key, value in launch_environment(name).items():
        monkeypatch.setenv(key, value)
    config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
