"""From the tasks a model was pre-trained on to new ones: full, z and mu; more tasks, more heads, less
routing.

| mode | what trains on the new tasks               | routing                                              |
|------|--------------------------------------------|------------------------------------------------------|
| full | skills and routing rows                    | fresh rows                                           |
| z    | routing rows alone: S·H numbers per linear | fresh rows, skills frozen                            |
| mu   | one adapter                                | none: the skills are averaged first, and no ids asked |

Source: Caccia et al. 2023 (arXiv 2211.03831). Fresh rows start near zero, so at the average of the skills,
and the old ones go. Differs from the authors' code: mu collapses the skills to their average before it
trains, where they train all S behind weights of 1/S. Under Adam the average moves alike, at 1/S of the
memory; under SGD theirs learns at 1/S of the rate.
"""

from __future__ import annotations

__all__ = [
    "add_tasks",
    "find_adapter",
    "forget",
    "parameter_groups",
    "set_uniform_mix",
    "split_heads",
    "start_adaptation",
    "uniform_annealing",
]

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from thawline.errors import ConfigError, did_you_mean
from thawline.tuners.mhr.config import MODES, MHRConfig
from thawline.tuners.mhr.ids import read_ids
from thawline.tuners.mhr.layer import MHRLinear, layers_of
from thawline.tuners.mhr.model import divisors, find_task_ids
from thawline.tuners.mhr.routing import LearnedRouter, Router, UniformRouter
from thawline.tuners.mhr.state import TaskIds


def add_tasks(
    model: nn.Module,
    names: Sequence[str] | int,
    start_from: str | int = "fresh",
    adapter_name: str | None = None,
) -> None:
    """Give the routing table rows for more tasks. Their ids go on where the old ones end, which stay
    bit-identical.

    The table is a new parameter afterwards: make the optimiser after this call.

    Args:
        names: of the new tasks, or how many.
        start_from: "fresh" logits near zero, "uniform" zeros, the "mean" of the trained rows, or a task's id
            or name to copy.
        adapter_name: which adapter; `None` for the active one.
    Raises: ConfigError: for no names, or one that is taken. RoutingError: for an unknown task in
        `start_from`.
    """
    if not names or (isinstance(names, int) and names < 0):
        raise ConfigError(f"names={names!r}: expected the names of the new tasks, or how many.")
    shared, name = find_adapter(model, adapter_name)
    config = shared.configs[name]
    n_old = config.n_tasks or 1
    new_names = _numbered(n_old, names) if isinstance(names, int) else _names(names)
    is_numbered = isinstance(names, int) and config.task_names is None
    old_names = config.task_names or _numbered(0, n_old)
    task_names = None if is_numbered else [*old_names, *new_names]
    n_new = len(new_names)
    is_private = config.router == "private"
    n_skills = n_old + n_new if is_private else config.n_skills
    new = replace(config, n_tasks=n_old + n_new, task_names=task_names, n_skills=n_skills)
    _set_rows(shared, name, n_new, start_from, keep=True)
    shared.configs[name] = new
    if is_private:
        _append_skills(shared, name, n_new)
    forget(shared)


def start_adaptation(
    model: nn.Module,
    mode: Literal["full", "z", "mu"],
    tasks: Sequence[str] | int = 1,
    start_from: str | int = "fresh",
    adapter_name: str | None = None,
) -> None:
    """Turn a pre-trained model, in place, to new tasks: id 0 is the first of `tasks`, and the old rows go.

    Works on a model fresh from training or from `PeftModel.from_pretrained`, whose adapter it makes
    trainable. What is trained afterwards is saved and loaded with the model. Make the optimiser after this
    call.

    Args:
        mode: what trains (see the top of this file).
        tasks: names of the new tasks, or how many.
        start_from: where new rows start (see `add_tasks`).
        adapter_name: which adapter; `None` for the active one.
    Raises: ConfigError: for z without a learned routing table, an unknown mode, or a merged model.
        RoutingError: for an unknown task in `start_from`.
    """
    shared, name = find_adapter(model, adapter_name)
    config = shared.configs[name]
    if mode not in MODES[1:]:
        raise ConfigError(f"Unknown mode={mode!r}. {did_you_mean(str(mode), MODES[1:])}")
    if mode == "z" and config.router != "learned":
        raise ConfigError(
            f"mode='z' trains the routing table, but router={config.router!r} has none that learns."
        )
    if any(layer.merged for layer in layers_of(shared)):
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
    if mode == "mu":
        _collapse(shared, name, 1)
        _drop_routing(shared, name, n_tasks)
    else:
        if config.router == "private":
            _collapse(shared, name, n_tasks)
        _set_rows(shared, name, n_tasks, start_from, keep=False)
    shared.configs[name] = new
    for router in _routers(shared, name):
        router.uniform_mix = 0.0
    for module in model.modules():
        if isinstance(module, MHRLinear | AuxiliaryTrainingWrapper):
            module.set_requires_grad(name, True)
    forget(shared)


def split_heads(model: nn.Module, n_heads: int, adapter_name: str | None = None) -> None:
    """Split every head into equal parts that start with its weights: the output stays the same, to rounding.

    Raises: ConfigError: if `n_heads` is not a multiple of the heads there are, or does not divide a module's
        sizes.
    """
    shared, name = find_adapter(model, adapter_name)
    sizes = math.gcd(
        *(size for layer in layers_of(shared, name) for size in (layer.in_features, layer.out_features))
    )
    old = math.lcm(*(router.n_heads for router in _routers(shared, name)))
    if n_heads % old or sizes % n_heads:
        fitting = [n for n in divisors(sizes) if n % old == 0]
        raise ConfigError(
            f"n_heads={n_heads} does not split the {old} heads of every module, or does not divide all of"
            " their sizes."
            f" Use one of {fitting}."
        )
    shared.configs[name] = replace(shared.configs[name], n_heads=n_heads, heads_pattern=None)
    for router in _routers(shared, name):
        router.split_heads(n_heads)
    forget(shared, keep_ids=True)


