"""Adapt a pre-trained model to new tasks: full, z and mu; add tasks, split heads, anneal the routing.

| mode | trained on the new tasks                   | routing                                             |
|------|--------------------------------------------|-----------------------------------------------------|
| full | skills and routing rows                    | fresh rows                                          |
| z    | routing rows alone: S·H numbers per linear | fresh rows, skills frozen                           |
| mu   | one adapter                                | none: the skills are averaged first; needs no ids   |

Source: Caccia et al. 2023 (arXiv 2211.03831). Fresh rows start near zero, so at the average of the skills,
and replace the old ones. Differs from the authors' code: mu collapses the skills to their average before it
trains, where they train all S behind weights of 1/S. Under Adam the average moves alike, at 1/S of the
memory; under SGD theirs learns at 1/S of the rate.
"""

from __future__ import annotations

__all__ = [
    "add_tasks",
    "find_adapter",
    "forget_mixtures",
    "parameter_groups",
    "set_uniform_mix",
    "split_heads",
    "start_adaptation",
    "uniform_annealing",
]

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from thawline.errors import ConfigError, did_you_mean
from thawline.tuners.mhr.config import MODES, MHRConfig
from thawline.tuners.mhr.ids import read_ids
from thawline.tuners.mhr.layer import MHRLinear
from thawline.tuners.mhr.model import divisors
from thawline.tuners.mhr.routing import LearnedRouter, Router, UniformRouter
from thawline.tuners.mhr.state import Forward, RoutingState
from thawline.tuners.mhr.task_ids import find_state


def add_tasks(
    model: nn.Module,
    names: Sequence[str] | int,
    start_from: str | int = "fresh",
    adapter_name: str | None = None,
) -> None:
    """Add rows for more tasks to the routing table. New ids follow the old, whose rows stay bit-identical.

    The table is a new parameter afterwards: build the optimiser after this call.

    Args:
        names: names of the new tasks, or their number.
        start_from: "fresh" logits near zero, "uniform" zeros, the "mean" of the trained rows, or a task's id
            or name to copy.
        adapter_name: which adapter; `None` for the active one.
    Raises: ConfigError: for no names, or one that is taken. RoutingError: for an unknown task in
        `start_from`.
    """
    if not names or (isinstance(names, int) and names < 0):
        raise ConfigError(f"names={names!r}: expected the names of the new tasks, or their number.")
    state, name = find_adapter(model, adapter_name)
    config = state.configs[name]
    n_old = config.n_tasks or 1
    new_names = _numbered(n_old, names) if isinstance(names, int) else _names(names)
    n_new = len(new_names)
    changes: dict[str, Any] = {"n_tasks": n_old + n_new}
    if not isinstance(names, int) or config.task_names is not None:
        changes["task_names"] = [*(config.task_names or _numbered(0, n_old)), *new_names]
    if config.router == "private":
        changes["n_skills"] = n_old + n_new
    new = replace(config, **changes)
    _set_rows(state, name, n_new, start_from, keep=True)
    state.configs[name] = new
    if config.router == "private":
        for layer in state.layers_of(name):
            A, B = layer.mhr_A[name], layer.mhr_B[name]
            new_A, new_B = A.new_empty(n_new, *A.shape[1:]), B.new_empty(n_new, *B.shape[1:])
            layer.init_skills(name, new_A, new_B)
            layer.mhr_A[name] = nn.Parameter(torch.cat([A.detach(), new_A]), A.requires_grad)
            layer.mhr_B[name] = nn.Parameter(torch.cat([B.detach(), new_B]), B.requires_grad)
    forget_mixtures(state)


