"""State that all MHR layers of a model share: the current task ids, and what one forward makes from them.

The path of a task id: `set_task_ids`, or the batch (task_ids.py), gives ids that are read and checked once
(ids.py) and lie in a `Forward`. Where the model's forward begins, `Preparer.prepare` (prepare.py) adds noise
and mixed skills to it. Each layer takes its mixture from there, or mixes its skills itself (layer.py).

A `Forward` outlives the model's forward, because gradient checkpointing runs layers again in the backward,
with the ids, noise and mixtures of their own forward.
"""

from __future__ import annotations

__all__ = ["Forward", "Mixture", "Place", "RoutingState"]

from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thawline.errors import ConfigError, RoutingError
from thawline.tuners._tuner import OFFLOADED
from thawline.tuners.mhr.config import MHRConfig
from thawline.tuners.mhr.ids import Groups, Ids
from thawline.tuners.mhr.routing import Router

Place = tuple[nn.Module, str]
"""A layer and the name of one of its adapters."""

ONE_THREAD = (
    "Another thread is running this model and would use these task ids. Ids belong to the model: let one"
    " thread at a time set ids and run it, or give each thread a copy (copy.deepcopy(model))."
)
MISSING = (
    "No task ids: the routing table has {n} rows. Call thawline.set_task_ids(model, ids) before the forward,"
    " or thawline.route_by_batch(model) once and pass task_ids with every batch."
)
DROPPED = (
    "No task ids came with the batch: the routing table has {n} rows. A Trainer keeps the column task_ids"
    " with TrainingArguments(remove_unused_columns=False), and with a data collator that keeps it."
)


class Mixture(NamedTuple):
    """Mixed factors A (G, I, r) and B (G, O, r), scale included, and the groups of rows they are for."""

    groups: Groups
    A: Tensor
    B: Tensor


class Forward:
    """Ids, noise and mixtures of one forward of the model. Copies of it keep the ids only.

    Attributes:
        ids: task ids, or `None`.
        from_batch: the ids came with a batch, and serve no other.
        lengths: tokens per row, to recognise layers that see rows and tokens flattened into one axis.
        noise: logistic noise (U, H, S) by place.
        mixtures: mixed skills by place.
        grad_enabled: grad mode in which the mixtures were made, and so in which they may be used.
        keeps: layers leave the mixtures they make in `mixtures`, which later forwards share.
        rows: number of rows of a layer's input to which its mixture applies without another look at the ids.
    """

    def __init__(
        self, ids: Ids | None = None, from_batch: bool = False, lengths: frozenset[int] = frozenset()
    ) -> None:
        self.ids, self.from_batch, self.lengths = ids, from_batch, lengths
        self.noise: dict[Place, Tensor] = {}
        self.mixtures: dict[Place, Mixture] = {}
        self.grad_enabled = self.keeps = False
        self.rows: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self.ids, self.from_batch, self.lengths)


Running = tuple[int, Forward]
"""Thread and state of a forward that has begun and not ended."""


