"""Quantised linear layers for the benches: bitsandbytes' where it is installed, else in plain torch.

The reference in torch stores NF4 (Dettmers et al., QLoRA, NeurIPS 2023) in blocks of 64 with a float32 scale
each, or int8 with a scale for each row, and dequantises the whole weight for each product. It says what is
kept and computed; its times say little about bitsandbytes'.
"""

from __future__ import annotations

__all__ = ["ReferenceLinear", "engine", "nf4_values", "quantise"]

import importlib.util

import torch
from torch import Tensor, nn

from thawline.ops.dequantised_linear import dequantised_linear

BLOCK = 64
OFFSET = 0.9677083
"""Quantile of the outermost values of NF4."""


def engine() -> str:
    """Return what quantises on this machine."""
    return "bitsandbytes" if importlib.util.find_spec("bitsandbytes") else "torch reference"


def quantise(model: nn.Module, kind: str, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Quantise the linear layers of a model in place.

    Args:
        kind: nf4 or int8.
        skip: names of layers to leave as they are.
    """
    make = _bitsandbytes if engine() == "bitsandbytes" else ReferenceLinear
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if type(module) is nn.Linear and child not in skip:
            setattr(model.get_submodule(parent), child, make(module, kind))
    setattr(model, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[kind], True)  # PEFT asks
    return model


def _bitsandbytes(linear: nn.Linear, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    weight, device = linear.weight.data, linear.weight.device
    layer: nn.Module
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to(device)


class ReferenceLinear(nn.Linear):
    """A linear layer that stores its weight quantised, read by PaCA and PEFT as HQQ's is."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        super().__init__(*sizes, device="meta")
        self.weight, self.bias = None, linear.bias
        weight = linear.weight.detach().float()
        if kind == "nf4":
            blocks = weight.reshape(-1, BLOCK)
            scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
            table = nf4_values().to(weight.device)
            middles = (table[1:] + table[:-1]) / 2
            codes = torch.bucketize(blocks / scale, middles).to(torch.uint8)
            stored = codes[:, ::2] << 4 | codes[:, 1::2]
        else:
            table = torch.empty(0)
            scale = weight.abs().amax(1, keepdim=True) / 127
            stored = (weight / scale).round().to(torch.int8)
        for name, tensor in (("W_q", stored), ("scale", scale), ("table", table)):
            self.register_buffer(name, tensor)
        self.compute_dtype = linear.weight.dtype

    def dequantize(self) -> Tensor:
        """Return the weight, (O, I)."""
        stored: Tensor = self.W_q
        if stored.dtype is torch.uint8:
            codes = torch.stack((stored >> 4, stored & 15), dim=2).flatten(1).int()
            blocks = self.table[codes] * self.scale
        else:
            blocks = stored * self.scale
        return blocks.reshape(self.out_features, self.in_features).to(self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the dequantised weight, of which nothing is kept for backward."""
        return dequantised_linear(input, self.bias, self.dequantize)


def nf4_values() -> Tensor:
    """Return the 16 values of NF4: quantiles of the normal distribution, and zero."""
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, torch.zeros(1, dtype=torch.float64), -below]).sort().values
    return (values / values.max()).float()
