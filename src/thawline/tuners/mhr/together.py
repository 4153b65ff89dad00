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
            for tables in plan.tables:
                for kind, weights_NUHS in zip(
                    tables.kinds, tables.weights(forward, groups, config), strict=True
                ):
                    kind.mix(forward, groups, weights_NUHS)


class Plan:
    """What an adapter's layers have in common, worked out once and not at every forward."""

    def __init__(self, layers: list[MHRLinear], name: str) -> None:
        self.name = name
        self.places = [(layer, name) for layer in layers if name in layer.active_adapters]
        places: dict[tuple[Any, ...], list[tuple[MHRLinear, str]]] = {}
        for layer, _ in filter(lambda place: _can_be_mixed_together(*place), self.places):
            A, B = layer.mhr_A[name], layer.mhr_B[name]
            looked_up_with = layer.routers[name].logits.shape, A.device
            key = looked_up_with, A.shape, B.shape, layer.expected_dtype(), layer.scaling[name]
            places.setdefault(key, []).append((layer, name))
        kinds: dict[Any, list[Kind]] = {}
        for (looked_up_with, _, _, dtype, scale), alike in places.items():
            kinds.setdefault(looked_up_with, []).append(Kind(alike, dtype, scale))
        self.tables = [Tables(alike) for alike in kinds.values()]

    def is_current(self) -> bool:
        """Whether nothing that it was made from was replaced."""
        return all(tables.is_current() for tables in self.tables)


class Kind:
    """Places whose skills have the same shapes, and which are mixed in one go."""

    def __init__(self, places: list[tuple[MHRLinear, str]], dtype: torch.dtype, scale: float) -> None:
        self.places, self.dtype, self.scale = places, dtype, scale
        self.A = [layer.mhr_A[name] for layer, name in places]
        self.B = [layer.mhr_B[name] for layer, name in places]

    def mix(self, forward: Forward, groups: Groups, weights_NUHS: Tensor) -> None:
        """Leave the mixtures in `forward`."""
        index = None if groups.index is None else groups.index.to(weights_NUHS.device)
        mixed = mix_skills_of_many(weights_NUHS, self.A, self.B, index, self.dtype, self.scale)
        n = len(self.places)
        for place, A, B in zip(self.places, mixed[:n], mixed[n:], strict=True):
            layer = place[0]
            weight = layer._modules["base_layer"].__dict__["_parameters"].get("weight")
            # A sharded weight (FSDP2's DTensor) is another tensor by the time its layer runs.
            base = layer.frozen_base() if type(weight) is nn.Parameter else None
            forward.mixtures[place] = Mixture(groups, A, B, weight, base)


class Tables:
    """Kinds whose routing tables have the same shape, and are looked up in one go, each once."""

    def __init__(self, kinds: list[Kind]) -> None:
        self.kinds = kinds
        self.places = [place for kind in kinds for place in kind.places]
        routers = [layer.routers[name] for layer, name in self.places]
        tables = list(dict.fromkeys(routers))
        self.logits = [table.logits for table in tables]
        self.device = self.logits[0].device
        self.of_place: Tensor | None = None
        """Which table each place uses, where some share one."""
        if len(tables) < len(routers):
            at = {table: number for number, table in enumerate(tables)}
            self.of_place = torch.tensor([at[router] for router in routers], device=self.device)
        # What is_current looks at, past Module.__getattr__, which would cost as much as all else in Python.
        self._parts: list[tuple[dict[str, Any], str, Any]] = [
            (table._parameters, "logits", logits) for table, logits in zip(tables, self.logits, strict=True)
        ]
        for (layer, name), router in zip(self.places, routers, strict=True):
            A, B = layer.mhr_A._parameters, layer.mhr_B._parameters
            self._parts += [(A, name, A[name]), (B, name, B[name]), (layer.routers, name, router)]
        self._scales = [(layer.scaling, name, layer.scaling[name]) for layer, name in self.places]

    def is_current(self) -> bool:
        """Whether parameters, scales, and the dtypes of the bases' outputs, are those of the beginning."""
        for holder, name, part in self._parts:
            if holder.get(name) is not part:
                return False
        for scaling, name, scale in self._scales:
            if scaling.get(name) != scale:
                return False
        return all(kind.places[0][0].expected_dtype() is kind.dtype for kind in self.kinds)

    def weights(self, forward: Forward, groups: Groups, config: MHRConfig) -> tuple[Tensor, ...]:
        """Routing weights (N, U, H, S) for the N places of each kind."""
        logits = _stack(self.logits).index_select(1, groups.rows.to(self.device))
        if forward.noise:
            noise = _stack([forward.noise[place] for place in self.places]).to(self.device)
            weights = skill_weights(self._of_places(logits), noise, config.temperature, config.uniform_mix)
        else:
            weights = self._of_places(skill_weights(logits, None, 1.0, config.uniform_mix))
        return weights.split([len(kind.places) for kind in self.kinds])

    def _of_places(self, of_tables: Tensor) -> Tensor:
        return of_tables if self.of_place is None else of_tables.index_select(0, self.of_place)


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
