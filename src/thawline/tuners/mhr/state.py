"""What all MHR layers of a model share: the task ids, and what is worked out from them once a forward.

Nothing here hangs on hooks that end with the forward: gradient checkpointing runs layers again in the
backward, with the ids, the noise and the mixtures that their own forward had, even if another forward came
between.

Mixtures that share a graph are made where the model's own forward begins, and used nowhere else. A layer
mixes by itself inside a reentrant checkpoint, whose first nested backward would free the shared graph; and
where it is called outside of the model's forward, as T5's `generate` calls the encoder.
"""

from __future__ import annotations

__all__ = ["Forward", "TaskIds"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from thawline.errors import RoutingError
from thawline.ops.mixing import mix_skills_of_many
from thawline.tuners.mhr.config import MHRConfig
from thawline.tuners.mhr.ids import Groups, Ids
from thawline.tuners.mhr.routing import LearnedRouter, Router, logistic_noise, skill_weights

if TYPE_CHECKING:
    from thawline.tuners.mhr.layer import MHRLinear

    Place = tuple[MHRLinear, str]

MISSING = (
    "No task ids: the routing table has {n} rows. Call thawline.set_task_ids(model, ids) before the forward,"
    " or"
    " thawline.route_by_batch(model) once and pass task_ids with every batch."
)

# Beyond this size of its skills a layer mixes by itself: the work outweighs the launches that mixing together
# saves, and the gradients of a large inventory should not all wait for the end of the backward.
MIXED_TOGETHER_BYTES = 2**21


class Mixture(NamedTuple):
    """Mixed factors, and the groups they are for."""

    groups: Groups
    A: Tensor
    B: Tensor


class Forward:
    """What belongs to one forward: ids, noise and mixtures. Copies begin without the latter two."""

    def __init__(self, ids: Ids | None = None, lengths: frozenset[int] = frozenset()) -> None:
        self.ids = ids
        self.lengths = lengths
        """Tokens per row, for layers that see rows and tokens flattened into one axis."""
        self.noise: dict[Place, Tensor] = {}
        self.mixtures: dict[Place, Mixture] = {}
        self.rows: int | None = None
        """Rows that a layer's input must have for its mixture to fit; `None`: any number."""
        self.repeated: Ids | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self.ids, self.lengths)


class TaskIds:
    """The current ids of a model, shared by all its MHR layers."""

    def __init__(self) -> None:
        self.configs: dict[str, MHRConfig] = {}
        """Of every adapter, the same dict as PEFT's own: a config is replaced there, not changed."""
        self.bins: dict[tuple[str, str], Router] = {}
        """Routing tables by adapter and by the part of the model that shares one."""
        self.layers: list[MHRLinear] = []
        self.forward = Forward()
        self.running = False
        """Whether the model's forward is under way."""
        self.generating = False
        """Whether `generate` is, which repeats rows."""
        self.reads_batch = False
        """Whether `route_by_batch` is on."""
        self.from_batch = False
        """Whether the ids came with a batch, and so are no one else's."""
        self.arrived = False
        """Whether they came with the batch whose forward begins now."""
        self.blocks: list[nn.Module] | None = None
        """Modules that transformers may checkpoint."""
        self.plans: list[Plan] | None = None
        """Of the active adapters; `None` after any change to them."""

    @property
    def ids(self) -> Ids | None:
        """Of the forward under way, or the next one."""
        return self.forward.ids

    @ids.setter
    def ids(self, ids: Ids | None) -> None:
        self.forward = Forward(ids)

    def is_routed(self) -> bool:
        """Whether any layer is going to look at ids."""
        first = self.layers[0]
        if first.disable_adapters or first.merged:
            return False
        return any(
            self.configs[name].router != "uniform" for name in first.active_adapters if name in self.configs
        )

    def check_present(self) -> None:
        """Raises: RoutingError: if an active adapter needs ids and there are none."""
        for name in self.layers[0].active_adapters:
            config = self.configs.get(name)
            if self.ids is None and config is not None and config.router != "uniform" and config.n_tasks != 1:
                raise RoutingError(MISSING.format(n=config.n_tasks))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plans": None, "blocks": None}  # found again in the copy

    # A forward.

    def begin(self, model: nn.Module, inputs: Tensor) -> None:
        """Check the ids against the first inputs (rows, ...), draw the noise and mix what is mixed together.

        Raises: RoutingError: for other rows, or packed ids for other tokens, than the batch has.
        """
        ids = self.ids
        if ids is not None:
            ids.check_rows(inputs.shape[0], self.generating, "the batch")
            if ids.tokens is not None and tuple(inputs.shape[1:2]) != (ids.tokens,):
                raise RoutingError(
                    f"Task ids for {ids.tokens} tokens per row, but the batch has {tuple(inputs.shape)}."
                    " Give one id"
                    " per token, or one per row."
                )
        self.forward = Forward(ids, frozenset(inputs.shape[1:2]))
        if not model.training or torch.compiler.is_compiling():
            return
        self._carry_through_checkpoints(model)
        for plan in self._current_plans():
            if self._has_ids(plan.name):
                self._prepare(plan, self.configs[plan.name], inputs)

    def _current_plans(self) -> list[Plan]:
        if self.plans is None or not all(plan.is_current() for plan in self.plans):
            names = dict.fromkeys(name for layer in self.layers for name in layer.active_adapters)
            self.plans = [Plan(self.layers, name) for name in names if name in self.configs]
        return self.plans

    def _has_ids(self, name: str) -> bool:
        return self.ids is not None or self.configs[name].n_tasks == 1

    def _prepare(self, plan: Plan, config: MHRConfig, inputs: Tensor) -> None:
        """Noise in one draw, before any block that may be checkpointed; then mixtures."""
        if config.router != "learned":
            return
        groups = self.groups(inputs, config, training=True)
        if config.noise != "none":
            sizes = [
                layer.routers[name].n_heads * layer.routers[name].n_skills for layer, name in plan.places
            ]
            drawn = logistic_noise(len(groups.rows), sum(sizes), device=groups.rows.device).split(sizes, 1)
            for (layer, name), noise in zip(plan.places, drawn, strict=True):
                self.forward.noise[layer, name] = noise.unflatten(1, (layer.routers[name].n_heads, -1))
        if torch.is_grad_enabled() and not groups.by_token and not config.dropout:
            self.forward.rows = None if groups.n == 1 else inputs.shape[0]
            for kind in plan.kinds:
                kind.mix(self.forward, groups, config)

    def _carry_through_checkpoints(self, model: nn.Module) -> None:
        if self.blocks is None:
            self.blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        for block in self.blocks:
            function = block.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, Carrying):
                block._gradient_checkpointing_func = Carrying(function, self)

    def take(self, place: Place, groups: Groups, dtype: torch.dtype) -> Mixture | None:
        """The mixture made for this place at the forward's beginning, if it is still good.

        Without gradients a layer in training is inside a reentrant checkpoint, whose backward runs through a
        graph
        of its own: the layer must mix by itself there, now and then. A layer that is called by itself,
        outside of the model's forward and its backward, finds a graph that may be gone, and begins anew.
        """
        if not torch.is_grad_enabled():
            self.forward.mixtures.pop(place, None)
            return None
        found = self.forward.mixtures.get(place)
        if found is None or found.groups is not groups or found.A.dtype is not dtype:
            return None
        if self.running or torch._C._current_graph_task_id() != -1:
            return found
        self.forward = Forward(self.forward.ids, self.forward.lengths)
        return None

    # Rows.

    def groups(self, x: Tensor, config: MHRConfig, training: bool) -> Groups:
        """The groups that the rows of `x` (rows, ..., I) fall into.

        Raises: RoutingError: if ids are missing, or are not those of x.
        """
        ids = self.ids
        if ids is None:
            self.check_present()
            ids = self.ids = Ids([0], None, None, x.device)
        ids.check_table(config.n_tasks or 1)
        if ids.tokens is not None:
            ids.check_packed(x.shape)
            return ids.groups
        per_example = training and config.noise == "example"
        rows = x.shape[0]
        if per_example and ids.batch is None:
            if self.forward.repeated is None or self.forward.repeated.batch != rows:
                self.forward.repeated = ids.repeated(rows)
            ids = self.forward.repeated
        if ids.n_distinct > 1 or per_example:
            flattened = x.dim() == 2 and ids.batch and rows // ids.batch in self.forward.lengths
            ids.check_rows(rows, self.generating or bool(flattened), "a layer's input")
        return ids.examples if per_example else ids.groups

    def single(self, config: MHRConfig, device: torch.device) -> Groups:
        """The one row that all of the current ids mean: what merging needs.

        Raises: RoutingError: if they mean several, or there are none.
        """
        ids = self.ids or (Ids([0], None, None, device) if config.n_tasks == 1 else None)
        if ids is None or ids.n_distinct > 1:
            raise RoutingError(
                "Merging puts one task into the weights, but the model has ids of"
                f" {ids.n_distinct if ids else 0} tasks. Call thawline.set_task_ids(model, task) with one id"
                " or name."
            )
        ids.check_table(config.n_tasks or 1)
        return ids.groups

    def forget(self, adapter_name: str) -> None:
        """An adapter is gone."""
        self.plans = None
        self.bins = {key: router for key, router in self.bins.items() if key[0] != adapter_name}


class Carrying:
    """A checkpoint function whose recomputation sees the forward that it recomputes."""

    def __init__(self, checkpoint: Callable[..., Any], shared: TaskIds) -> None:
        self.checkpoint, self.shared = checkpoint, shared

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        shared, forward = self.shared, self.shared.forward

        def resumed(*inputs: Any) -> Any:
            current, shared.forward = shared.forward, forward
            try:
                return function(*inputs)
            finally:
                shared.forward = current

        return self.checkpoint(resumed, *args, **kwargs)


class Kind:
    """Places whose skills and tables have the same shapes, and which are mixed in one go."""

    def __init__(self, places: list[Place], dtype: torch.dtype, scale: float) -> None:
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
        self.places = [
            (layer, name) for layer in layers if name in layer.routers and name in layer.active_adapters
        ]
        kinds: dict[Any, list[Place]] = {}
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
