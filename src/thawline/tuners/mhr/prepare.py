"""Mixtures of all layers, prepared where the model's forward begins.

In training, layers whose skills have the same shapes are mixed in one go, noise included, and share a graph;
so the launches do not grow with the number of layers. In evaluation without gradients, mixtures are kept from
one forward to the next until anything they were made from changes; so a decoded token pays two small products
per layer. A layer that finds no mixture makes its own: a layer inside a reentrant checkpoint,
whose first nested backward would free the shared graph; a large, sharded (FSDP2) or packed one; one with a
fixed routing table; and one that is called outside the model's forward, as T5's `generate` calls the encoder.
"""

from __future__ import annotations

__all__ = ["Preparer"]

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from thawline.ops.mixing import mix_skills_of_many
from thawline.tuners._steps import n_steps
from thawline.tuners.mhr.ids import Groups
from thawline.tuners.mhr.routing import LearnedRouter, logistic_noise, skill_weights
from thawline.tuners.mhr.state import Forward, Mixture, Place, RoutingState

# A layer with more bytes of skills than this mixes by itself: the work outweighs the launches saved, and the
# gradients of a large inventory should not all wait for the end of the backward.
MIXED_TOGETHER_BYTES = 2**21


class Preparer:
    """Prepares every forward of one model: noise, mixtures, and checkpoints that remember them."""

    def __init__(self, state: RoutingState) -> None:
        self.state = state
        self._n_changes = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return Preparer, (self.state,)  # a copy plans and mixes again

    def prepare(self, model: nn.Module, inputs: Tensor | None) -> None:
        """Add noise and mixtures to the forward that begins.

        Args:
            inputs: the model's first tensor, (rows, ...); `None`: layers see to their own rows.
        """
        state, forward = self.state, self.state.forward
        if state.is_off():
            return
        if self._n_changes != state.n_changes or not self._is_current():
            self._plan(model)
        forward.grad_enabled = torch.is_grad_enabled()
        configs = [state.configs[name] for name in state.active()]
        drops = model.training and any(config.dropout for config in configs)
        if inputs is not None and not drops and (forward.ids is None or forward.ids.tokens is None):
            forward.rows = inputs.shape[0]
        if not model.training:
            if not (forward.grad_enabled and any(p.requires_grad for p in self._parameters)):
                self._recall(forward)
            return
        for block in self._blocks:
            CheckpointWithIds.wrap(block, state)
        if inputs is None:
            return
        for name, config in state.routed().items():
            places = [place for place in self._places if place[1] == name]
            if places and config.router == "learned":
                groups = state.groups(inputs, config, training=True)
                if config.noise != "none":
                    _draw_noise(forward, places, groups)
                for mixer in self._mixers[name] if forward.grad_enabled and forward.rows is not None else ():
                    mixer.mix(forward, groups)

    def _plan(self, model: nn.Module) -> None:
        """Group the layers by shape, and list all parts that mixtures are made from."""
        state = self.state
        self._n_changes = state.n_changes
        self._kept: tuple[Any, dict[Place, Mixture]] = None, {}
        self._blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._places: list[Place] = [
            (layer, name)
            for name in state.active()
            for layer in state.layers_of(name)
            if name in layer.active_adapters and layer.training is model.training
        ]
        self._mixers = {name: _mixers([p for p in self._places if p[1] == name]) for name in state.active()}
        # Looked up past Module.__getattr__, which would cost as much as all else in Python.
        self._holders: list[tuple[dict[str, Any], str]] = []
        for layer, name in self._places:
            router = layer.routers[name]
            self._holders += [(layer.mhr_A._parameters, name), (layer.mhr_B._parameters, name)]
            self._holders += [(layer.routers, name), (layer.scaling, name), (vars(router), "uniform_mix")]
            self._holders += [(held, key) for held in (router._parameters, router._buffers) for key in held]
        self._held = [holder.get(key) for holder, key in self._holders]
        self._parameters = [part for part in self._held if isinstance(part, Tensor)]
        self._tensors = [getattr(p, "_local_tensor", p) for p in self._parameters]  # of FSDP2's DTensors

    def _is_current(self) -> bool:
        """Return True if no parameter, router or number was replaced, and the bases' dtypes are the same."""
        held = [holder.get(key) for holder, key in self._holders]
        return all(map(is_, held, self._held)) and all(
            shape.places[0][0].expected_dtype() is shape.dtype
            for mixers in self._mixers.values()
            for mixer in mixers
            for shape in mixer.shapes
        )

    def _recall(self, forward: Forward) -> None:
        """Share the mixtures that earlier forwards kept, unless a value or the ids have changed since.

        Fused optimisers do not count a tensor's version up, hence the number of steps. Writing to
        `parameter.data` cannot be detected: call `.eval()` after it, which makes a new plan.
        """
        tensors = self._tensors
        made_from = (
            n_steps(),
            [tensor.data_ptr() for tensor in tensors],
            [0 if tensor.is_inference() else tensor._version for tensor in tensors],
            forward.ids,
        )
        if self._kept[0] != made_from:
            self._kept = made_from, {}
        forward.keeps, forward.mixtures = True, self._kept[1]


