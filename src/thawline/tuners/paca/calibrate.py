"""Choose columns by what data does to them, before the adapter exists."""

from __future__ import annotations

__all__ = ["select_columns"]

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from thawline.errors import ConfigError, DataError
from thawline.tuners.paca.config import PacaConfig
from thawline.tuners.paca.layer import column_view
from thawline.tuners.paca.model import check_target, rank_of, target_names, weight_owners
from thawline.tuners.paca.selection import column_energy, top_columns


def select_columns(
    model: nn.Module,
    config: PacaConfig,
    batches: Iterable[Any],
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
) -> PacaConfig:
    """Run `batches` through the base model and fill in `config.indices`, the columns of highest score.

    `activation` scores an input feature by Σ x² over all tokens, padding included; `gradient` by Σ over
    batches of ‖∂loss/∂W[:, j]‖², the decrease that a first step on that column promises. The gradient score
    forms each layer's dense weight gradient once per batch, one layer at a time: it needs the activations of
    full fine-tuning, not its gradients.

    Args:
        model: the base model, before `get_peft_model`. Left as it was; runs in evaluation mode.
        config: with selection="activation" or "gradient".
        batches: mappings (keyword arguments), tuples (arguments) or tensors; a few of what will be trained
            on.
        loss_fn: (output, batch) → scalar, for `gradient`. None: the output's own `.loss`.
    Returns: a copy of `config` with explicit indices, ready for `get_peft_model` and for JSON.
    Raises:
        ConfigError: for another selection, a model that carries adapters, a model without a loss, a module
            that no batch reaches, or r above a module's input features.
        DataError: if there is no batch.
    """
    if config.selection not in SCORERS:
        raise ConfigError(f"selection={config.selection!r} needs no data. Calibrate {' or '.join(SCORERS)}.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            "The model carries adapters. Give select_columns the base model, before get_peft_model."
        )
    owners = weight_owners(model)
    targets = {name: model.get_submodule(name) for name in target_names(model, config)}
    for name, module in targets.items():
        check_target(module, model.get_submodule(name.rpartition(".")[0]), name, owners)

    scores: dict[str, Tensor] = {}
    n_batches = 0
    device = next(model.parameters()).device
    with _as_found(model), SCORERS[config.selection](targets, scores) as needs_loss:
        for batch in batches:
            n_batches += 1
            batch = _to(batch, device)
            with torch.set_grad_enabled(needs_loss):
                output = _call(model, batch)
                if needs_loss:
                    _loss_of(output, batch, loss_fn).backward()
    if n_batches == 0:
        raise DataError("`batches` is empty: nothing to choose columns by.")

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


@contextmanager
def _score_by_activation(targets: Mapping[str, nn.Module], scores: dict[str, Tensor]) -> Iterator[bool]:
    def add(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        if isinstance(module, nn.Conv2d):
            energy = x.double().square().sum((-2, -1))
            if (
                column_view(module)(module.weight).shape[1] != module.in_channels
            ):  # grouped: every group's c-th channel
                energy = energy.unflatten(-1, (module.groups, -1)).sum(-2)
        else:
            energy = x.double().square()
        energy = energy.reshape(-1, energy.shape[-1]).sum(0)
        scores[name] = scores[name] + energy if name in scores else energy

    handles = [module.register_forward_pre_hook(partial(add, name)) for name, module in targets.items()]
    try:
        yield False
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _score_by_gradient(targets: Mapping[str, nn.Module], scores: dict[str, Tensor]) -> Iterator[bool]:
    def add(name: str, module: nn.Module, weight: Tensor) -> None:
        assert weight.grad is not None
        energy = column_energy(column_view(module)(weight.grad))
        scores[name] = scores[name] + energy if name in scores else energy
        weight.grad = None

    handles = []
    for name, module in targets.items():
        module.weight.requires_grad_(True)
        handles.append(module.weight.register_post_accumulate_grad_hook(partial(add, name, module)))
    try:
        yield True
    finally:
        for handle in handles:
            handle.remove()


SCORERS = {"activation": _score_by_activation, "gradient": _score_by_gradient}


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, everything frozen, no gradients; then mode, flags and gradients as before."""
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


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_to(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch
