"""Attach a new domain to a detector: freeze all of it but an adapter and the layers that know its classes.

| part of the detector | in a domain's training |
|---|---|
| linear layers and convolutions | frozen, with the tuner's adapter |
| class heads of encoder and decoder, class embedding of denoising queries | trained, the domain's own |
| batch norms | frozen, in eval mode: their statistics stay bit for bit |
"""

from __future__ import annotations

__all__ = ["CLASS_LAYERS", "attach_domain", "is_class_layer", "keep_in_eval", "merged_detector"]

import copy
import dataclasses
from collections.abc import Sequence
from types import MethodType

from torch import nn

from thawline.errors import ConfigError, RoutingError
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.network.sta import AdaptedViT
from thawline.recipe import Adapter, Frozen, Mhr, Paca, PeftMethod, TunerSettings
from thawline.tuners.adapters import has_adapters, merge_adapters
from thawline.tuners.build import attach_tuner, routed_tasks
from thawline.tuners.mhr.conv import is_pointwise
from thawline.tuners.mhr.layer import linear_sizes

CLASS_LAYERS = ("enc_score_head", "dec_score_head", "denoising_class_embed")
"""Layers of the decoder with a row for each class: the part of a detector that is always a domain's own."""


def is_class_layer(name: str) -> bool:
    """Return whether a module or tensor of a detector belongs to the layers with a row for each class."""
    return any(part in CLASS_LAYERS for part in name.split("."))


def attach_domain(model: DEIMv2, settings: TunerSettings, tasks: Sequence[str] = ()) -> DEIMv2:
    """Make a domain of `model` trainable, in place; with several tasks, what their domains share.

    Args:
        settings: tuner section of a recipe: paca, lora, dora or mhr for an adapter, frozen for class heads
            alone. `target_modules: all-linear` means every linear layer and convolution but the class heads;
            grouped convolutions are left to PaCA, the only one that adapts them, and MHR takes those of 1 × 1
            alone.
        tasks: names of the domains, which MHR routes.
    Raises: ConfigError: a tuner that changes the base, or does not fit the detector. RoutingError: the
        adapter that MHR starts from does not know these tasks, or several where there is one.
    """
    if not isinstance(settings, Frozen):
        if isinstance(settings, PeftMethod) or not isinstance(settings, Adapter):
            raise ConfigError(
                f"`tuner: {settings.method}` cannot make a domain, which is an adapter beside a frozen base. "
                "Use paca, lora, dora or mhr, or frozen for class heads alone."
            )
        if settings.start_from is None and settings.target_modules == "all-linear":
            settings = dataclasses.replace(settings, target_modules=_adaptable(model, settings))
        attach_tuner(model, settings, tasks=tasks)
        known = routed_tasks(model)
        if known is not None and (unknown := [task for task in tasks if task not in known]):
            raise RoutingError(
                f"The adapter in '{settings.start_from}' routes {', '.join(known)}, and not "
                f"{', '.join(unknown)}. Adapt it to them: `tuner.adapt` z, mu or full."
            )
        if known is not None and len(known) > len(tasks) == 1:
            raise RoutingError(
                f"`tuner.start_from`: '{settings.start_from}' routes {', '.join(known)}, and a domain is one "
                "task. Adapt it to that: `tuner.adapt` z, mu or full."
            )
    else:
        model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if is_class_layer(name):
            parameter.requires_grad_(True)
    keep_statistics(model)
    return model


def freeze(model: DEIMv2) -> None:
    """Freeze a detector whole, statistics of its norms included."""
    model.requires_grad_(False)
    keep_statistics(model)


def keep_statistics(model: nn.Module) -> None:
    """Keep what has statistics, or draws random positions, in eval mode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, AdaptedViT)):
            keep_in_eval(module)


def keep_in_eval(module: nn.Module) -> None:
    """Keep a module in eval mode when `train()` is called on the model around it."""
    module.eval()

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return nn.Module.train(self, False)

    module.train = MethodType(train, module)


def merged_detector(model: DEIMv2) -> DEIMv2:
    """Return a copy on the CPU, in eval mode, with every adapter merged."""
    plain = merge_adapters(copy.deepcopy(model).cpu()) if has_adapters(model) else model
    fresh = DEIMv2(model.config)
    fresh.load_state_dict(plain.state_dict())
    return fresh.eval()


def _adaptable(model: nn.Module, settings: Adapter) -> list[str]:
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not is_class_layer(name) and _suits(layer, settings)
    ]
    if not names:
        raise ConfigError("No layer fits the adapter. Lower `tuner.r`, or `tuner.n_heads` of MHR.")
    return names


def _suits(layer: nn.Linear | nn.Conv2d, settings: Adapter) -> bool:
    if isinstance(settings, Paca):
        return _n_columns(layer) >= settings.r
    if isinstance(settings, Mhr):
        sizes = linear_sizes(layer)
        return (isinstance(layer, nn.Linear) or is_pointwise(layer)) and not any(
            size % settings.heads for size in sizes
        )
    return getattr(layer, "groups", 1) == 1


def _n_columns(layer: nn.Linear | nn.Conv2d) -> int:
    """Return the number of columns that PaCA can choose from: input features, or channels of a group."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    is_depthwise = layer.groups == layer.in_channels
    return layer.in_channels if is_depthwise else layer.in_channels // layer.groups
