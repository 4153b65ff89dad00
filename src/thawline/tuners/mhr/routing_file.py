"""The routing table alone as files: kilobytes that switch a shared inventory of skills to other tasks."""

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
from thawline.files import atomic_folder, write_json
from thawline.tuners.mhr.adapt import find_adapter, forget_mixtures
from thawline.tuners.mhr.state import RoutingState

TENSORS, FACTS = "routing.safetensors", "routing.json"
FIELDS = ("router", "n_tasks", "task_names", "n_skills", "granularity", "uniform_mix")
"""Fields of the config in FACTS; SKILLS beside them tells which skills the table was trained with."""
SKILLS = "skills_sha256"


def save_routing(model: nn.Module, directory: str | Path, adapter_name: str | None = None) -> None:
    """Write the adapter's routing table, S·H numbers per linear and task, and the tasks' names.

    Writes: routing.safetensors and routing.json in `directory`.
    """
    state, name = find_adapter(model, adapter_name)
    config = state.configs[name]
    tensors = {key: tensor.detach().contiguous() for key, tensor in _tensors(state, name).items()}
    facts = {field: getattr(config, field) for field in FIELDS} | {SKILLS: _fingerprint(state, name)}
    with atomic_folder(directory) as folder:  # a kill while writing leaves the pair of files as it was
        save_file(tensors, folder / TENSORS)
        write_json(folder / FACTS, facts)


def load_routing(model: nn.Module, directory: str | Path, adapter_name: str | None = None) -> None:
    """Replace the model's routing table and tasks by saved ones.

    Warns if they were trained with other skills than the model has.

    Raises: CheckpointError: if files are missing, broken, or of another router, granularity, number of skills
        or heads.
    """
    state, name = find_adapter(model, adapter_name)
    config, folder = state.configs[name], Path(directory)
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
    current = _tensors(state, name)
    for key, old in current.items():
        expected = (facts["n_tasks"], *old.shape[1:])
        found = tuple(tensors[key].shape) if key in tensors else None
        if found != expected:
            raise CheckpointError(
                f"'{folder}' has {key} of shape {found}, the model needs {expected} (tasks, heads, skills)."
            )
    if len(tensors) != len(current):
        raise CheckpointError(f"'{folder}' has tables for other modules than the model adapts.")
    if facts[SKILLS] != _fingerprint(state, name):
        warnings.warn(
            f"The routing in '{folder}' was trained with other skills than this model has.", stacklevel=2
        )
    for part, router in state.tables_of(name).items():
        router.set_rows(facts["n_tasks"])
        router.load_state_dict({key: tensors[_key(part, key)] for key in router.state_dict()})
        router.uniform_mix = facts["uniform_mix"]
    saved = {field: facts[field] for field in ("n_tasks", "task_names", "uniform_mix")}
    state.configs[name] = replace(config, **saved)
    forget_mixtures(state)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        missing = [field for field in (*FIELDS, SKILLS) if field not in facts]
        if missing:
            raise CheckpointError(f"'{folder / FACTS}' lacks {missing}: expected a file of save_routing.")
        return facts, load_file(folder / TENSORS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"'{folder}' holds a broken routing file: {error}") from error


def _tensors(state: RoutingState, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter's tables by their key in the file."""
    return {
        _key(part, key): tensor
        for part, router in state.tables_of(name).items()
        for key, tensor in router.state_dict().items()
    }


def _key(part: str, key: str) -> str:
    return f"{part}.{key}" if part else key


def _fingerprint(state: RoutingState, name: str) -> str:
    digest = hashlib.sha256()
    for layer in state.layers_of(name):
        for skills in (layer.mhr_A, layer.mhr_B):
            digest.update(skills[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
