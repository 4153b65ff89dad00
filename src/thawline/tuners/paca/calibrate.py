"""Choose columns by their activations or gradients on a few batches, before the adapter is attached."""

from __future__ import annotations

__all__ = ["select_columns"]

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thawline.errors import ConfigError, DataError
from thawline.tuners.experts import join_experts, split_experts
from thawline.tuners.paca.config import PacaConfig
from thawline.tuners.paca.layer import column_view
from thawline.tuners.paca.model import PacaModel, rank_of
from thawline.tuners.paca.selection import column_energy, top_columns
from thawline.tuners.targets import is_left_out


def select_columns(
    model: nn.Module,
    config: PacaConfig,
    batches: Iterable[Any],
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
) -> PacaConfig:
    """Run `batches` through the base model and set `config.indices` to the columns of highest score.

    `activation` scores an input feature by Σ x² over all tokens, padding included; `gradient` by Σ over
    batches of ‖∂loss/∂W[:, j]‖², the first-order decrease of the loss by a step on that column. The gradient
    score computes each layer's dense weight gradient once per batch, one layer at a time: it needs the memory
    of full fine-tuning for activations, but not for gradients.

    Args:
        model: the base model, before `get_peft_model`. Runs in evaluation mode and is left unchanged.
        config: with selection="activation" or "gradient".
        batches: mappings (keyword arguments), tuples (arguments) or tensors; a few of the training data.
        loss_fn: (output, batch) → scalar, for `gradient`. None: the output's own `.loss`.
    Returns: a copy of `config` with explicit indices, ready for `get_peft_model` and for JSON.
    Raises:
        ConfigError: for another selection, a model that carries adapters, a model without a loss, a module
            that no batch reaches, or r above a module's input features.
        DataError: if there is no batch.
    """
    if config.selection not in SCORERS:
        raise ConfigError(f"selection={config.selection!r} needs no data. Set it to {' or '.join(SCORERS)}.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            "The model has adapters already. Call select_columns on the base model, before get_peft_model."
        )
    split_experts(model, partial(is_left_out, config))
    try:
        targets = PacaModel.checked_targets(copy.deepcopy(config), model)
        scores = _scores(model, config, targets, batches, loss_fn)
    finally:
        join_experts(model)

    indices = {}
    for name in targets:
        if name not in scores:
            raise ConfigError(f"No batch reached '{name}'. Use batches that do, or exclude the module.")
        r = rank_of(config, name)
        if r > len(scores[name]):
            raise ConfigError(
                f"r={r} is more than the {len(scores[name])} input features of '{name}'. Set rank_pattern."
            )
        indices[name] = top_columns(scores[name], r).tolist()
    return replace(copy.deepcopy(config), indices=indices)


def _scores(
    model: nn.Module,
    config: PacaConfig,
    targets: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None,
) -> dict[str, Tensor]:
    """Return the score of every input feature, by layer. Raises: DataError: if there is no batch."""
    scores: dict[str, Tensor] = {}
    n_batches = 0
    device = next(model.parameters()).device
    needs_loss = config.selection == "gradient"
    with _unchanged(model), ExitStack() as hooks, torch.set_grad_enabled(needs_loss):
        for name, module in targets.items():
            hooks.callback(SCORERS[config.selection](module, partial(_add, scores, name)).remove)
        for batch in batches:
            n_batches += 1
            batch = send_to_device(batch, device)
            output = _call(model, batch)
            if needs_loss:
                _loss_of(output, batch, loss_fn).backward()
    if n_batches == 0:
        raise DataError("`batches` is empty. Pass a few batches of the training data.")
    return scores


def _add(scores: dict[str, Tensor], name: str, energy: Tensor) -> None:
    scores[name] = scores[name] + energy if name in scores else energy


def _score_by_activation(module: nn.Module, add: Callable[[Tensor], None]) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        energy = args[0].detach().double().square()
        if isinstance(module, nn.Conv2d):
            energy = energy.sum((-2, -1))
            n_columns = column_view(module)(module.weight).shape[1]
            if n_columns != module.in_channels:  # grouped: column c reads the c-th channel of every group
                energy = energy.unflatten(-1, (module.groups, -1)).sum(-2)
        add(energy.reshape(-1, energy.shape[-1]).sum(0))

    return module.register_forward_pre_hook(hook)


def _score_by_gradient(module: nn.Module, add: Callable[[Tensor], None]) -> RemovableHandle:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        add(column_energy(column_view(module)(weight.grad)))
        weight.grad = None

    return module.weight.requires_grad_(True).register_post_accumulate_grad_hook(hook)


SCORERS = {"activation": _score_by_activation, "gradient": _score_by_gradient}


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode and freeze it; afterwards restore modes, flags and gradients."""
    modes = {module: module.training for module in model.modules()}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.eval()
    for p, _, _ in parameters:
        p.requires_grad_(False)
        p.grad = None
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for p, requires_grad, grad in parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _loss_of(output: Any, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> Tensor:
    loss = loss_fn(output, batch) if loss_fn is not None else getattr(output, "loss", None)
    if loss is None:
        raise ConfigError(
            "selection='gradient' needs a loss, and the model's output has none. Put labels into the "
            "batches, or pass loss_fn=lambda output, batch: ..."
        )
    return loss