class TrainingMixer:
    """Layers whose routing tables have the same shape: looked up in one go, then mixed shape by shape."""

    def __init__(self, shapes: list[SameShape]) -> None:
        self.shapes = shapes
        self.places = [place for shape in shapes for place in shape.places]
        routers = [layer.routers[name] for layer, name in self.places]
        self.router = routers[0]
        tables = list(dict.fromkeys(routers))
        self.logits = [table.logits for table in tables]
        self.table_of_place: Tensor | None = None
        if len(tables) < len(routers):
            numbers = {table: number for number, table in enumerate(tables)}
            self.table_of_place = torch.tensor([numbers[r] for r in routers], device=self.logits[0].device)

    def mix(self, forward: Forward, groups: Groups) -> None:
        """Leave the mixtures of all places in `forward`."""
        device, uniform_mix = self.logits[0].device, self.router.uniform_mix
        logits = _stack(self.logits).index_select(1, groups.rows.to(device))
        if self.places[0] in forward.noise:
            noise = _stack([forward.noise[place] for place in self.places]).to(device)
            weights = skill_weights(self._by_place(logits), noise, self.router.temperature, uniform_mix)
        else:
            weights = self._by_place(skill_weights(logits, uniform_mix=uniform_mix))
        parts = weights.split([len(shape.places) for shape in self.shapes])
        for shape, weights_NUHS in zip(self.shapes, parts, strict=True):
            shape.mix(forward, groups, weights_NUHS)

    def _by_place(self, by_table: Tensor) -> Tensor:
        return by_table if self.table_of_place is None else by_table.index_select(0, self.table_of_place)


class SameShape:
    """Places whose skills have the same shapes and scale, mixed by one autograd node."""

    def __init__(self, places: list[Place], dtype: torch.dtype, scale: float) -> None:
        self.places, self.dtype, self.scale = places, dtype, scale
        self.A = [layer.mhr_A[name] for layer, name in places]
        self.B = [layer.mhr_B[name] for layer, name in places]

    def mix(self, forward: Forward, groups: Groups, weights_NUHS: Tensor) -> None:
        """Leave the mixtures in `forward`."""
        index = None if groups.index is None else groups.index.to(weights_NUHS.device)
        mixed = mix_skills_of_many(weights_NUHS, self.A, self.B, index, self.dtype, self.scale)
        n = len(self.places)
        for place, A, B in zip(self.places, mixed[:n], mixed[n:], strict=True):
            forward.mixtures[place] = Mixture(groups, A, B)


class CheckpointWithIds:
    """A block's gradient checkpoint function, whose recomputation sees the `Forward` it recomputes.

    transformers keeps the function at every block that it may checkpoint; it is wrapped there. What a user
    checkpoints by hand is recomputed with the latest forward's: one forward, then its backward.
    """

    def __init__(self, checkpoint: Callable[..., Any], state: RoutingState) -> None:
        self.checkpoint, self.state = checkpoint, state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        state, forward = self.state, self.state.forward

        def resumed(*inputs: Any) -> Any:
            current, state.forward = state.forward, forward
            try:
                return function(*inputs)
            finally:
                state.forward = current

        return self.checkpoint(resumed, *args, **kwargs)

    @classmethod
    def wrap(cls, block: nn.Module, state: RoutingState) -> None:
        """Wrap the checkpoint function of a block, if it has one that is not wrapped yet."""
        function = vars(block).get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, cls):
            block._gradient_checkpointing_func = cls(function, state)

    @classmethod
    def unwrap(cls, model: nn.Module) -> None:
        """Give the blocks of a model their own checkpoint functions back."""
        for block in model.modules():
            function = vars(block).get("_gradient_checkpointing_func")
            if isinstance(function, cls):
                block._gradient_checkpointing_func = function.checkpoint


def _mixers(places: list[Place]) -> list[TrainingMixer]:
    """Group the places that can be mixed together by shape of the routing table, then of the skills."""
    alike: dict[Any, dict[Any, list[Place]]] = {}
    for layer, name in places:
        router, A, B = layer.routers[name], layer.mhr_A[name], layer.mhr_B[name]
        dtype = layer.expected_dtype()
        if dtype is None or not isinstance(router, LearnedRouter):
            continue
        parameters = A, B, router.logits
        # A sharded parameter (FSDP2's DTensor) is whole only inside its own block's forward.
        is_sharded = any(type(p) is not nn.Parameter for p in parameters)
        if is_sharded or sum(p.nbytes for p in parameters) > MIXED_TOGETHER_BYTES:
            continue
        shapes = alike.setdefault((router.logits.shape, router.uniform_mix, A.device), {})
        shapes.setdefault((A.shape, B.shape, dtype, layer.scaling[name]), []).append((layer, name))
    return [
        TrainingMixer([SameShape(found, dtype, scale) for (*_, dtype, scale), found in shapes.items()])
        for shapes in alike.values()
    ]


def _draw_noise(forward: Forward, places: list[Place], groups: Groups) -> None:
    """Draw a forward's noise in one go, before any block that may be checkpointed."""
    shapes = [(layer.routers[name].n_heads, layer.routers[name].n_skills) for layer, name in places]
    sizes = [n_heads * n_skills for n_heads, n_skills in shapes]
    drawn = logistic_noise(len(groups.rows), sum(sizes), device=groups.rows.device).split(sizes, 1)
    for place, shape, noise in zip(places, shapes, drawn, strict=True):
        forward.noise[place] = noise.unflatten(1, shape)


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
