"""Export an adapter of ours as a stock PEFT LoRA folder, which loads without thawline.

vLLM, TGI and merging tools read LoRA. A tuner's layer that equals a LoRA defines

    low_rank_factors(adapter_name: str, task: str | int | None) -> (A, B)

which returns the weights of that LoRA, scale included: (k, I) and (O, k), for a convolution in PEFT's shapes.
It raises ConfigError if no stock LoRA is equal, or `task` is not one of the adapter's.
"""

from __future__ import annotations

__all__ = ["adapter_named", "namesakes", "other_tensors", "to_lora"]

from collections import Counter
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import save_file
from torch import Tensor, nn

from thawline.errors import ConfigError, did_you_mean
from thawline.tuners._names import PREFIX, plain_name, unwrapped
from thawline.tuners.experts import ExpertsLinear


def to_lora(
    model: nn.Module,
    save_directory: str | Path,
    *,
    task: str | int | None = None,
    adapter_name: str | None = None,
) -> None:
    """Write an adapter as a stock PEFT LoRA adapter that changes the base model in exactly the same way.

    Modules trained in full (`modules_to_save`), trained tokens and biases are included. The model is not
    changed.

    Args:
        model: a `PeftModel`, or any model with injected adapters; may be wrapped by DDP or torch.compile.
        save_directory: folder for adapter_config.json and adapter_model.safetensors; created if missing.
        task: the task to write, for tuners that serve several. None for tuners that serve one.
        adapter_name: None: the only adapter, or the active one.
    Raises: ConfigError: for an unknown adapter, one of another tuner, or a layer that no LoRA equals.
    """
    model = unwrapped(model)
    name = adapter_named(model, adapter_name)
    config = model.peft_config[name]
    layers = {
        plain_name(path): layer
        for path, layer in _layers(model).items()
        if name in layer._get_available_adapters()
    }
    factors = {path: layer.low_rank_factors(name, task) for path, layer in layers.items()}
    if not factors:
        raise ConfigError(
            f"Adapter {name!r} is of type {config.peft_type.value}, which thawline cannot convert to "
            "LoRA. If it is a LoRA adapter already, use save_pretrained."
        )
    tensors = other_tensors(model, name)
    parameters = [path for path, layer in layers.items() if isinstance(layer.base_layer, ExpertsLinear)]
    ranks = {p: layers[p].r[name] if p in parameters else len(a) for p, (a, _) in factors.items()}
    for path, (a, b) in factors.items():
        key = _wrapper(path, parameters) if path in parameters else path
        tensors[f"{PREFIX}{key}.lora_A.weight"] = a
        tensors[f"{PREFIX}{key}.lora_B.weight"] = b

    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned: safetensors refuses two names for one storage, as of a bias in a module trained in full.
    save_file({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, folder / WEIGHTS)
    _lora_config(model, config, ranks, parameters).save_pretrained(str(folder))


def _wrapper(path: str, parameters: list[str]) -> str:
    """Return the name of PEFT's wrapper of a parameter: the last of a module's is the outermost."""
    module = path.rpartition(".")[0]
    siblings = [other for other in parameters if other.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(siblings) - 1 - siblings.index(path))


def _lora_config(model: nn.Module, config: Any, ranks: dict[str, int], parameters: list[str]) -> LoraConfig:
    (r, _), *_ = Counter(ranks.values()).most_common(1)
    # PEFT takes the first pattern that ends a module's name, so longer names come first: "a.fc" before "fc".
    others = {path: ranks[path] for path in sorted(ranks, key=len, reverse=True)}
    others = others if set(ranks.values()) != {r} else {}
    bias = getattr(config, "bias", "none")
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(ranks.keys() - set(parameters)),
        target_parameters=parameters or None,
        # PEFT adapts every module whose name ends in a target's, also those that we did not adapt.
        exclude_modules=namesakes(model, set(ranks)) or None,
        bias="lora_only" if bias.endswith("_only") else bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=getattr(config, "trainable_token_indices", None),
    )


def other_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return what the adapter saves besides its layers: modules trained in full, tokens, biases."""
    ours = tuple(
        f"{path}.{attribute}" if path else attribute
        for path, layer in _layers(model).items()
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names)
    )
    state = get_peft_model_state_dict(model, adapter_name=name)
    return {
        key if key.startswith(PREFIX) else f"{PREFIX}{key}": tensor
        for key, tensor in state.items()
        if not key.startswith(ours)
    }


def _layers(model: nn.Module) -> dict[str, Any]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "low_rank_factors")
    }


def namesakes(model: nn.Module, targets: set[str]) -> list[str]:
    """Return the modules outside `targets` whose name ends in a target's: PEFT would adapt them too."""
    names = {plain_name(name) for name, _ in model.named_modules()}
    return sorted(n for n in names - targets if any(n.endswith(f".{target}") for target in targets))


def adapter_named(model: nn.Module, name: str | None) -> str:
    """Return `name`, or for None the only adapter, or the active one of a `PeftModel`.

    Raises: ConfigError: if the model has no such adapter.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if name is None:
        name = next(iter(configs)) if len(configs) == 1 else getattr(model, "active_adapter", None)
    if not isinstance(name, str) or name not in configs:
        raise ConfigError(f"The model has no adapter {name!r}. {did_you_mean(str(name), configs)}")
    return name
