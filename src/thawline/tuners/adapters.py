"""Adapters inside a larger module: merged in place, saved as PEFT saves them, read back."""

from __future__ import annotations

__all__ = ["has_adapters", "load_adapter", "merge_adapters", "save_adapter"]

import copy
from pathlib import Path
from typing import TypeVar

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from thawline.errors import CheckpointError
from thawline.files import read_json
from thawline.recipe import TUNERS
from thawline.tuners.build import SAVED_TYPES, WEIGHTS, attach_tuner
from thawline.tuners.targets import modules_of

M = TypeVar("M", bound=nn.Module)
PREFIX = "base_model.model."
"""Prefix of the names of modules in an adapter's file, as PEFT writes them."""


def has_adapters(model: nn.Module) -> bool:
    """Return True if a layer of the model is adapted."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def merge_adapters(model: M) -> M:
    """Merge every adapter in a module and put plain layers in the place of adapted ones; return the module.

    Raises: ConfigError: a weight that cannot be written.
    """
    for name, module in list(modules_of(model)):
        if isinstance(module, peft.PeftModel):
            model.set_submodule(name, module.merge_and_unload())
    for name, layer in list(modules_of(model)):
        if isinstance(layer, BaseTunerLayer):
            model.set_submodule(name, _merged(layer))
    return model


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter in `model` to a folder that `PeftModel.from_pretrained` reads.

    Args:
        model: plain module into which `attach_tuner` has put one adapter.
    """
    ((name, config),) = model.peft_config.items()
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    tensors = {f"{PREFIX}{key}": tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(tensors, Path(folder) / WEIGHTS[0], metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def load_adapter(model: M, folder: str | Path) -> M:
    """Put the adapter that `save_adapter` wrote into `model`; return the module itself.

    Raises: CheckpointError: no adapter, damaged, or one that does not fit.
    """
    found = str(read_json(Path(folder) / "adapter_config.json").get("peft_type", "")).lower()
    method = {saved: ours for ours, saved in SAVED_TYPES.items() if ours != "dora"}.get(found, found)
    if method not in TUNERS:
        raise CheckpointError(f"'{folder}' holds no adapter that is known: its type is '{found}'.")
    try:
        attach_tuner(model, TUNERS[method](method=method, start_from=str(folder)), saved=True)
    except CheckpointError as error:
        raise CheckpointError(str(error).removeprefix("`tuner.start_from`: ")) from error
    return model


def _merged(layer: BaseTunerLayer) -> nn.Module:
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    layer.merge()
    return layer.get_base_layer()
