"""Weights that PaCA may write columns into: of plain floats, of one layer alone."""

from __future__ import annotations

__all__ = ["check_weights"]

import gc
import logging
import sys
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from thawline.errors import ConfigError
from thawline.tuners._steps import watched
from thawline.tuners.paca.resident import is_sharded

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALF)


def check_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Check that columns can be written into the weights of `layers` without changing other layers.

    A module outside `model` that holds one of the weights is only warned of: it may be meant to change too.

    Args:
        layers: by name in `model`.
    Raises: ConfigError: for a weight that is quantised, sharded, tied, or another model's.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    for name, layer in layers.items():
        others = [other for other in owners[id(layer.weight)] if other != name]
        if others:
            raise ConfigError(
                f"The weight of '{name}' is tied to {others}: writing its columns would change those too. "
                "Add it to exclude_modules, or untie the weights (tie_word_embeddings=False)."
            )
        _check_weight(name, layer)
    if twins := _twins(model, layers):
        logger.warning(
            "The weights of %d layers ('%s', …) are also those of modules outside the model (%s), which will "
            "change along: PaCA writes columns in place. To keep them, adapt a copy: copy.deepcopy(model).",
            len(twins), next(iter(twins)), ", ".join(sorted(set(twins.values()))),
        )  # fmt: skip


def _check_weight(name: str, layer: nn.Module) -> None:
    weight = layer.weight
    if is_sharded(weight) or hasattr(weight, "ds_id"):
        raise ConfigError(
            f"The weight of '{name}' is sharded already. Call get_peft_model first, then shard the model."
        )
    if weight.dtype not in FLOATS or type(weight) is not nn.Parameter:
        raise ConfigError(
            f"The weight of '{name}' is {type(weight).__name__} of {weight.dtype}: quantised weights have no "
            "columns to write. Load the base in float32, bfloat16 or float16, or exclude the module."
        )
    for other in watched():
        theirs = other.base_layer.weight
        if not other._state.released and not weight.is_meta and theirs.data_ptr() == weight.data_ptr():
            raise ConfigError(
                f"The weight of '{name}' already holds the columns of another PaCA layer ('{other.name}'). "
                "Unload that model first (model.unload()), or give each its own copy of the base."
            )


def _twins(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the names of `layers` whose weight a live module outside `model` holds, and its class."""
    alone = _references(nn.Linear(1, 1))
    names = {
        layer.weight.data_ptr(): name
        for name, layer in layers.items()
        if not layer.weight.is_meta and any(map(int.__gt__, _references(layer), alone))
    }
    inside = set(map(id, model.modules()))
    return {
        names[parameter.data_ptr()]: type(module).__name__
        for module in (gc.get_objects() if names else ())  # a tenth of a second: only where there is a reason
        if issubclass(type(module), nn.Module) and id(module) not in inside
        for parameter in module.__dict__.get("_parameters", {}).values()
        if type(parameter) is nn.Parameter and parameter.data_ptr() in names
    }


def _references(layer: nn.Module) -> tuple[int, int]:
    """Return the number of references to a layer's weight, and to the memory under it."""
    count = getattr(torch._C, "_storage_Use_Count", lambda storage: 0)
    return sys.getrefcount(layer._parameters["weight"]), count(layer.weight.untyped_storage()._cdata)
