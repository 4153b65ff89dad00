"""Which parameters share a rate and a weight decay.

`published_groups` repeats the authors' groups, name pattern by name pattern. `clean_groups` is the default
for a user's own data: whatever is pretrained at the backbone's rate; no decay for anything of one dimension
(norms, biases, affine scales) and for embeddings. Both give four groups in the same order, so that one
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
    """Parameters that train alike."""

    name: str
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def for_optimizer(self) -> dict[str, Any]:
        """The group as `torch.optim` takes it."""
        return {
            "params": list(self.parameters.values()),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "name": self.name,
        }


def build_groups(
    model: nn.Module, settings: TrainingSettings, *, fast: Iterable[str] = ()
) -> list[ParameterGroup]:
    """The four groups of `model`'s trainable parameters; some may be empty.

    Args:
        model: a detector, bare or with a tuner in its backbone.
        settings: rates, decay and, in its `group_rules`, whether the groups are the published ones.
        fast: names of parameters that train at the full rate although they sit in the backbone: a tuner's.
    Raises: ConfigError: nothing trains.
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
    """The authors' groups: each parameter goes to the first rule whose pattern its name matches, or to the
    last group.

    Returns: one group per rule, then that of the rest.
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
    """Groups by what a parameter is. Arguments and order as of `build_groups`."""
    fast = set(fast)
    # Of the ViT sizes' backbone only the ViT comes pretrained; the convolutional adapter beside it never
    # does.
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
