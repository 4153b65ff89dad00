"""Classes added to a trained domain, whose old ones do not move.

| part of the domain | when classes are added |
|---|---|
| base, adapter, rows of the old classes | frozen |
| head that scores the decoder's queries | new rows, trained, beside the old (`ClassHead`) |
| head that scores the encoder's tokens | new rows that never win |
| class embedding of denoising queries, for training alone | new rows, trained |

The encoder's head decides which tokens become queries, by the highest score of any class. A new class with
scores of its own there would choose other tokens, and with other queries the old classes get other logits,
since queries attend to one another. So its rows are zeros with a bias that is lower than any score, and the
new class is found among the queries that the old classes choose: enough where it looks like something that
the domain looks for, since there are far more queries than objects; not for a class that resembles
background.
"""

from __future__ import annotations

__all__ = ["extend_classes", "group_classes", "train_last_group"]

import dataclasses
from collections.abc import Sequence

import torch

from thawline.domains.attach import freeze
from thawline.models.deimv2.model import DEIMv2
from thawline.models.deimv2.network.class_rows import ClassEmbedding, ClassHead

NEVER = -50.0
"""Logit of a new class at every token of the encoder: a score of 2e-22."""


def group_classes(model: DEIMv2, groups: Sequence[int]) -> DEIMv2:
    """Divide the class layers of a plain detector into groups of rows, in place."""
    decoder = model.decoder
    decoder.denoising_class_embed = ClassEmbedding(decoder.denoising_class_embed, groups)
    decoder.enc_score_head = ClassHead(decoder.enc_score_head, groups)
    for number, head in enumerate(decoder.dec_score_head):
        decoder.dec_score_head[number] = ClassHead(head, groups)
    return model


@torch.no_grad()
def extend_classes(model: DEIMv2, groups: Sequence[int], names: Sequence[str]) -> DEIMv2:
    """Return a detector with more classes, of which nothing trains but their rows.

    Args:
        model: a domain's detector, merged.
        groups: classes of the domain's groups, in order.
        names: of the new classes.
    """
    config = model.config
    all_names = (*config.shown_names, *names)
    config = dataclasses.replace(config, num_classes=len(all_names), class_names=all_names)
    extended, n_old = DEIMv2(config), sum(groups)
    state = extended.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.shape == state[name].shape:
            state[name] = tensor
        else:
            state[name][:n_old] = tensor[:n_old]
    state["decoder.enc_score_head.weight"][n_old:] = 0
    state["decoder.enc_score_head.bias"][n_old:] = NEVER
    group_classes(extended, (*groups, len(names))).load_state_dict(state)
    return train_last_group(extended.eval())


def train_last_group(model: DEIMv2) -> DEIMv2:
    """Freeze a detector of grouped classes, in place, but for the rows that train of its last group."""
    freeze(model)
    last = len(model.decoder.enc_score_head.sizes) - 1
    for layer in (model.decoder.denoising_class_embed, *model.decoder.dec_score_head):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.endswith(f"_{last}"))
    return model