class RoutingState:
    """State of one model, shared by all its MHR layers.

    Attributes:
        configs: config of every adapter; PEFT's own dict, in which a config is replaced, never changed.
        tables: routing tables by adapter and by the part of the model that shares one.
        layers: all MHR layers, in the model's order.
        forward: state of the current forward, or of the next one.
        running: forwards that have begun and not ended, several where the model is called within its own
            forward. One that Ctrl-C interrupted stays until ids are set, and changes no later one.
        generating: `generate` is running, which repeats rows.
        reads_batch: `route_by_batch` is on.
        arrived: thread whose batch brought the ids, until its forward begins.
        n_changes: number of times that adapters were chosen, changed or removed, or layers switched between
            training and evaluation.
    """

    def __init__(self) -> None:
        self.configs: dict[str, MHRConfig] = {}
        self.tables: dict[tuple[str, str], Router] = {}
        self.layers: list[Any] = []
        self.forward = Forward()
        self.running: list[Running] = []
        self.generating = self.reads_batch = False
        self.arrived: int | None = None
        self.n_changes = 0
        self._active: tuple[int, list[str]] = -1, []

    # Adapters.

    def layers_of(self, adapter_name: str) -> list[Any]:
        """Return the layers that have this adapter."""
        return [layer for layer in self.layers if adapter_name in layer.routers]

    def tables_of(self, adapter_name: str) -> dict[str, Router]:
        """Return an adapter's routing tables by the part of the model that shares one."""
        return {part: router for (name, part), router in self.tables.items() if name == adapter_name}

    def active(self) -> list[str]:
        """Return the active adapters; after one was deleted, layers may differ in what is active."""
        if self._active[0] != self.n_changes:
            used = [name for layer in self.layers for name in layer.active_adapters if name in layer.mhr_A]
            self._active = self.n_changes, [name for name in dict.fromkeys(used) if name in self.configs]
        return self._active[1]

    def is_off(self) -> bool:
        """Return True if the layers run their base only: adapters are disabled, or merged into it."""
        return self.layers[0].disable_adapters or self.layers[0].merged

    def routed(self) -> dict[str, MHRConfig]:
        """Return the configs of the active adapters that need ids."""
        configs = {name: self.configs[name] for name in self.active()}
        return {name: config for name, config in configs.items() if config.router != "uniform"}

    def delete(self, adapter_name: str) -> None:
        """Remove an adapter's routing tables, and the ids if no adapter is left that they could be for."""
        self.n_changes += 1
        if not self.active():
            self.forward = Forward()
        self.tables = {key: router for key, router in self.tables.items() if key[0] != adapter_name}

    def device(self) -> torch.device:
        """Return the device of the first adapted layer."""
        return next(A for layer in self.layers for A in layer.mhr_A.values()).device

    # The model's forwards.

    def begin(self, inputs: Tensor | None) -> None:
        """Check the ids against the inputs (rows, ...) of a forward, and start its state.

        Args:
            inputs: first tensor with the batch's rows; `None` if no argument is one: layers check their own.
        Raises: RoutingError: if ids are missing, or their number of rows or tokens is not the batch's.
            ConfigError: if the skills were offloaded.
        """
        ids = self.forward.ids
        if not self.is_off() and self.routed():
            ids = self.current_ids()
            if inputs is not None:
                if self.device().type == "meta" and not inputs.is_meta:
                    raise ConfigError(OFFLOADED.format(self.layers[0].name))
                ids.check_rows(inputs.shape[0], self.generating, "the batch")
                if ids.tokens is not None and tuple(inputs.shape[1:2]) != (ids.tokens,):
                    raise RoutingError(
                        f"Task ids for {ids.tokens} tokens per row, but the batch has {tuple(inputs.shape)}."
                        " Give one id per token, or one per row."
                    )
        lengths = frozenset(() if inputs is None else inputs.shape[1:2])
        self.forward = Forward(ids, self.forward.from_batch, lengths)
        if self.running:
            self.running[-1] = self.running[-1][0], self.forward

    def enter(self) -> None:
        """Count a forward as running.

        Raises: RoutingError: if another thread runs one, or gave ids after this thread did.
        """
        thread = get_ident()
        self.running.append((thread, self.forward))
        if self.running[0][0] != thread or self.arrived not in (None, thread):
            self.running.remove((thread, self.forward))
            raise RoutingError(ONE_THREAD)

    def leave(self) -> None:
        """Count a forward as ended. The forward within which it ran, if any, goes on as it was."""
        if self.running and self.running[-1][0] == get_ident():
            self.running.pop()
            if self.running:
                self.forward = self.running[-1][1]

    def check_thread(self) -> None:
        """Raises: RoutingError: if a forward is running in another thread."""
        if self.running and self.running[0][0] != get_ident():
            raise RoutingError(ONE_THREAD)

    # Ids, as the layers use them.

    def check_present(self) -> None:
        """Raises: RoutingError: if an active adapter needs ids and has none, or those of other task names."""
        ids = self.forward.ids
        for name, config in self.routed().items():
            if ids is None and config.n_tasks != 1:
                raise RoutingError((DROPPED if self.reads_batch else MISSING).format(n=config.n_tasks))
            if ids is not None and ids.names and config.task_names and config.task_names != ids.names:
                raise RoutingError(
                    f"The task ids were given by name, of another list of tasks than adapter {name!r} has."
                    " Call thawline.set_task_ids again after set_adapter."
                )

    def current_ids(self) -> Ids:
        """Return the ids; without any, id 0 of a table with a single row.

        Raises: RoutingError: if ids are missing, or those of other task names.
        """
        self.check_present()
        if self.forward.ids is None:
            self.forward.ids = Ids([0], None, None, self.device())
        return self.forward.ids

    def groups(self, x: Tensor, config: MHRConfig, training: bool) -> Groups:
        """Return the groups that the rows of `x` (rows, ..., I) fall into.

        Raises: RoutingError: if ids are missing, or do not fit the shape of x.
        """
        ids = self.forward.ids or self.current_ids()
        ids.check_table(config.n_tasks or 1)
        if ids.tokens is not None:
            if x.is_floating_point():  # the model's own inputs may be token numbers, without features
                ids.check_packed(x.shape)
            return ids.groups
        per_example, rows = training and config.noise == "example", x.shape[0]
        if ids.n_distinct > 1 or per_example:
            flattened = x.dim() == 2 and ids.batch and rows // ids.batch in self.forward.lengths
            ids.check_rows(rows, self.generating or bool(flattened), "a layer's input")
        return ids.examples(rows) if per_example else ids.groups

    def single_task(self, config: MHRConfig) -> Groups:
        """Return the one routing row that all current ids stand for, as merging needs it.

        Raises: RoutingError: if they stand for several, or there are none.
        """
        ids = self.forward.ids or (self.current_ids() if config.n_tasks == 1 else None)
        if ids is None or ids.n_distinct > 1:
            raise RoutingError(
                "Merging puts one task into the weights, but the model has ids of"
                f" {ids.n_distinct if ids else 0} tasks. Call thawline.set_task_ids(model, task) with one id"
                " or name."
            )
        ids.check_table(config.n_tasks or 1)
        return ids.groups

    # Mixtures, as the layers use them.

    def prepared(self, place: Place, groups: Groups, dtype: torch.dtype) -> Mixture | None:
        """Return the forward's mixture for a place, if it may still be used.

        In another grad mode a layer must mix by itself, now and in the backward: it is inside a reentrant
        checkpoint, whose backward runs through a graph of its own. A layer that is called by itself, outside
        the model's forward and its backward, finds a graph that may have been freed, and starts afresh.
        """
        forward = self.forward
        if torch.is_grad_enabled() is not forward.grad_enabled:
            forward.mixtures.pop(place, None)
        found = forward.mixtures.get(place)
        if found is None or found.groups is not groups or found.A.dtype is not dtype:
            return None
        if self.running or torch._C._current_graph_task_id() != -1:
            return found
        self.forward = Forward(forward.ids, forward.from_batch, forward.lengths)
        return None
