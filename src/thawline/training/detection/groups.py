"""Parameter groups of a detector's optimiser: parameters that share a learning rate and a weight decay.

There are always four, so that one schedule serves all: backbone, backbone undecayed, others undecayed,
others; with MHR, its routing is a fifth. Published runs assign parameters by the authors' name patterns.
Otherwise, for a user's own data, pretrained parameters train at the backbone's rate, and one-dimensional
parameters (norms, biases, affine scales) and embeddings have no decay.
"""

from __future__ import annotations

__all__ = ["ParameterGroup", "build_groups"]

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from thawline.errors import ConfigError
from thawline.recipe.resolved import TrainingSettings

_BACKBONE, _BACKBONE_UNDECAYED, _OTHERS_UNDECAYED, _OTHERS = range(4)
_EMBEDDINGS = re.compile(r"(?:cls_token|mask_token|storage_tokens|class_embed\.weight(?:_\d+)?)$")


@dataclass
class ParameterGroup:
    """Parameters with one learning rate and weight decay."""

    name: str
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def for_optimizer(self) -> dict[str, Any]:
        """Return the group in the form that `torch.optim` takes."""
        return {"params": list(self.parameters.values()), **self._settings()}

    def describe(self) -> dict[str, Any]:
        """Return the group in plain values."""
        n_parameters = sum(p.numel() for p in self.parameters.values())
        return {**self._settings(), "tensors": len(self.parameters), "parameters": n_parameters}

    def _settings(self) -> dict[str, Any]:
        return {"name": self.name, "lr": self.lr, "weight_decay": self.weight_decay}


def build_groups(
    model: nn.Module,
    settings: TrainingSettings,
    *,
    fast: Iterable[str] = (),
    routing: ParameterGroup | None = None,
) -> list[ParameterGroup]:
    """Build the four groups of `model`'s trainable parameters; some may be empty.

    Args:
        model: a detector, bare or with a tuner in its backbone.
        settings: rates and decay; non-empty `group_patterns` select the published groups.
        fast: names of backbone parameters that train at the full rate: those of a tuner.
        routing: a fifth group, of MHR's routing tables, whose parameters are in none of the others.
    Raises: ConfigError: no parameter is trainable.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError("No parameter of the model trains: every one has requires_grad=False.")
    for name in () if routing is None else routing.parameters:
        del trainable[name]
    lr, backbone_lr, decay = settings.lr, settings.backbone_lr, settings.weight_decay
    groups = [
        ParameterGroup("backbone", backbone_lr, decay),
        ParameterGroup("backbone, undecayed", backbone_lr, 0.0),
        ParameterGroup("others, undecayed", lr, 0.0),
        ParameterGroup("others", lr, decay),
    ]
    patterns, fast = [re.compile(pattern) for pattern in settings.group_patterns], set(fast)
    # In the ViT sizes' backbone only the ViT is pretrained; the convolutional adapter never is.
    pretrained = ".dinov3." if any(".dinov3." in name for name in trainable) else "backbone."
    for name, parameter in trainable.items():
        if patterns:
            index = next((i for i, pattern in enumerate(patterns) if pattern.search(name)), _OTHERS)
        else:
            is_decayed = parameter.ndim > 1 and not _EMBEDDINGS.search(name)
            if pretrained in name and name not in fast:
                index = _BACKBONE if is_decayed else _BACKBONE_UNDECAYED
            else:
                index = _OTHERS if is_decayed else _OTHERS_UNDECAYED
        groups[index].parameters[name] = parameter
    return groups if routing is None else [*groups, routing]