def set_uniform_mix(model: nn.Module, share: float, adapter_name: str | None = None) -> None:
    """Mix 1/S into the learned weights: 0 routes as learned, 1 averages the skills whatever the task
    (zero-shot).

    Args:
        share: of the uniform average, 0 to 1. Saved with the model.
    """
    shared, name = find_adapter(model, adapter_name)
    shared.configs[name] = replace(shared.configs[name], uniform_mix=float(share))
    for router in _routers(shared, name):
        router.uniform_mix = float(share)


def uniform_annealing(model: nn.Module, progress: float, adapter_name: str | None = None) -> None:
    """Uniform annealing: move the routing from learned to uniform over the last steps of training.

    w ← a·w + (1 − a)/S with a = cos(π/2 · progress), so that the model ends as the average of its skills,
    trained to be one.

    Args:
        progress: through the annealing, 0 to 1; call it every step.
    """
    set_uniform_mix(model, 1 - math.cos(math.pi / 2 * min(max(progress, 0.0), 1.0)), adapter_name)


def parameter_groups(
    model: nn.Module,
    lr: float,
    routing_lr: float = 0.1,
    weight_decay: float = 0.0,
    routing_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: what trains, with routing apart, at its own learning rate and without weight
    decay.

    Routing wants a rate some hundred times that of the skills: they stay alike until it moves. The authors
    train at 0.1 and 1e-3. Decay would pull it to uniform.

    Returns: [{"params", "lr", "weight_decay"}, ...], skills and all else first, routing second; none is
        empty.
    """
    routing = {
        parameter
        for layer in layers_of(find_task_ids(model))
        for router in layer.routers.values()
        for parameter in router.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in routing], "lr": lr, "weight_decay": weight_decay},
        {
            "params": [p for p in trained if p in routing],
            "lr": routing_lr,
            "weight_decay": routing_weight_decay,
        },
    ]
    return [group for group in groups if group["params"]]


def find_adapter(model: nn.Module, adapter_name: str | None = None) -> tuple[TaskIds, str]:
    """What the layers share, and the name of the active adapter, or of the one asked for.

    Raises: ConfigError: if there is no such adapter, or several are active and none is named.
    """
    shared = find_task_ids(model)
    active = shared.active()
    if adapter_name is None and len(active) == 1:
        return shared, active[0]
    if adapter_name in shared.configs:
        return shared, adapter_name
    raise ConfigError(
        f"adapter_name={adapter_name!r}, active {active}. {did_you_mean(str(adapter_name), shared.configs)}"
    )


def _names(names: Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _numbered(first: int, n: int) -> list[str]:
    return [f"task_{number}" for number in range(first, first + n)]


def _routers(shared: TaskIds, name: str) -> Iterator[Router]:
    """Each routing table of an adapter, once."""
    return iter({id(layer.routers[name]): layer.routers[name] for layer in layers_of(shared, name)}.values())


def _set_rows(shared: TaskIds, name: str, n_tasks: int, start_from: str | int, keep: bool) -> None:
    config = shared.configs[name]
    starts = [_start(router, config, start_from) for router in _routers(shared, name)]
    for router, start in zip(_routers(shared, name), starts, strict=True):
        router.set_rows(n_tasks, start, keep)


def _start(router: Router, config: MHRConfig, start_from: str | int) -> Tensor | None:
    """Logits (1, H, S) that new rows start from; `None` for fresh ones."""
    if start_from == "fresh" or not isinstance(router, LearnedRouter):
        return None
    logits = router.logits.detach()
    if start_from == "uniform":
        return torch.zeros_like(logits[:1])
    if start_from == "mean":
        return logits.mean(0, keepdim=True)
    return logits.index_select(0, read_ids(start_from, config, logits.device).groups.rows)


def _collapse(shared: TaskIds, name: str, n_skills: int) -> None:
    """Put the average of the skills in the place of each."""
    for layer in layers_of(shared, name):
        for skills in (layer.mhr_A, layer.mhr_B):
            mean = skills[name].detach().mean(0, keepdim=True).repeat(n_skills, 1, 1)
            skills[name] = nn.Parameter(mean)


def _append_skills(shared: TaskIds, name: str, n_new: int) -> None:
    for layer in layers_of(shared, name):
        A, B = layer.mhr_A[name], layer.mhr_B[name]
        new_A, new_B = A.new_empty(n_new, *A.shape[1:]), B.new_empty(n_new, *B.shape[1:])
        layer.init_skills(name, new_A, new_B)
        layer.mhr_A[name] = nn.Parameter(torch.cat([A.detach(), new_A]), requires_grad=A.requires_grad)
        layer.mhr_B[name] = nn.Parameter(torch.cat([B.detach(), new_B]), requires_grad=B.requires_grad)


def _drop_routing(shared: TaskIds, name: str, n_tasks: int) -> None:
    uniform = {id(router): UniformRouter(n_tasks, router.n_heads, 1) for router in _routers(shared, name)}
    shared.bins = {key: uniform.get(id(router), router) for key, router in shared.bins.items()}
    for layer in layers_of(shared, name):
        layer.routers[name] = uniform[id(layer.routers[name])]
        if name in layer.mhr_router:
            layer.mhr_router[name] = layer.routers[name]


def forget(shared: TaskIds, keep_ids: bool = False) -> None:
    """Ids, noise and mixtures of before."""
    shared.ids = shared.ids if keep_ids else None
    shared.n_changes += 1
    for layer in layers_of(shared):
        layer.mixed.clear()
