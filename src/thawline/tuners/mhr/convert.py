"""Checkpoints of other libraries as MHR: PEFT's Poly, the authors' mttl, and LoRAs as an inventory of skills.

| source          | A                    | B                     | routing               | scale            |
|-----------------|----------------------|-----------------------|-----------------------|------------------|
| here            | (S, I, r)            | (S, O, r)             | (K, H, S)             | alpha / r        |
| PEFT Poly, mttl | (H, S, I/H, r)       | (H, S, r, O/H)        | (K, H·S), head-major  | 1 / r, alpha / r |
| LoRA            | (r, I)               | (O, r)                | –                     | alpha / r        |
"""

from __future__ import annotations

__all__ = ["from_loras", "from_mttl", "from_poly"]

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PolyConfig, get_peft_model
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from thawline.errors import CheckpointError, ConfigError
from thawline.tuners._names import PREFIX
from thawline.tuners.mhr.config import MHRConfig

POLY_KEYS = {"poly_lora_A": "mhr_A", "poly_lora_B": "mhr_B", "poly_router.module_logits": "mhr_router.logits"}
MTTL_KEYS = {"lora_a": "mhr_A", "lora_b": "mhr_B", "selector.module_logits": "mhr_router.logits"}
SHARED_WITH_POLY = (
    "r", "n_tasks", "n_skills", "target_modules", "exclude_modules", "modules_to_save", "task_type",
    "base_model_name_or_path",
)  # fmt: skip
SET_BY_LORAS = ("r", "alpha", "n_skills", "target_modules", "peft_type", "peft_version", "auto_mapping")


def from_poly(base_model: nn.Module, directory: str | Path) -> PeftModel:
    """Load a PEFT Poly adapter, with any number of splits, as MHR on `base_model`: equal in evaluation.

    Training continues as PEFT's does, with noise per example; set `noise="none"` in the config to train as
    the authors do.

    Raises: CheckpointError: if the folder has no adapter, or one of another type.
    """
    poly = _read_config(directory)
    if not isinstance(poly, PolyConfig):
        raise CheckpointError(f"'{directory}' holds a {poly.peft_type} adapter; expected POLY.")
    fields = {name: getattr(poly, name) for name in SHARED_WITH_POLY}
    config = MHRConfig(**fields, alpha=1.0, n_heads=poly.n_splits, noise="example", a_init="peft")
    weights = load_peft_weights(str(directory), device="cpu")
    return _load(base_model, config, _convert(weights, POLY_KEYS), str(directory))