def start_adaptation(
    model: nn.Module,
    mode: Literal["full", "z", "mu"],
    tasks: Sequence[str] | int = 1,
    start_from: str | int = "fresh",
    adapter_name: str | None = None,
) -> None:
    """Switch a pre-trained model, in place, to new tasks: id 0 is the first of `tasks`; old rows are dropped.

    Works on a model fresh from training or from `PeftModel.from_pretrained`, whose adapter it makes
    trainable. What is trained afterwards is saved and loaded with the model. Build the optimiser after this
    call.

    Args:
        mode: what trains (see the top of this file).
        tasks: names of the new tasks, or their number.
        start_from: where new rows start (see `add_tasks`).
        adapter_name: which adapter; `None` for the active one.
    Raises: ConfigError: for z without a learned routing table, an unknown mode, or a merged model.
        RoutingError: for an unknown task in `start_from`.
    """
    state, name = find_adapter(model, adapter_name)
    config = state.configs[name]
    if mode not in MODES[1:]:
        raise ConfigError(f"Unknown mode={mode!r}. {did_you_mean(str(mode), MODES[1:])}")
    if mode == "z" and config.router != "learned":
        raise ConfigError(
            f"mode='z' trains the routing table, but router={config.router!r} has none that learns."
        )
    if any(layer.merged for layer in state.layers):
        raise ConfigError("The adapter is merged into the weights. Call model.unmerge_adapter() first.")
    task_names = None if isinstance(tasks, int) else _names(tasks)
    n_tasks = tasks if isinstance(tasks, int) else len(task_names or ())
    changes: dict[str, Any] = {"mode": mode, "n_tasks": n_tasks, "task_names": task_names}
    changes |= {"uniform_mix": 0.0, "inference_mode": False}
    if mode == "mu":
        changes |= {"router": "uniform", "n_skills": 1, "noise": "none"}
    elif config.router == "private":
        changes |= {"n_skills": n_tasks}
    new = replace(config, **changes)
    if "n_skills" in changes:
        _average_skills(state, name, new.n_skills)
    if mode == "mu":
        _drop_routing(state, name, n_tasks)
    else:
        _set_rows(state, name, n_tasks, start_from, keep=False)
    state.configs[name] = new
    for router in _routers(state, name):
        router.uniform_mix = 0.0
    for module in model.modules():
        if isinstance(module, MHRLinear | AuxiliaryTrainingWrapper):
            module.set_requires_grad(name, True)
    forget_mixtures(state)


def split_heads(model: nn.Module, n_heads: int, adapter_name: str | None = None) -> None:
    """Split every head into equal parts that start with its weights: the output stays the same, to rounding.

    Raises: ConfigError: if `n_heads` is not a multiple of the current heads, or does not divide a module's
        sizes.
    """
    state, name = find_adapter(model, adapter_name)
    layers, routers = state.layers_of(name), _routers(state, name)
    sizes = math.gcd(*(size for layer in layers for size in (layer.in_features, layer.out_features)))
    old = math.lcm(*(router.n_heads for router in routers))
    if n_heads % old or sizes % n_heads:
        fitting = [n for n in divisors(sizes) if n % old == 0]
        raise ConfigError(
            f"n_heads={n_heads} does not split the {old} heads of every module, or does not divide all of"
            f" their sizes. Use one of {fitting}."
        )
    state.configs[name] = replace(state.configs[name], n_heads=n_heads, heads_pattern=None)
    for router in routers:
        router.split_heads(n_heads)
    forget_mixtures(state, keep_ids=True)


def set_uniform_mix(model: nn.Module, share: float, adapter_name: str | None = None) -> None:
    """Mix 1/S into the learned weights: 0 routes as learned, 1 averages the skills for any task (zero-shot).

    Args:
        share: share of the uniform average, 0 to 1. Saved with the model.
    """
    state, name = find_adapter(model, adapter_name)
    state.configs[name] = replace(state.configs[name], uniform_mix=float(share))
    for router in _routers(state, name):
        router.uniform_mix = float(share)


def uniform_annealing(model: nn.Module, progress: float, adapter_name: str | None = None) -> None:
    """Move the routing from learned to uniform over the last steps of training (uniform annealing).

    w ← a·w + (1 − a)/S with a = cos(π/2 · progress), so that the model ends as the average of its skills,
    trained to be one.

    Args:
        progress: progress of the annealing, 0 to 1; call it every step.
    """
    set_uniform_mix(model, 1 - math.cos(math.pi / 2 * min(max(progress, 0.0), 1.0)), adapter_name)


