"""A tuner on a detector's backbone, and the plain detector that comes out of it.

A detector's encoder and decoder always train: they have to learn the classes. What a recipe's tuner says is
about the pretrained part of the backbone: the vision transformer of S to X (the convolutions beside it never
come pretrained), all of HGNetv2 in the smaller sizes.

| tuner | the pretrained part |
|---|---|
| none | trains, at the backbone's rate |
| frozen | stays bit for bit: no gradient, no batch statistics, no random position scaling |
| lora, paca, … | gets the adapter, which trains at the full rate |
"""

from __future__ import annotations

__all__ = ["fast_parameters", "merged_detector", "tune_backbone"]

import copy
import dataclasses
from types import MethodType

from torch import nn

from thawline.errors import ConfigError
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.network.sta import AdaptedViT
from thawline.recipe import Adapter, Frozen, Full, Paca, TunerSettings
from thawline.tuners.build import attach_tuner


def tune_backbone(model: DEIMv2, settings: TunerSettings) -> DEIMv2:
    """Make of the backbone what the tuner says; everything else trains.

    Args:
        model: changed in place.
        settings: a tuner's section of a recipe. `target_modules: all-linear` means all convolutions of an
            HGNetv2, which has no linear layers, but the depthwise ones; for PaCA also without those of fewer
            input channels than `r` (the stem's), where all that there is to select is the whole layer.
    Raises: ConfigError: the tuner does not fit the backbone.
    """
    model.requires_grad_(True)
    if isinstance(settings, Full):
        return model
    backbone = model.backbone
    pretrained = backbone.vit if isinstance(backbone, AdaptedViT) else backbone
    beside = [p for p in backbone.parameters() if id(p) not in {id(q) for q in pretrained.parameters()}]
    if isinstance(settings, Frozen):
        pretrained.requires_grad_(False)
        _hold_still(pretrained)
        return model
    if isinstance(settings, Adapter) and settings.target_modules == "all-linear" and pretrained is backbone:
        settings = dataclasses.replace(settings, target_modules=_convolutions(backbone, settings))
    model.backbone = attach_tuner(backbone, settings)
    for parameter in beside:
        parameter.requires_grad_(True)
    return model


def fast_parameters(model: DEIMv2, settings: TunerSettings) -> list[str]:
    """Names of the backbone's parameters that train at the full rate: those an adapter added."""
    if isinstance(settings, (Full, Frozen)):
        return []
    return [f"backbone.{name}" for name, p in model.backbone.named_parameters() if p.requires_grad]


def merged_detector(model: DEIMv2) -> DEIMv2:
    """A copy on the CPU with any adapter merged into its backbone: plain weights, in eval mode."""
    plain = copy.deepcopy(model).cpu()
    if hasattr(plain.backbone, "merge_and_unload"):
        plain.backbone = plain.backbone.merge_and_unload()
    fresh = DEIMv2(model.config)
    fresh.load_state_dict(plain.state_dict())
    return fresh.eval()


def _hold_still(module: nn.Module) -> None:
    """Keep a module in eval mode whatever its owner's `train()` says."""
    module.eval()

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return nn.Module.train(self, False)

    module.train = MethodType(train, module)


def _convolutions(backbone: nn.Module, settings: Adapter) -> list[str]:
    fewest = settings.r if isinstance(settings, Paca) else 1
    names = [
        name
        for name, layer in backbone.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels >= fewest
    ]
    if not names:
        raise ConfigError(
            f"`tuner.r={fewest}`: no convolution of the backbone has as many input channels. Use a smaller r."
        )
    return names