def from_mttl(
    base_model: nn.Module,
    checkpoint: str | Path | Mapping[str, Tensor],
    alpha: float = 1.0,
    prefix: str = "model.",
    task_names: Sequence[str] | None = None,
) -> PeftModel:
    """Load a Poly or MHR checkpoint of the authors' library, microsoft/mttl, as MHR on `base_model`.

    Args:
        checkpoint: a state dict, or a file with one (.safetensors, or written by torch.save; of a Lightning
            checkpoint its "state_dict"), in the fine-grained layout: a `selector` in every adapted linear.
        alpha: their `lora_alpha`.
        prefix: prefix of their keys before the base model's own names.
        task_names: names of the tasks in the order of their ids.
    Raises: CheckpointError: if it has nothing of MHR, or modules differ in rank, skills or heads.
    """
    weights = checkpoint if isinstance(checkpoint, Mapping) else _read_weights(Path(checkpoint))
    weights = {PREFIX + key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    converted = {key: tensor for key, tensor in _convert(weights, MTTL_KEYS).items() if ".mhr_" in key}
    shapes = {weights[key].shape[:2] + weights[key].shape[-1:] for key in weights if key.endswith(".lora_a")}
    tables = {tensor.shape[0] for key, tensor in converted.items() if key.endswith(".logits")}
    if len(shapes) != 1 or len(tables) != 1:
        raise CheckpointError(
            f"Expected one shape (heads, skills, rank) for all modules, found {sorted(map(tuple, shapes))},"
            f" and one number of tasks, found {sorted(tables)}. Is this a fine-grained Poly or MHR checkpoint"
            " of mttl?"
        )
    n_heads, n_skills, r = shapes.pop()
    config = MHRConfig(
        r=r,
        alpha=alpha,
        n_tasks=tables.pop(),
        task_names=None if task_names is None else list(task_names),
        n_skills=n_skills,
        n_heads=n_heads,
        target_modules={_module(key, ".mhr_A") for key in converted if key.endswith(".mhr_A")},
        a_init="mttl",
    )
    return _load(base_model, config, converted, "the checkpoint")


def from_loras(
    base_model: nn.Module, directories: Sequence[str | Path], config: MHRConfig | None = None
) -> PeftModel:
    """Load LoRA adapters as the skills of an inventory: route among them, or train the routing alone.

    With z and one head this is LoraHub (Huang et al. 2023, arXiv 2307.13269) by gradient. Smaller ranks are
    padded with zeros; each LoRA's own scale goes into its B, so that a skill alone is exactly that LoRA.

    Args:
        directories: folders written by `PeftModel.save_pretrained` with a `LoraConfig`.
        config: tasks, heads and routing; its r, alpha, n_skills and targets are set here. `None`: one task,
            one head.
    Raises: CheckpointError: if an adapter is no plain LoRA of linears, or of other modules than the first.
    """
    if not directories:
        raise ConfigError("directories is empty: expected at least one LoRA.")
    loras = [_read_lora(directory) for directory in directories]
    modules = set(loras[0])
    for directory, lora in zip(directories, loras, strict=True):
        if set(lora) != modules:
            odd = sorted(set(lora) ^ modules)[:3]
            raise CheckpointError(f"'{directory}' adapts other modules than '{directories[0]}', e.g. {odd}.")
    r = max(A.shape[0] for lora in loras for A, _ in lora.values())
    given = {} if config is None else {field.name: getattr(config, field.name) for field in fields(config)}
    kept = {name: value for name, value in given.items() if name not in SET_BY_LORAS}
    config = MHRConfig(**kept, r=r, alpha=float(r), n_skills=len(loras), target_modules=modules)
    weights: dict[str, Tensor] = {}
    for module in modules:
        weights[f"{PREFIX}{module}.mhr_A"] = torch.stack([_pad(lora[module][0].T, r) for lora in loras])
        weights[f"{PREFIX}{module}.mhr_B"] = torch.stack([_pad(lora[module][1], r) for lora in loras])
    return _load(base_model, config, weights, "the LoRAs", has_routing=False)


def _convert(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename tensors with known names (theirs → ours) and bring them into our layout; keep all others."""
    converted = {}
    n_heads = next((tensor.shape[0] for key, tensor in weights.items() if key.endswith(next(iter(names)))), 1)
    for key, tensor in weights.items():
        theirs = next((name for name in names if key.endswith(f".{name}")), "")
        ours = names.get(theirs, "")
        if ours == "mhr_A":  # (H, S, I/H, r)
            tensor = tensor.transpose(0, 1).flatten(1, 2).contiguous()
        elif ours == "mhr_B":  # (H, S, r, O/H)
            tensor = tensor.permute(1, 0, 3, 2).flatten(1, 2).contiguous()
        elif ours:  # (K, H·S)
            tensor = tensor.unflatten(1, (n_heads, -1)).contiguous()
        converted[key.removesuffix(theirs) + ours] = tensor
    return converted


def _load(
    base_model: nn.Module,
    config: MHRConfig,
    weights: dict[str, Tensor],
    source: str,
    has_routing: bool = True,
) -> PeftModel:
    """Wrap the model and load all weights of the adapter."""
    model = get_peft_model(base_model, config)
    result = set_peft_model_state_dict(model, weights)
    expected = (".mhr_",) if has_routing else (".mhr_A", ".mhr_B")
    missing = [key for key in result.missing_keys if any(part in key for part in expected)]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{source} does not fit {type(base_model).__name__}: missing {missing[:3]}, unexpected"
            f" {list(result.unexpected_keys)[:3]}."
        )
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    return loaded.get("state_dict", loaded)


def _read_config(directory: str | Path) -> PeftConfig:
    if not (Path(directory) / "adapter_config.json").is_file():
        raise CheckpointError(f"'{directory}' has no adapter_config.json: expected the folder of an adapter.")
    return PeftConfig.from_pretrained(str(directory))


def _read_lora(directory: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return factors (r, I) and (O, r) by module name, the second including the scale."""
    config = _read_config(directory)
    if not isinstance(config, LoraConfig) or config.use_dora:
        raise CheckpointError(
            f"'{directory}' holds no plain LoRA, but {config.peft_type} (DoRA counts as another)."
        )
    weights = load_peft_weights(str(directory), device="cpu")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for key in [key for key in weights if key.endswith(".lora_A.weight")]:
        module = _module(key, ".lora_A.weight")
        A, B = weights.pop(key), weights.pop(key.replace(".lora_A.", ".lora_B."))
        factors[module] = A.float(), B.float() * _lora_scale(config, module)
    odd = [*weights, *(module for module, (A, _) in factors.items() if A.dim() != 2)]
    if odd or not factors:
        raise CheckpointError(
            f"'{directory}' holds more than LoRA factors of linears, which no inventory of skills can hold:"
            f" {', '.join(odd[:3]) or 'no factors at all'}."
        )
    return factors


def _lora_scale(config: LoraConfig, module: str) -> float:
    """Return the number by which PEFT multiplies the product of a LoRA's factors."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    return alpha / (r**0.5 if config.use_rslora else r)


def _module(key: str, suffix: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(suffix)


def _pad(factor: Tensor, r: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, r - factor.shape[1]))
