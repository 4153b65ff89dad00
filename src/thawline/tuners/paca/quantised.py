"""Quantised layers whose weight can be read as floats: bitsandbytes (4 and 8 bits), torchao, HQQ."""

from __future__ import annotations

__all__ = ["dequantise", "dequantise_model", "is_dequantisable", "plain_linear"]

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn

BITSANDBYTES = ("Params4bit", "Int8Params")


def is_dequantisable(layer: nn.Module) -> bool:
    """Return whether a linear layer stores its weight quantised, and gives it back as floats."""
    if isinstance(layer, nn.Conv2d):
        return False
    weight = layer._parameters.get("weight")
    kind = type(weight)
    return hasattr(layer, "W_q") or kind.__name__ in BITSANDBYTES or kind.__module__.startswith("torchao.")


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


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen `nn.Linear` of these values in bfloat16."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)
    return layer


def dequantise_model(model: nn.Module) -> nn.Module:
    """Replace every quantised layer by a plain one in bfloat16, in place; transformers' config forgets it.

    A model without quantised layers is returned as it is.
    """
    for name, module in list(model.named_modules()):
        if is_dequantisable(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain_linear(dequantise(module), module.bias))
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    return model
