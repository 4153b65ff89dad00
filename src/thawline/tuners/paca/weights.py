"""Weights that PaCA may write columns into: of plain floats, of one layer alone."""

from __future__ import annotations

__all__ = ["find_obstacles", "warn_of_twins"]

import gc
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from thawline.errors import ConfigError
from thawline.tuners._steps import watched
from thawline.tuners.paca.quantised import is_dequantisable
from thawline.tuners.paca.resident import is_sharded

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALF)


def find_obstacles(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return why columns must not be written into the weights of some of `layers`, a sentence for each.

    Args:
        layers: by name in `model`.
    Raises: ConfigError: for a weight that nothing can be added to either: sharded already, of a plain layer
        that cannot run, or holding the columns of another model.
    """
    # A module that two parents share inside one of their parts has one place, where its adapter will be.
    owners: dict[int, list[str]] = defaultdict(list)
    places = [
        (f"{name}.{child}", module)
        for name, p in model.named_modules()
        for child, module in p._modules.items()
    ]
    for name, module in [("", model), *places]:
        for parameter in () if module is None else module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name.removeprefix("."))
    is_partial = not all(parameter.is_meta for parameter in model.parameters())
    holders = {layer.base_layer.weight.data_ptr(): layer for layer in watched() if layer.holds_columns}
    found = {}
    partitioner = _partitioner()
    for name, layer in layers.items():
        if is_dequantisable(layer):
            continue
        weight = layer._parameters.get("weight")
        if weight is None:
            found[name] = f"It is a {type(layer).__name__}, which has no weight to write into."
            continue
        _check_runs(name, layer, weight, holders)
        others = [other for other in owners[id(weight)] if other != name]
        if others:
            found[name] = f"Its weight is tied to {others}: writing its columns would change those too."
        elif hasattr(weight, "ds_id"):
            found[name] = "DeepSpeed has partitioned its weight."
        elif partitioner is not None:
            found[name] = f"{partitioner} will partition its weight."
        elif weight.is_meta and (is_partial or hasattr(layer, "_hf_hook")):
            found[name] = "It is offloaded (meta device)."
        elif weight.dtype not in FLOATS or type(weight) is not nn.Parameter:
            found[name] = (
                f"Its weight is {type(weight).__name__} of {weight.dtype}: quantised weights have no "
                "columns to write."
            )
    return found


def _partitioner() -> str | None:
    """Return what `accelerate launch` will partition weights with, if columns cannot be written then."""

    def asks(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("true", "1")

    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if is_deepspeed_zero3_enabled() or (asks("ACCELERATE_USE_DEEPSPEED") and stage == "3"):
        return "DeepSpeed (ZeRO-3)"
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")  # given in Python, it sets no version
    version = str(getattr(plugin, "fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    return "FSDP1" if asks("ACCELERATE_USE_FSDP") and version == "1" else None


def warn_of_twins(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Warn of live modules and tensors outside `model` that hold weights of `layers`: they change along."""
    if twins := _twins(model, layers):
        logger.warning(
            "The weights of %d layers ('%s', …) are also held outside the model (%s), and will change there "
            "too: PaCA writes columns in place. To keep them, set mode='additive', clone a state_dict, or "
            "adapt a copy: copy.deepcopy(model).",
            len(twins), next(iter(twins)), ", ".join(sorted(set(twins.values()))),
        )  # fmt: skip


def _check_runs(name: str, layer: nn.Module, weight: nn.Parameter, holders: Mapping[int, Any]) -> None:
    if is_sharded(weight):
        raise ConfigError(
            f"The weight of '{name}' is sharded already. Call get_peft_model first, then shard the model."
        )
    is_plain = type(layer) in (nn.Linear, nn.Conv2d, Conv1D)
    if is_plain and type(weight) is nn.Parameter and weight.dtype not in FLOATS:
        raise ConfigError(
            f"The weight of '{name}' is {type(weight).__name__} of {weight.dtype}: quantised, in a "
            f"{type(layer).__name__} that cannot compute with it. Load the base in float32, bfloat16 or "
            "float16, or exclude the module."
        )
    other = None if weight.is_meta else holders.get(weight.data_ptr())
    if other is not None:
        raise ConfigError(
            f"The weight of '{name}' already holds the columns of another PaCA layer ('{other.name}'). "
            "Unload that model first (model.unload()), adapt both with mode='additive', or give each its own "
            "copy of the base."
        )


def _twins(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the names of `layers` whose weight is held outside `model`, and the class of what holds it."""
    alone = _references(nn.Linear(1, 1))
    names = {
        layer.weight.data_ptr(): name
        for name, layer in layers.items()
        if not layer.weight.is_meta and any(map(int.__gt__, _references(layer), alone))
    }
    inside = set(map(id, model.modules()))
    return {
        names[weight.data_ptr()]: type(holder).__name__
        for holder in (gc.get_objects() if names else ())  # a tenth of a second: only where there is a reason
        if id(holder) not in inside
        for weight in _weights(holder)
        if type(weight) in (nn.Parameter, Tensor)
        and weight.layout is torch.strided  # others, packed or sparse, have no address
        and weight.data_ptr() in names
    }


def _weights(holder: object) -> Collection[Any]:
    """Return the weights that an object holds: those of a module, or a tensor itself."""
    if type(holder) is Tensor:
        return (holder,)
    return holder.__dict__.get("_parameters", {}).values() if issubclass(type(holder), nn.Module) else ()


def _references(layer: nn.Module) -> tuple[int, int]:
    """Return the number of references to a layer's weight, and to the memory under it."""
    count = getattr(torch._C, "_storage_Use_Count", lambda storage: 0)
    return sys.getrefcount(layer._parameters["weight"]), count(layer.weight.untyped_storage()._cdata)
