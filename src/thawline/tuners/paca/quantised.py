"""Quantised layers whose weight can be read as floats, and merges into them.

bitsandbytes (4 and 8 bits), torchao and HQQ are read; bitsandbytes alone is written.
"""

from __future__ import annotations

__all__ = [
    "BITSANDBYTES",
    "check_rewritable",
    "dequantise",
    "dequantise_model",
    "is_dequantisable",
    "is_quantised",
    "merge_and_dequantise",
    "plain_linear",
    "quantise_again",
]

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn

from thawline.errors import ConfigError

BITSANDBYTES = ("Params4bit", "Int8Params")


def is_dequantisable(layer: nn.Module) -> bool:
    """Return whether a linear layer stores its weight quantised, and gives it back as floats."""
    if isinstance(layer, nn.Conv2d):
        return False
    weight = layer._parameters.get("weight")
    kind = type(weight)
    is_hqq = hasattr(layer, "W_q") and callable(getattr(layer, "dequantize", None))
    return is_hqq or kind.__name__ in BITSANDBYTES or kind.__module__.startswith("torchao.")


def dequantise(layer: nn.Module) -> Tensor:
    """Return a layer's weight, (O, I), as a tensor of floats that may be written."""
    stored = layer._parameters.get("weight")
    kind = type(stored).__name__
    if kind == "Int8Params":
        return _eight_bits(layer)
    with torch.no_grad():
        is_nf4 = kind == "Params4bit"
        weight = (dequantize_bnb_weight(stored) if is_nf4 else dequantize_module_weight(layer)).detach()
    return weight.reshape(layer.out_features, layer.in_features)


def _eight_bits(layer: nn.Module) -> Tensor:
    """Return the weight of bitsandbytes' training forward, to the last bit; PEFT's differs."""
    state, weight = layer.state, layer.weight
    scale = weight.SCB if state.SCB is None else state.SCB
    stored = weight.data if state.CB is None else state.CB
    return stored.float().mul_(scale.to(stored.device).unsqueeze(1) * (1 / 127))


def check_rewritable(layer: nn.Module, name: str) -> None:
    """Check that `quantise_again` knows a layer. Raises: ConfigError: naming it."""
    if type(layer._parameters.get("weight")).__name__ not in BITSANDBYTES:
        raise ConfigError(
            f"'{name}' is a {type(layer).__name__}: only layers of bitsandbytes are quantised again. "
            "merge_and_unload writes bfloat16 layers."
        )


def quantise_again(layer: Any, weight: Tensor) -> None:
    """Make `weight`, (O, I) floats, the weight of a layer of bitsandbytes: quantised as its own was."""
    stored = layer.weight
    kind = type(stored).__name__
    weight = weight.detach().to(stored.quant_state.dtype if kind == "Params4bit" else torch.float16)
    if kind == "Params4bit":
        how = {key: getattr(stored, key) for key in ("blocksize", "compress_statistics", "quant_type")}
        how["quant_storage"] = stored.quant_storage
        layer.weight = type(stored)(weight.cpu(), requires_grad=False, **how).to(stored.device)
        layer.quant_state = layer.weight.quant_state
    else:
        layer.weight = type(stored)(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(
            stored.device
        )
        layer.state.CB = layer.state.SCB = None


def merge_and_dequantise(model: Any) -> nn.Module:
    """Merge the active adapters of a `PeftModel`; return a plain model, in bfloat16 if it was quantised.

    PEFT's own merge of LoRA into quantised layers quantises them again, the neighbours of what changed too.

    Raises: ConfigError: for an adapter whose change of a weight is not a sum (DoRA).
    """
    if not is_quantised(model):
        return model.merge_and_unload()
    merged = {}
    for name, layer in model.get_base_model().named_modules():
        is_pefts = isinstance(layer, BaseTunerLayer) and type(layer).__module__.startswith("peft.")
        if not (is_pefts and is_dequantisable(layer.base_layer) and hasattr(layer, "get_delta_weight")):
            continue
        names = [adapter for adapter in layer.active_adapters if adapter in layer._get_available_adapters()]
        if any(adapter in getattr(layer, "lora_variant", {}) for adapter in names):
            raise ConfigError(
                f"'{name}' is quantised, and its adapter a variant of LoRA (DoRA, …), which PEFT merges: "
                "model.merge_and_unload() quantises again. Or export format='lora'."
            )
        weight = dequantise(layer.base_layer).float()
        merged[name] = plain_linear(sum(map(layer.get_delta_weight, names), weight), layer.base_layer.bias)
    for name, plain in merged.items():
        model.get_base_model().set_submodule(name, plain)
    return dequantise_model(model.merge_and_unload())


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen `nn.Linear` of these values in bfloat16."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)
    return layer


def is_quantised(model: nn.Module) -> bool:
    """Return whether a model has a quantised layer."""
    return any(map(is_dequantisable, model.modules()))


def dequantise_model(model: nn.Module) -> nn.Module:
    """Replace every quantised layer by a plain one and cast all parameters to bfloat16, in place.

    Buffers stay: rotary frequencies lose too much. transformers' config forgets the quantisation.
    """
    for name, module in list(model.named_modules()):
        if is_dequantisable(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain_linear(dequantise(module), module.bias))
    for parameter in model.parameters():  # of one type, or the model could not run
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    return model
