"""Statistics of routing tables: discreteness, sparsity, use of skills, and similarity of tasks.

Tables are read from a model, a folder of `save_pretrained` or one of `save_routing`; folders need no base
model.

| statistic    | of p = sigmoid(logit)                      | 0                    | 1                  |
|--------------|--------------------------------------------|----------------------|--------------------|
| discreteness | mean binary entropy of p / log 2           | skills are on or off | undecided, p = ½   |
| sparsity     | mean of p rounded                          | no skill is on       | every skill is on  |
| usage        | entropy of the skills' shares of p / log S | one skill serves all | equal shares       |

Source: Ponti et al. 2022 (arXiv 2202.13914), names included: *discreteness* falls as routing becomes
discrete, and *sparsity* rises as more skills are on. With heads, usage is the mean over heads: skills compete
within one. Of routers without logits a skill's p is 1 where its weight is above 0.

Axes: K tasks, H heads, S skills.
"""

from __future__ import annotations

__all__ = ["RoutingTable", "read_routing", "routing_statistics", "task_similarity"]

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from thawline.errors import CheckpointError, RoutingError
from thawline.tuners._names import plain_name
from thawline.tuners.mhr.adapt import find_adapter
from thawline.tuners.mhr.routing import ROUTERS, Router, skill_weights

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
ROUTING = ("routing.json", "routing.safetensors")


@dataclass(frozen=True, eq=False)
class RoutingTable:
    """Weights with which every task mixes skills in every part of a model.

    Attributes:
        tasks: their names, or numbers as text.
        probabilities: part of the model that shares a table → (K, H, S), the probability that a skill is on.
        weights: likewise, the factors of the skills; each head's sum to one.
    """

    tasks: tuple[str, ...]
    probabilities: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


def read_routing(source: nn.Module | str | Path, adapter_name: str | None = None) -> RoutingTable:
    """Read the routing table of a model or a folder.

    Args:
        source: a model with MHR layers, or a folder that `save_pretrained` or `save_routing` wrote.
        adapter_name: the adapter, where a model has several. None: the active one.
    Raises: RoutingError: if there is no routing: no MHR, or its skills are averaged (uniform, mu).
        CheckpointError: if the folder holds neither.
    """
    if isinstance(source, nn.Module):
        state, name = find_adapter(source, adapter_name)
        config = state.configs[name]
        return _of_routers(state.tables_of(name), config.n_tasks or 1, config.task_names)
    folder = Path(source)
    if all((folder / file).is_file() for file in ADAPTER):
        return _of_files(folder, *ADAPTER)
    if all((folder / file).is_file() for file in ROUTING):
        return _of_files(folder, *ROUTING)
    raise CheckpointError(
        f"'{folder}' holds no routing: expected {' and '.join(ADAPTER)}, or {' and '.join(ROUTING)}."
    )


def routing_statistics(table: RoutingTable) -> dict[str, Any]:
    """Compute discreteness, sparsity and usage (see the top of this file).

    Returns: {"discreteness", "sparsity", "usage", "modules": {part: these three}}; the first are means over
        the parts. Usage of a single skill is 1.
    """
    modules = {
        part: {name: statistic(p) for name, statistic in STATISTICS.items()}
        for part, p in table.probabilities.items()
    }
    means = {name: statistics.mean(found[name] for found in modules.values()) for name in STATISTICS}
    return {**means, "modules": modules}


def task_similarity(table: RoutingTable) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute cosines between the tasks' routing rows, all heads concatenated: (K, K), overall and by part.

    Weights are never negative, so cosines lie in 0 … 1, and tasks that still share a fresh table are at 1.

    Returns: the mean over parts, and the cosines by part; fp64.
    """
    of_parts = {}
    for part, weights in table.weights.items():
        rows = weights.flatten(1).double()
        rows = rows / rows.norm(dim=1, keepdim=True)
        of_parts[part] = rows @ rows.T
    return torch.stack(list(of_parts.values())).mean(0), of_parts


def _discreteness(p_KHS: Tensor) -> float:
    entropy = torch.special.entr(p_KHS) + torch.special.entr(1 - p_KHS)
    return float(entropy.mean()) / math.log(2)


def _sparsity(p_KHS: Tensor) -> float:
    return float(p_KHS.round().mean())


def _usage(p_KHS: Tensor) -> float:
    n_skills = p_KHS.shape[-1]
    if n_skills == 1:
        return 1.0
    used_HS = p_KHS.sum(0)
    shares_HS = used_HS / used_HS.sum(-1, keepdim=True)
    return float(torch.special.entr(shares_HS).sum(-1).mean()) / math.log(n_skills)


STATISTICS = {"discreteness": _discreteness, "sparsity": _sparsity, "usage": _usage}


def _of_files(folder: Path, facts_file: str, tensors_file: str) -> RoutingTable:
    facts = json.loads((folder / facts_file).read_text(encoding="utf-8"))
    if facts.get("peft_type", "MHR") != "MHR":
        raise RoutingError(f"'{folder}' is a {facts['peft_type']} adapter; only MHR and Poly route tasks.")
    kind = ROUTERS[facts["router"]]
    n_tasks, tables = facts["n_tasks"] or 1, {}
    for key, tensor in load_file(folder / tensors_file).items():
        where, _, name = key.rpartition(".")
        if name in ("logits", "table") and (facts_file == ROUTING[0] or where.endswith("mhr_router")):
            router = kind(n_tasks, *tensor.shape[1:])
            router.load_state_dict({name: tensor})
            router.uniform_mix = facts["uniform_mix"]
            tables[plain_name(where).removesuffix(".mhr_router")] = router
    if facts["router"] == "private":  # has nothing to save
        tables = {"": kind(n_tasks, 1, facts["n_skills"])}
    return _of_routers(tables, n_tasks, facts["task_names"])


def _of_routers(tables: Mapping[str, Router], n_tasks: int, names: list[str] | None) -> RoutingTable:
    if not any(router.needs_ids for router in tables.values()):
        raise RoutingError("The adapter routes no tasks: its skills are averaged for all of them.")
    probabilities, weights = {}, {}
    for part in sorted(tables, key=_by_number):
        probabilities[part], weights[part] = _read(tables[part])
    tasks = names or [str(number) for number in range(n_tasks)]
    return RoutingTable(tuple(tasks), probabilities, weights)


def _by_number(part: str) -> list[tuple[int, str]]:
    """Return a sort key for the order of blocks in the model, which files do not keep: 2 before 10."""
    return [(int(word) if word.isdigit() else -1, word) for word in part.split(".")]


@torch.no_grad()
def _read(router: Router) -> tuple[Tensor, Tensor]:
    """Return probabilities and weights, (K, H, S), fp64, on the CPU."""
    state = router.state_dict()
    if "logits" in state:
        logits = state["logits"].double().cpu()
        return logits.sigmoid(), skill_weights(logits, uniform_mix=router.uniform_mix)
    device = state["table"].device if "table" in state else None
    found = router(torch.arange(router.n_tasks, device=device))
    assert found is not None
    weights = found.double().cpu()
    return (weights > 0).double(), weights
