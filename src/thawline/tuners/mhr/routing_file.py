"""The routing table alone as a file: kilobytes that turn a shared inventory of skills to other tasks."""

from __future__ import annotations

__all__ = ["load_routing", "save_routing"]

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thawline.errors import CheckpointError
from thawline.tuners.mhr.adapt import find_adapter, forget
from thawline.tuners.mhr.layer import layers_of
from thawline.tuners.mhr.routing import Router
from thawline.tuners.mhr.state import TaskIds

TENSORS, FACTS = "routing.safetensors", "routing.json"
FIELDS = ("router", "n_tasks", "task_names", "n_skills", "granularity", "uniform_mix", "skills_sha256")
"""Of FACTS: those of the config, and which skills the table was trained with."""


def save_routing(model: nn.Module, directory: str | Path, adapter_name: str | None = None) -> None:
    """Write the adapter's routing table, S·H numbers per linear and task, and the tasks' names.

    Writes: routing.safetensors and routing.json in `directory`.
    """
    shared, name = find_adapter(model, adapter_name)
    config = shared.configs[name]
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{key}" if part else key: tensor.detach().contiguous()
        for part, router in _tables(shared, name).items()
        for key, tensor in router.state_dict().items()
    }
    facts = {field: getattr(config, field) for field in FIELDS[:-1]}
    facts[FIELDS[-1]] = _fingerprint(shared, name)
    # Both beside their places first: a kill while writing leaves the pair that was there.
    beside = {file: folder / f"{file}.partial" for file in (TENSORS, FACTS)}
    save_file(tensors, beside[TENSORS])
    beside[FACTS].write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for file, written in beside.items():
        written.replace(folder / file)


def load_routing(model: nn.Module, directory: str | Path, adapter_name: str | None = None) -> None:
    """Put a saved routing table, with its tasks, in the place of the model's.

    Warns if it was trained with other skills than the model has.

    Raises: CheckpointError: if files are missing, broken, or of another router, granularity, number of skills
        or heads.
    """
    shared, name = find_adapter(model, adapter_name)
    config = shared.configs[name]
    folder = Path(directory)
    missing = [file for file in (TENSORS, FACTS) if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"'{folder}' has no {' and no '.join(missing)}: expected a folder written by save_routing."
        )
    facts, tensors = _read(folder)
    for field in ("router", "granularity", "n_skills"):
        if facts[field] != getattr(config, field):
            raise CheckpointError(
                f"'{folder}' has {field}={facts[field]!r}, the model {field}={getattr(config, field)!r}."
            )
    tables = _tables(shared, name)
    for part, router in tables.items():
        for key, old in router.state_dict().items():
            _check(f"{part}.{key}" if part else key, tensors, old, facts["n_tasks"], folder)
    if len(tensors) != sum(len(router.state_dict()) for router in tables.values()):
        raise CheckpointError(f"'{folder}' has tables for other modules than the model adapts.")
    if facts["skills_sha256"] != _fingerprint(shared, name):
        warnings.warn(
            f"The routing in '{folder}' was trained with other skills than this model has.", stacklevel=2
        )
    for part, router in tables.items():
        router.set_rows(facts["n_tasks"])
        router.load_state_dict(
            {key: tensors[f"{part}.{key}" if part else key] for key in router.state_dict()}
        )
        router.uniform_mix = facts["uniform_mix"]
    shared.configs[name] = replace(
        config, n_tasks=facts["n_tasks"], task_names=facts["task_names"], uniform_mix=facts["uniform_mix"]
    )
    forget(shared)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        missing = [field for field in FIELDS if field not in facts]
        if missing:
            raise CheckpointError(f"'{folder / FACTS}' lacks {missing}: expected a file of save_routing.")
        return facts, load_file(folder / TENSORS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"'{folder}' holds a broken routing file: {error}") from error


def _tables(shared: TaskIds, name: str) -> dict[str, Router]:
    """The adapter's tables by the part of the model that uses them."""
    return {part: router for (adapter, part), router in shared.bins.items() if adapter == name}


def _check(key: str, tensors: dict[str, Tensor], old: Tensor, n_tasks: int, folder: Path) -> None:
    expected = (n_tasks, *old.shape[1:])
    found = tuple(tensors[key].shape) if key in tensors else None
    if found != expected:
        raise CheckpointError(
            f"'{folder}' has {key} of shape {found}, the model needs {expected} (tasks, heads, skills)."
        )


def _fingerprint(shared: TaskIds, name: str) -> str:
    digest = hashlib.sha256()
    for layer in layers_of(shared, name):
        for skills in (layer.mhr_A, layer.mhr_B):
            digest.update(skills[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
