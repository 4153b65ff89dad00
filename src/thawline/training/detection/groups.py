"""Parameter groups of a detector's optimiser: parameters that share a learning rate and a weight decay.

`published_groups` repeats the authors' groups, name pattern by name pattern. `clean_groups` is the default
for a user's own data: pretrained parameters train at the backbone's rate; one-dimensional parameters (norms,
biases, affine scales) and embeddings have no decay. Both give four groups in the same order, so that one
schedule serves both: backbone, backbone undecayed, others undecayed, others.
"""

from __future__ import annotations

__all__ = ["ParameterGroup", "build_groups", "clean_groups", "published_groups"]

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from thawline.errors import ConfigError
from thawline.recipe.resolved import GroupRule, TrainingSettings

_NAMES = ("backbone", "backbone, undecayed", "others, undecayed", "others")
_EMBEDDINGS = re.compile(r"(?:cls_token|mask_token|storage_tokens|class_embed\.weight)$")


@dataclass
class ParameterGroup:
    """Parameters with one learning rate and weight decay."""

    name: str
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def for_optimizer(self) -> dict[str, Any]:
        """Return the group in the form that `torch.optim` takes."""
        return {
            "params": list(self.parameters.values()),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "name": self.name,
        }

    def describe(self) -> dict[str, Any]:
        """Return the group in plain values."""
        return {
            "name": self.name,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "tensors": len(self.parameters),
            "parameters": sum(p.numel() for p in self.parameters.values()),
        }


def build_groups(
    model: nn.Module, settings: TrainingSettings, *, fast: Iterable[str] = ()
) -> list[ParameterGroup]:
    """Build the four groups of `model`'s trainable parameters; some may be empty.

    Args:
        model: a detector, bare or with a tuner in its backbone.
        settings: rates and decay; non-empty `group_rules` select the published groups.
        fast: names of backbone parameters that train at the full rate: those of a tuner.
    Raises: ConfigError: no parameter is trainable.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError("No parameter of the model trains: every one has requires_grad=False.")
    if settings.group_rules:
        return published_groups(trainable, settings.group_rules, settings)
    return clean_groups(trainable, settings, fast=fast)


def published_groups(
    trainable: dict[str, nn.Parameter], rules: Sequence[GroupRule], settings: TrainingSettings
) -> list[ParameterGroup]:
    """Build the authors' groups: each parameter belongs to the first rule that matches its name.

    Returns: one group per rule, then the group of what no rule matches.
    """
    groups = [
        ParameterGroup(
            name,
            settings.backbone_lr if rule.is_backbone else settings.lr,
            settings.weight_decay if rule.has_decay else 0.0,
        )
        for rule, name in zip(rules, _NAMES, strict=False)
    ]
    rest = ParameterGroup(_NAMES[-1], settings.lr, settings.weight_decay)
    patterns = [re.compile(rule.pattern) for rule in rules]
    for name, parameter in trainable.items():
        owners = (group for group, pattern in zip(groups, patterns, strict=True) if pattern.search(name))
        next(owners, rest).parameters[name] = parameter
    return [*groups, rest]


def clean_groups(
    trainable: dict[str, nn.Parameter], settings: TrainingSettings, *, fast: Iterable[str] = ()
) -> list[ParameterGroup]:
    """Build groups by kind of parameter. Arguments and order: see `build_groups`."""
    fast = set(fast)
    # In the ViT sizes' backbone only the ViT is pretrained; the convolutional adapter never is.
    has_vit = any(".dinov3." in name for name in trainable)
    groups = [
        ParameterGroup(name, lr, decay)
        for name, lr, decay in zip(
            _NAMES,
            (settings.backbone_lr, settings.backbone_lr, settings.lr, settings.lr),
            (settings.weight_decay, 0.0, 0.0, settings.weight_decay),
            strict=True,
        )
    ]
    for name, parameter in trainable.items():
        is_backbone = (".dinov3." in name if has_vit else "backbone." in name) and name not in fast
        is_decayed = parameter.ndim > 1 and not _EMBEDDINGS.search(name)
        index = (0 if is_decayed else 1) if is_backbone else (3 if is_decayed else 2)
        groups[index].parameters[name] = parameter
    return groups
