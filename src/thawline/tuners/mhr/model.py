"""`MHRModel`: the PEFT tuner that puts MHR around a model's linears and 1 × 1 convolutions."""

from __future__ import annotations

__all__ = ["MHRModel", "divisors"]

import math
from typing import Any

from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from thawline.errors import ConfigError
from thawline.tuners._config import pattern_value
from thawline.tuners._tuner import Tuner, check_in_memory
from thawline.tuners.mhr.config import MHR, MHRConfig
from thawline.tuners.mhr.conv import MHRConv2d, is_pointwise
from thawline.tuners.mhr.layer import MHRLinear, linear_sizes
from thawline.tuners.mhr.routing import ROUTERS, Router
from thawline.tuners.mhr.state import RoutingState
from thawline.tuners.mhr.task_ids import follow_forwards, stop_following


class MHRModel(Tuner):
    """The tuner that `get_peft_model(model, MHRConfig(...))` makes."""

    prefix = MHR.prefix
    tuner_layer_cls = MHRLinear

    def _prepare_model(self, peft_config: MHRConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        follow_forwards(model).configs = self.peft_config

    @classmethod
    def check_targets(cls, config: Any, model: nn.Module, found: dict[str, nn.Module]) -> None:
        """Check that `found` are linear layers or 1 × 1 convolutions whose sizes the heads divide."""
        check_in_memory(model, found)
        targets = {
            name: module.get_base_layer() if isinstance(module, MHRLinear) else module
            for name, module in found.items()
        }
        for name, module in targets.items():
            is_linear = isinstance(module, nn.Linear | Conv1D) or hasattr(module, "in_features")
            if not (is_linear or is_pointwise(module)):
                raise ConfigError(
                    f"'{name}' is a {_kind(module)}; MHR adapts linear layers and 1 × 1 convolutions without"
                    " groups or padding. Narrow target_modules, or add it to exclude_modules."
                )
        shared = math.gcd(*(size for module in targets.values() for size in linear_sizes(module)))
        for name, module in targets.items():
            n_heads = heads_of(config, name)
            for size, what in zip(linear_sizes(module), ("in_features", "out_features"), strict=True):
                if size % n_heads:
                    raise ConfigError(
                        f"n_heads={n_heads} does not divide {what}={size} of '{name}'. All adapted modules"
                        f" can be split into {', '.join(map(str, divisors(shared)))} heads; use one of these,"
                        " give the module its own number with heads_pattern, or exclude it."
                    )

    def _create_and_replace(
        self,
        peft_config: MHRConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        state: RoutingState = self.model.mhr_state
        layer = target
        if not isinstance(target, MHRLinear):
            layer = (MHRConv2d if is_pointwise(target) else MHRLinear)(target, current_key, state)
        layer.quantization_backend = self._quantization_backend(layer.get_base_layer())
        key = adapter_name, part_of(peft_config.granularity, current_key)
        owns_router = key not in state.tables
        if owns_router:
            state.tables[key] = build_router(peft_config, heads_of(peft_config, current_key))
        r = pattern_value(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = pattern_value(peft_config.alpha_pattern, current_key, peft_config.alpha or r)
        if layer is not target:
            layer._active_adapter = [adapter_name]
            state.layers.append(layer)
        layer.update_layer(adapter_name, peft_config, state.tables[key], owns_router, r, alpha)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _quantization_backend(self, base: nn.Module) -> QuantizationBackend | None:
        """Return PEFT's reader and writer of a quantised weight; `None` for any other weight."""
        try:
            return resolve_quantization_backend(base, **get_quantization_kwargs(self))
        except ValueError:  # torchao used directly: how to quantise a merged weight again is unknown
            return ForwardOnlyQuantizationBackend("torchao")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        stop_following(model)
        return model


def _kind(module: nn.Module) -> str:
    """Return the class of a module; of a convolution also what sets it apart from a 1 × 1 one."""
    if not isinstance(module, nn.Conv2d):
        return type(module).__name__
    size = " × ".join(map(str, module.kernel_size))
    return f"{type(module).__name__} of {size}, groups={module.groups}, padding={module.padding}"


def heads_of(config: MHRConfig, name: str) -> int:
    """Return n_heads of the module called `name`."""
    return pattern_value(config.heads_pattern, name, config.n_heads)


def divisors(n: int) -> list[int]:
    """Return the divisors of n in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def part_of(granularity: str, name: str) -> str:
    """Return the part of the model whose modules share a routing table with the module called `name`."""
    parts = name.split(".")
    if granularity == "linear":
        return name
    if granularity == "layer":
        return ".".join(parts[:-1])
    if granularity == "block":
        number = next((position for position, part in enumerate(parts) if part.isdigit()), len(parts))
        return ".".join(parts[: number + 1])
    return next((part for part in parts if granularity == "coder" and part in ("encoder", "decoder")), "")


def build_router(config: MHRConfig, n_heads: int) -> Router:
    """Build a routing table with fresh rows."""
    router = ROUTERS[config.router](config.n_tasks or 1, n_heads, config.n_skills, config.routing_init)
    router.temperature, router.uniform_mix = config.temperature, config.uniform_mix
    return router