def parameter_groups(
    model: nn.Module,
    lr: float,
    routing_lr: float = 0.1,
    weight_decay: float = 0.0,
    routing_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return optimiser groups: all that trains, with routing at its own learning rate and no weight decay.

    Routing wants a rate some hundred times that of the skills: they stay alike until it moves. The authors
    train at 0.1 and 1e-3. Decay would pull it to uniform.

    Returns: [{"params", "lr", "weight_decay"}, ...], skills and all else first, routing second; empty groups
        are left out.
    """
    routers = [router for layer in find_state(model).layers for router in layer.routers.values()]
    routing = {parameter for router in routers for parameter in router.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if (p in routing) is is_routing], "lr": rate, "weight_decay": decay}
        for is_routing, rate, decay in ((False, lr, weight_decay), (True, routing_lr, routing_weight_decay))
    ]
    return [group for group in groups if group["params"]]


def find_adapter(model: nn.Module, adapter_name: str | None = None) -> tuple[RoutingState, str]:
    """Return the state that the layers share, and the name of the active adapter, or of the one asked for.

    Raises: ConfigError: if there is no such adapter, or several are active and none is named.
    """
    state = find_state(model)
    active = state.active()
    if adapter_name is None and len(active) == 1:
        return state, active[0]
    if adapter_name in state.configs:
        return state, adapter_name
    raise ConfigError(
        f"adapter_name={adapter_name!r}, active {active}. {did_you_mean(str(adapter_name), state.configs)}"
    )


def forget_mixtures(state: RoutingState, keep_ids: bool = False) -> None:
    """Drop noise and mixtures made from parameters that were replaced, and the ids of old tasks."""
    state.forward = Forward(state.forward.ids if keep_ids else None)
    state.n_changes += 1


def _names(names: Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _numbered(first: int, n: int) -> list[str]:
    return [f"task_{number}" for number in range(first, first + n)]


def _routers(state: RoutingState, name: str) -> list[Router]:
    """Return each routing table of an adapter once."""
    return list(dict.fromkeys(layer.routers[name] for layer in state.layers_of(name)))


def _set_rows(state: RoutingState, name: str, n_tasks: int, start_from: str | int, keep: bool) -> None:
    routers = _routers(state, name)
    starts = [_start(router, state.configs[name], start_from) for router in routers]
    for router, start in zip(routers, starts, strict=True):
        router.set_rows(n_tasks, start, keep)


def _start(router: Router, config: MHRConfig, start_from: str | int) -> Tensor | None:
    """Return logits (1, H, S) that new rows start from; `None` for fresh ones."""
    if start_from == "fresh" or not isinstance(router, LearnedRouter):
        return None
    logits = router.logits.detach()
    if start_from == "uniform":
        return torch.zeros_like(logits[:1])
    if start_from == "mean":
        return logits.mean(0, keepdim=True)
    return logits.index_select(0, read_ids(start_from, config, logits.device).groups.rows)


def _average_skills(state: RoutingState, name: str, n_skills: int) -> None:
    """Replace the skills by `n_skills` copies of their average."""
    for layer in state.layers_of(name):
        for skills in (layer.mhr_A, layer.mhr_B):
            skills[name] = nn.Parameter(skills[name].detach().mean(0, keepdim=True).repeat(n_skills, 1, 1))


def _drop_routing(state: RoutingState, name: str, n_tasks: int) -> None:
    uniform = {router: UniformRouter(n_tasks, router.n_heads, 1) for router in _routers(state, name)}
    state.tables = {key: uniform.get(router, router) for key, router in state.tables.items()}
    for layer in state.layers_of(name):
        layer.routers[name] = uniform[layer.routers[name]]
        if name in layer.mhr_router:
            layer.mhr_router[name] = layer.routers[name]
