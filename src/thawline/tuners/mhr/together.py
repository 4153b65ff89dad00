"""Mixtures made where the model's forward begins: in one go for all layers whose skills have the same shapes.

They share a graph, and are used in that forward and its backward alone. A layer mixes by itself inside a
reentrant checkpoint, whose first nested backward would free the shared graph; and where it is called outside
of the model's forward, as T5's `generate` calls the encoder.
"""

from __future__ import annotations

__all__ = ["Together"]

from typing import Any

import torch
from torch import Tensor, nn

from thawline.ops.mixing import mix_skills_of_many
from thawline.tuners.mhr.config import MHRConfig
from thawline.tuners.mhr.ids import Groups
from thawline.tuners.mhr.layer import MHRLinear, layers_of
from thawline.tuners.mhr.routing import LearnedRouter, logistic_noise, skill_weights
from thawline.tuners.mhr.state import Forward, Mixture, TaskIds

# Beyond this size of its skills a layer mixes by itself: the work outweighs the launches that mixing together
# saves, and the gradients of a large inventory should not all wait for the end of the backward.
MIXED_TOGETHER_BYTES = 2**21


class Together:
    """What the layers of a model prepare together, at the beginning of a forward in training."""

    def __init__(self, shared: TaskIds) -> None:
        self.shared = shared
        self._plans: list[Plan] = []
        self._n_changes = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, (self.shared,)  # planned again in the copy

    def prepare(self, inputs: Tensor) -> None:
        """Draw the forward's noise and mix what is mixed together.

        Args:
            inputs: the model's first, (rows, ...).
        """
        shared = self.shared
        for plan in self._current_plans():
            config = shared.configs[plan.name]
            if config.router == "learned" and (shared.ids is not None or config.n_tasks == 1):
                self._prepare(plan, config, inputs)

    def _current_plans(self) -> list[Plan]:
        shared = self.shared
        if self._n_changes != shared.n_changes or not all(plan.is_current() for plan in self._plans):
            layers = layers_of(shared)
            names = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
            self._plans = [Plan(layers_of(shared, name), name) for name in names if name in shared.configs]
            self._n_changes = shared.n_changes
        return self._plans

    def _prepare(self, plan: Plan, config: MHRConfig, inputs: Tensor) -> None:
        """Noise in one draw, before any block that may be checkpointed; then mixtures."""
        forward = self.shared.forward
        groups = self.shared.groups(inputs, config, training=True)
        if config.noise != "none":
            sizes = [
                layer.routers[name].n_heads * layer.routers[name].n_skills for layer, name in plan.places
            ]
            drawn = logistic_noise(len(groups.rows), sum(sizes), device=groups.rows.device).split(sizes, 1)
            for (layer, name), noise in zip(plan.places, drawn, strict=True):
                forward.noise[layer, name] = noise.unflatten(1, (layer.routers[name].n_heads, -1))
        if torch.is_grad_enabled() and not groups.by_token and not config.dropout:
            forward.rows = None if groups.n == 1 else inputs.shape[0]
            for kind in plan.kinds:
                kind.mix(forward, groups, config)


class Kind:
    """Places whose skills and tables have the same shapes, and which are mixed in one go."""

    def __init__(self, places: list[tuple[MHRLinear, str]], dtype: torch.dtype, scale: float) -> None:
        self.places, self.dtype, self.scale = places, dtype, scale
        self.routers = [layer.routers[name] for layer, name in places]
        self.A = [layer.mhr_A[name] for layer, name in places]
        self.B = [layer.mhr_B[name] for layer, name in places]
        self.tables = list(dict.fromkeys(self.routers))
        self.logits = [table.logits for table in self.tables]

    def is_current(self) -> bool:
        """Whether parameters, scale, and the dtype of the base's output, are still those of the beginning."""
        for (layer, name), router, A, B in zip(self.places, self.routers, self.A, self.B, strict=True):
            # Past Module.__getattr__, which would cost as much as the rest of the forward's Python.
            if (
                layer.scaling.get(name) != self.scale
                or layer.routers.get(name) is not router
                or layer._modules["mhr_A"]._parameters.get(name) is not A
                or layer._modules["mhr_B"]._parameters.get(name) is not B
            ):
                return False
        tables = zip(self.tables, self.logits, strict=True)
        return (
            all(table._parameters.get("logits") is logits for table, logits in tables)
            and self.places[0][0].expected_dtype() is self.dtype
        )

    def mix(self, forward: Forward, groups: Groups, config: MHRConfig) -> None:
        """Leave the mixtures in `forward`."""
        weights_NUHS = self._weights(forward, groups, config)
        mixed = mix_skills_of_many(weights_NUHS, self.A, self.B, groups.index, self.dtype, self.scale)
        n = len(self.places)
        for place, A, B in zip(self.places, mixed[:n], mixed[n:], strict=True):
            forward.mixtures[place] = Mixture(groups, A, B)

    def _weights(self, forward: Forward, groups: Groups, config: MHRConfig) -> Tensor:
        """Routing weights (N, U, H, S), each table looked up once."""
        logits = _stack(self.logits).index_select(1, groups.rows)
        shared = len(self.tables) < len(self.places)
        if not forward.noise:
            weights = skill_weights(logits, None, 1.0, config.uniform_mix)
            return self._for_each_place(weights) if shared else weights
        noise = _stack([forward.noise[place] for place in self.places])
        logits = self._for_each_place(logits) if shared else logits
        return skill_weights(logits, noise, config.temperature, config.uniform_mix)

    def _for_each_place(self, of_tables: Tensor) -> Tensor:
        by_table = dict(zip(self.tables, of_tables.unbind(0), strict=True))
        return _stack([by_table[router] for router in self.routers])


class Plan:
    """What an adapter's layers have in common, worked out once and not at every forward."""

    def __init__(self, layers: list[MHRLinear], name: str) -> None:
        self.name = name
        self.places = [(layer, name) for layer in layers if name in layer.active_adapters]
        kinds: dict[Any, list[tuple[MHRLinear, str]]] = {}
        for layer, _ in filter(lambda place: _can_be_mixed_together(*place), self.places):
            shapes = layer.mhr_A[name].shape, layer.mhr_B[name].shape, layer.routers[name].logits.shape
            key = (*shapes, layer.expected_dtype(), layer.scaling[name])
            kinds.setdefault(key, []).append((layer, name))
        self.kinds = [Kind(places, dtype, scale) for (*_, dtype, scale), places in kinds.items()]

    def is_current(self) -> bool:
        """Whether nothing that it was made from was replaced."""
        return all(kind.is_current() for kind in self.kinds)


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _can_be_mixed_together(layer: MHRLinear, name: str) -> bool:
    router, A, B = layer.routers[name], layer.mhr_A[name], layer.mhr_B[name]
    if (
        not isinstance(router, LearnedRouter)
        or A.nbytes + B.nbytes + router.logits.nbytes > MIXED_TOGETHER_BYTES
    ):
        return False
    # A sharded parameter (FSDP2's DTensor) is whole only inside its own block's forward.
    return all(type(p) is nn.Parameter for p in (A, B, router.logits)) and layer.expected_dtype() is not None
