"""Detectors of several datasets that share everything but the layers with a row for each class."""

from __future__ import annotations

__all__ = ["Detectors"]

from collections.abc import Sequence

from torch import nn

from thawline.domains.attach import is_class_layer
from thawline.models.deimv2.config import DEIMv2Config
from thawline.models.deimv2.model import DEIMv2
from thawline.tuners.mhr.task_ids import set_task_ids

FORWARD_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_always_called",
)
TUNER_STATE = ("peft_config", "mhr_state")
"""Attributes that a tuner sets on the module that it adapts."""


class Detectors(nn.Module):
    """A detector for each of several datasets.

    Args:
        names: of the datasets, by which an MHR inside routes.
        members: a detector for each, with its classes.
    """

    def __init__(self, names: Sequence[str], members: Sequence[DEIMv2]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.members = nn.ModuleList(members)

    @property
    def config(self) -> DEIMv2Config:
        """Config of the first, of which only the classes differ from the others'."""
        return self.members[0].config

    def member(self, number: int) -> DEIMv2:
        """Return the detector of a dataset, with MHR set to route by it."""
        member: DEIMv2 = self.members[number]
        if hasattr(member, "mhr_state"):
            set_task_ids(member, self.names[number])
        return member

    def share(self) -> Detectors:
        """Make the others use the first one's layers, adapters included, in place of their own.

        Only the layers with a row for each class stay their own.
        """
        first, *others = self.members
        for other in others:
            other.backbone, other.encoder = first.backbone, first.encoder
            for name, module in first.decoder.named_children():
                if not is_class_layer(name):
                    setattr(other.decoder, name, module)
                else:
                    trains = next(module.parameters()).requires_grad
                    getattr(other.decoder, name).requires_grad_(trains)
            for name in FORWARD_HOOKS:
                setattr(other, name, getattr(first, name))
            for name in TUNER_STATE:
                if hasattr(first, name):
                    setattr(other, name, getattr(first, name))
        return self
