"""Tuners on a detector's backbone.

The encoder and decoder of a detector always train, since they have to learn the classes. A recipe's tuner
applies to the pretrained part of the backbone: the vision transformer of S to X (its convolutional adapter is
never pretrained), all of HGNetv2 in the smaller sizes.

| tuner | pretrained part of the backbone |
|---|---|
| none | trains at the backbone's rate |
| frozen | stays bit for bit: no gradient, no batch statistics, no random position scaling |
| lora, paca, … | gets the adapter, which trains at the full rate |
"""

from __future__ import annotations

__all__ = ["fast_parameters", "routing_group", "tune_backbone"]

import dataclasses

from torch import nn

from thawline.domains.attach import keep_in_eval
from thawline.errors import ConfigError
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.network.sta import AdaptedViT
from thawline.recipe import Adapter, Frozen, Full, Mhr, Paca, TunerSettings
from thawline.training.detection.groups import ParameterGroup
from thawline.tuners.build import attach_tuner
from thawline.tuners.mhr.layer import find_layers


def tune_backbone(model: DEIMv2, settings: TunerSettings) -> DEIMv2:
    """Apply a tuner to the backbone and make everything else trainable.

    Args:
        model: changed in place.
        settings: tuner section of a recipe. For an HGNetv2, which has no linear layers,
            `target_modules: all-linear` means all convolutions except the depthwise ones; PaCA also leaves
            out those with fewer input channels than `r` (the stem's), where it could only select all.
    Raises: ConfigError: the tuner does not fit the backbone.
    """
    model.requires_grad_(True)
    if isinstance(settings, Full):
        return model
    backbone = model.backbone
    pretrained = backbone.vit if isinstance(backbone, AdaptedViT) else backbone
    pretrained_ids = {id(p) for p in pretrained.parameters()}
    unpretrained = [p for p in backbone.parameters() if id(p) not in pretrained_ids]
    if isinstance(settings, Frozen):
        pretrained.requires_grad_(False)
        keep_in_eval(pretrained)
        return model
    if isinstance(settings, Adapter) and settings.target_modules == "all-linear" and pretrained is backbone:
        settings = dataclasses.replace(settings, target_modules=_convolutions(backbone, settings))
    model.backbone = attach_tuner(backbone, settings)
    for parameter in unpretrained:
        parameter.requires_grad_(True)
    return model


def fast_parameters(model: nn.Module, settings: TunerSettings) -> list[str]:
    """Return the names of the backbone parameters that train at the full rate: those an adapter added."""
    if isinstance(settings, (Full, Frozen)):
        return []
    return [name for name, p in model.named_parameters() if p.requires_grad and "backbone." in name]


def routing_group(model: nn.Module, settings: TunerSettings) -> ParameterGroup | None:
    """Return the group of MHR's routing tables, with their own rate and decay; None: nothing is routed."""
    if not isinstance(settings, Mhr):
        return None
    routers = [router for _, layer in find_layers(model) for router in layer.routers.values()]
    tables = {parameter for router in routers for parameter in router.parameters()}
    found = {name: p for name, p in model.named_parameters() if p in tables and p.requires_grad}
    return ParameterGroup("routing", settings.routing_lr, settings.routing_weight_decay, found)


def _convolutions(backbone: nn.Module, settings: Adapter) -> list[str]:
    fewest = settings.r if isinstance(settings, Paca) else 1
    names = [
        name
        for name, layer in backbone.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels >= fewest
    ]
    if not names:
        raise ConfigError(
            f"`tuner.r={fewest}`: no convolution of the backbone has that many input channels. Lower `r`."
        )
    return names
