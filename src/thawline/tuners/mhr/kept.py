"""Kept mixtures, handed to all layers where the model's forward begins: what makes a decoded token cheap.

A layer keeps its mixture by itself and makes sure of it each time (`MHRLinear`). In a small layer that takes
as long as the products do, and one look at all layers in a row a fraction of it.
"""

from __future__ import annotations

__all__ = ["KeptMixtures"]

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from thawline.tuners._steps import n_steps
from thawline.tuners.mhr.ids import AVERAGE, Groups
from thawline.tuners.mhr.layer import MHRLinear, layers_of
from thawline.tuners.mhr.state import Mixture, Place, TaskIds


class KeptMixtures:
    """The mixtures of one adapter in evaluation, and everything that they were made from."""

    def __init__(self, shared: TaskIds) -> None:
        self.shared = shared
        self._n_changes = self._n_evals = -1
        self._layers: list[MHRLinear] = []
        self._name = ""
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptMixtures, (self.shared,)  # a copy mixes again

    def clear(self) -> None:
        """Keep nothing."""
        self._groups: Groups | None = None
        self._mixtures: dict[Place, Mixture] = {}
        self._holders: list[tuple[dict[str, Any], str]] = []
        self._held: list[Any] = []
        self._tensors: list[Tensor] = []
        self._numbers: list[Any] = []

    def recall(self, inputs: Tensor) -> None:
        """Give the forward that begins its mixtures, made again only where anything has changed.

        Args:
            inputs: the model's first, (rows, ...).
        """
        shared = self.shared
        if self._n_changes != shared.n_changes:
            self._choose()
        if not self._layers or self._layers[0].disable_adapters or self._layers[0].merged:
            return
        config, groups = shared.configs[self._name], AVERAGE
        if config.router != "uniform":
            if shared.ids is not None and shared.ids.tokens is not None:
                return  # packed rows: each layer sees to its own tokens
            groups = shared.groups(inputs, config, training=False)
        if any(layer.training for layer in self._layers):
            return
        # Writing into `parameter.data` leaves no trace, but who does so turns to evaluating afterwards.
        is_kept = groups is self._groups and self._n_evals == shared.n_evals
        if not is_kept or not self._is_current():
            self._make(groups)
            self._n_evals = shared.n_evals
        forward = shared.forward
        forward.mixtures, forward.differentiates = self._mixtures, False
        forward.rows = None if groups.n == 1 else inputs.shape[0]

    def _choose(self) -> None:
        """Which layers have what is active; several adapters at once are left to the layers."""
        self.clear()
        shared, self._layers = self.shared, []
        active = layers_of(shared)[0].active_adapters
        if len(active) == 1 and active[0] in shared.configs:
            self._name = active[0]
            self._layers = layers_of(shared, self._name)
        self._n_changes = shared.n_changes

    def _make(self, groups: Groups) -> None:
        self.clear()
        self._groups, name = groups, self._name
        for layer in self._layers:
            base, router, dtype = layer.base_layer, layer.routers[name], layer.expected_dtype()
            # A sharded parameter (FSDP2's DTensor) is whole only inside its own block's forward.
            if dtype is None or not all(
                map(_is_plain, (base.weight, layer.mhr_A[name], layer.mhr_B[name], *router.state()))
            ):
                continue
            A, B = layer.kept_mixture(name, groups, dtype)
            self._mixtures[layer, name] = Mixture(groups, A, B, base.weight, layer.frozen_base())
            self._holders += [(layer._modules, "base_layer"), (layer.routers, name)]
            self._holders += [(layer.mhr_A._parameters, name), (layer.mhr_B._parameters, name)]
            for tensors in (router._parameters, router._buffers, base._parameters):
                self._holders += [(tensors, key) for key in tensors]
        self._held = [holder.get(key) for holder, key in self._holders]
        self._tensors = [one for one in self._held if isinstance(one, Tensor)]
        self._numbers = self._current_numbers()

    def _is_current(self) -> bool:
        """Whether nothing that the mixtures were made from was replaced, written or moved."""
        held = [holder.get(key) for holder, key in self._holders]
        return all(map(is_, held, self._held)) and self._current_numbers() == self._numbers

    def _current_numbers(self) -> list[Any]:
        """See `layer.tensor_state` for the tensors'; spelt out here, for speed."""
        name, tensors = self._name, self._tensors
        kind = tensors[0].device.type if tensors else "cpu"
        bases = [layer._modules["base_layer"].__dict__ for layer in self._layers]
        return [
            n_steps(),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            [tensor.data_ptr() for tensor in tensors],
            [0 if tensor.is_inference() else tensor._version for tensor in tensors],
            [(layer.scaling[name], layer.routers[name].uniform_mix) for layer in self._layers],
            [len(base["_forward_hooks"]) + len(base["_forward_pre_hooks"]) for base in bases],
            ["forward" in base for base in bases],  # accelerate replaces it
        ]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
