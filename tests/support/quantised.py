"""Layers with quantised weights: a stand-in of HQQ's; bitsandbytes', torchao's, HQQ's where installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class Hqq(nn.Module):
    """Stand-in of HQQ's layer: four bits in groups of 64 along the inputs, with a scale each."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        groups = linear.weight.detach().reshape(-1, 64)
        self.register_buffer("scale", groups.abs().amax(1, keepdim=True) / 7)
        self.register_buffer("W_q", (groups / self.scale).round().to(torch.int8))

    def dequantize(self) -> Tensor:
        return (self.W_q * self.scale).reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize(), self.bias)


def bnb_layer(linear: nn.Linear, kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    size = (linear.in_features, linear.out_features, True)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
    else:
        layer = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(
            linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False
        )
    layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return layer.to("cpu")


def torchao_layer(linear: nn.Linear) -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(holder := nn.Sequential(linear), Int8WeightOnlyConfig())
    return holder[0].requires_grad_(False)


def hqq_layer(linear: nn.Linear) -> nn.Module:
    pytest.importorskip("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    how = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear.requires_grad_(False), how, compute_dtype=torch.float32, device="cpu")
