"""`PacaModel`: finds the target layers and wraps them, as PEFT expects of a tuner."""

from __future__ import annotations

__all__ = ["PacaModel", "target_names"]

import copy
from collections import defaultdict
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from thawline.errors import ConfigError
from thawline.tuners._config import pattern_value
from thawline.tuners.paca.config import PACA, PacaConfig
from thawline.tuners.paca.layer import LAYERS, PacaLayer
from thawline.tuners.paca.selection import choose_columns


class PacaModel(BaseTuner):
    """Tuner that `get_peft_model(model, PacaConfig(...))` builds."""

    prefix = PACA.prefix
    tuner_layer_cls = PacaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: PacaConfig, model_config: dict[str, Any]) -> PacaConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(model_config)
        return peft_config

    def _prepare_model(self, peft_config: PacaConfig, model: nn.Module) -> None:
        self._owners = weight_owners(model)

    def _create_and_replace(
        self,
        peft_config: PacaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PacaLayer):
            add_adapter(target, adapter_name, peft_config, current_key)
            return
        kind = check_target(target, parent, current_key, self._owners)
        layer = LAYERS[kind](target, current_key)
        layer._active_adapter = [adapter_name]
        add_adapter(layer, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def add_adapter(layer: PacaLayer, adapter_name: str, config: PacaConfig, name: str) -> None:
    """Choose columns as `config` says for the layer called `name`, and add the adapter."""
    r = rank_of(config, name)
    alpha = pattern_value(config.alpha_pattern, name, config.alpha)
    columns = layer.columns_of(layer.base_layer.weight)
    index = choose_columns(columns, r, name, config.selection, config.seed, indices_of(config, name))
    scale = 1.0 if alpha is None else alpha / r
    layer.update_layer(adapter_name, index, scale, config.init_weights, config.inference_mode)


def rank_of(config: PacaConfig, name: str) -> int:
    """Return r of the layer called `name`."""
    return pattern_value(config.rank_pattern, name, config.r)


def indices_of(config: PacaConfig, name: str) -> list[int] | None:
    """Return the explicit columns of the layer called `name`, or None if the selection chooses.

    Raises: ConfigError: if there are indices, but none for this layer.
    """
    columns = pattern_value(config.indices, name, None)
    if columns is None and config.indices is not None:
        raise ConfigError(
            f"`indices` has no columns for '{name}', which target_modules matches. Add them, or exclude the "
            "module."
        )
    return columns


def target_names(model: nn.Module, config: PacaConfig) -> list[str]:
    """Return the names of the modules of an unwrapped `model` that `config` would adapt."""
    config = copy.deepcopy(config)
    if config.target_modules is None:
        config.target_modules = default_targets(BaseTuner.get_model_config(model))
    config = _maybe_include_all_linear_layers(config, model)
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]


def default_targets(model_config: dict[str, Any]) -> set[str] | str:
    """Return PEFT's choice for LoRA on this architecture.

    Raises: ConfigError: if PEFT has none.
    """
    model_type = model_config.get("model_type")
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if targets is None:
        raise ConfigError(
            f"target_modules=None, and PEFT has no default for model type {model_type!r}. "
            "Set target_modules='all-linear' or a list of module names."
        )
    return targets if isinstance(targets, str) else set(targets)


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Map the id of each parameter to the names of all modules that own it."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    return owners


def check_target(
    target: nn.Module, parent: nn.Module, name: str, owners: dict[int, list[str]]
) -> type[nn.Module]:
    """Return the key of LAYERS for `target`.

    Raises: ConfigError: if it cannot be adapted, saying why and what to do.
    """
    if isinstance(target, BaseTunerLayer):
        raise ConfigError(
            f"'{name}' already has an adapter of another method ({type(target).__name__}). Unload it first."
        )
    kind = next((kind for kind in LAYERS if isinstance(target, kind)), None)
    if kind is None:
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise ConfigError(
            f"'{name}' is a {type(target).__name__}; PaCA adapts {kinds}. Change target_modules, or add it "
            "to exclude_modules."
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ConfigError(
            f"'{name}' belongs to nn.MultiheadAttention, which uses the weight without calling the layer, so "
            "it would never learn. Add it to exclude_modules."
        )
    others = [other for other in owners[id(target.weight)] if other != name]
    if others:
        raise ConfigError(
            f"The weight of '{name}' is tied to {others}: writing its columns would change those too. Add it "
            "to exclude_modules, or untie the weights (tie_word_embeddings=False)."
        )
    return kind
