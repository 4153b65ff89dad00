"""`PacaModel`: finds the target layers and wraps them, as PEFT expects of a tuner."""

from __future__ import annotations

__all__ = ["PacaModel", "rank_of"]

from typing import Any

from torch import nn

from thawline.errors import ConfigError
from thawline.tuners._config import pattern_value
from thawline.tuners._tuner import Tuner
from thawline.tuners.paca.config import PACA, PacaConfig
from thawline.tuners.paca.layer import LAYERS, PacaLayer
from thawline.tuners.paca.selection import choose_columns
from thawline.tuners.paca.weights import check_weights


class PacaModel(Tuner):
    """Tuner that `get_peft_model(model, PacaConfig(...))` builds."""

    prefix = PACA.prefix
    tuner_layer_cls = PacaLayer

    @classmethod
    def check_targets(cls, config: Any, model: nn.Module, found: dict[str, nn.Module]) -> None:
        """Check that `found` are layers of a kind that has columns, in weights that can be written."""
        fresh = {name: module for name, module in found.items() if not isinstance(module, PacaLayer)}
        for name, module in fresh.items():
            if not isinstance(module, tuple(LAYERS)):
                kinds = ", ".join(kind.__name__ for kind in LAYERS)
                raise ConfigError(
                    f"'{name}' is a {type(module).__name__}; PaCA adapts {kinds}. Change target_modules, or "
                    "add it to exclude_modules."
                )
        check_weights(model, fresh)

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
        layer = next(make for kind, make in LAYERS.items() if isinstance(target, kind))(target, current_key)
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
