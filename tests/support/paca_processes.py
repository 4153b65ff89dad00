"""Work of each of two processes in test_paca_processes.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.models import tiny_llama
from tests.support.paca import loss_of, tokens, train_step, wrap
from thawline import ConfigError
from thawline.bench.quantised import ReferenceLinear

STEPS = 4


class Stack(nn.Module):
    """Blocks to shard one by one; 15 rows do not divide evenly between two processes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.dtype = dtype
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 15, dtype=dtype), nn.Tanh(), nn.Linear(15, 12, dtype=dtype))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        for block in self.blocks:
            x = x + block(x)
        return x


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(100 * step + rank))


def paca(dtype: torch.dtype = torch.float32) -> nn.Module:
    return wrap(Stack(dtype), r=4, alpha=6, seed=5)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def report(model: nn.Module) -> dict[str, Tensor]:
    return {n: full(p) for n, p in model.named_parameters() if "delta" in n}


def run_ddp(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(paca())
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        for micro in range(2):  # an accumulation, so that a forward meets gradients that wait
            train_step(model, batch(2 * step + micro, rank))
        optimizer.step()
        optimizer.zero_grad()
    return {"deltas": report(model.module), "output": model(batch(-1, 0)).detach()}


def run_fsdp2(
    rank: int, reshard: bool = True, dtype: torch.dtype = torch.float32, policy: Any = None
) -> dict[str, Any]:
    model = paca(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    kwargs = {"reshard_after_forward": reshard} | ({"mp_policy": policy} if policy else {})
    for block in model.base_model.model.blocks:
        fully_shard(block, **kwargs)
    fully_shard(model, **kwargs)
    optimizer = optimizer_of(model)
    saved: dict[str, Tensor] = {}
    losses = []
    for step in range(STEPS):
        for micro in range(2):
            losses.append(train_step(model, batch(2 * step + micro, rank)).item())
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 and reshard:  # a checkpoint and a reference pass amid training
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            saved = {n: t.clone() for n, t in state.items()}
            with torch.no_grad(), model.disable_adapter():
                disabled = model(batch(-1, 0))
    deltas = report(model)
    with torch.no_grad():
        output = model(batch(-1, 0))
    results = {"deltas": deltas, "output": output, "losses": losses}
    if reshard:
        kept = all(torch.equal(saved[n], w) for n, w in before.items()) if rank == 0 else True
        results |= {"saved the original": kept, "disabled": disabled}
    return results


def run_fsdp1() -> dict[str, Any]:
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}  # as accelerate launches it
    adapted = paca()
    del os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"]
    policy = ModuleWrapPolicy([nn.Sequential])
    device = torch.device("cpu")
    model = FullyShardedDataParallel(adapted, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(STEPS):
        for micro in range(2):
            train_step(model, batch(2 * step + micro, dist.get_rank()))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        output = model(batch(-1, 0))
    with FullyShardedDataParallel.summon_full_params(model):
        deltas = {n.replace("_fsdp_wrapped_module.", ""): d for n, d in report(adapted).items()}
        return {"deltas": deltas, "output": output}


def switch_while_gathered() -> str:
    """The message for switching adapters while FSDP2's root keeps its layers gathered after a forward."""
    model = fully_shard(paca())
    optimizer_of(model).step()
    with torch.no_grad():
        model(batch(0, 0))
    try:
        model.base_model.disable_adapter_layers()
    except ConfigError as error:
        return str(error)
    return ""


def launch_environment(name: str) -> dict[str, str]:
    """What `accelerate launch` sets for a file of recipes/distributed."""
    file = str(Path(__file__).parents[2] / "recipes" / "distributed" / f"{name}.yaml")
    asked = launch_command_parser().parse_args(["--config_file", file, "x.py"])
    args, found, _ = _validate_launch_command(asked)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(found.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def llama(quantised: bool) -> nn.Module:
    base = tiny_llama(hidden_size=64, intermediate_size=64)
    return wrap(quantise_plainly(base) if quantised else base, r=4)


def quantise_plainly(base: nn.Module) -> nn.Module:
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            base.set_submodule(name, ReferenceLinear(module, "nf4"))
    return base


def train_llama(model: nn.Module, ranks: Sequence[int]) -> dict[str, Any]:
    optimizer = optimizer_of(model)
    for step in range(2):
        for rank in ranks:
            (loss_of(model, 10 * step + rank) / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return {"deltas": report(model), "output": model(tokens(99)).logits}


def run_recipe(rank: int, quantised: bool) -> dict[str, Any]:
    """Train a small Llama, sharded by accelerate with the settings of recipes/distributed/fsdp2.yaml."""
    os.environ |= launch_environment("fsdp2") | {"ACCELERATE_MIXED_PRECISION": "no"}
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin()),
        device=torch.device("cpu"),
        is_main_process=rank == 0,
        mixed_precision="no",
    )
    model = fsdp2_prepare_model(accelerator, llama(quantised))
    return train_llama(model, [rank]) | {
        "sharded": [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = {
        "ddp": run_ddp(rank),
        "fsdp1": run_fsdp1(),
        "fsdp2": run_fsdp2(rank),
        "fsdp2 kept gathered": run_fsdp2(rank, reshard=False),
        "fsdp2 bf16 base": run_fsdp2(rank, dtype=torch.bfloat16),
        "fsdp2 mixed": run_fsdp2(rank, policy=half),
    }
    results["gathered"] = switch_while_gathered()
    results |= {"recipe": run_recipe(rank, False), "recipe nf4": run_recipe(rank, True)}
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
