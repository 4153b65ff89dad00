"""What all MHR layers of a model share: the task ids, and what is worked out from them once a forward.

Nothing here hangs on hooks that end with the forward: gradient checkpointing runs layers again in the
backward, with the ids, the noise and the mixtures that their own forward had, even if another forward came
between (checkpointing.py).
"""

from __future__ import annotations

__all__ = ["Forward", "Mixture", "Place", "TaskIds"]

from threading import get_ident
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from thawline.errors import RoutingError
from thawline.ops.mixing import FrozenLinear
from thawline.tuners.mhr.config import MHRConfig
from thawline.tuners.mhr.ids import Groups, Ids
from thawline.tuners.mhr.routing import Router

Place = tuple[nn.Module, str]
"""A layer, and which of its adapters."""

ONE_THREAD = (
    "Another thread is running this model, and would get these task ids. Ids belong to the model: let one"
    " thread at a time give ids and run it, or give each thread a copy (copy.deepcopy(model))."
)
MISSING = (
    "No task ids: the routing table has {n} rows. Call thawline.set_task_ids(model, ids) before the forward,"
    " or"
    " thawline.route_by_batch(model) once and pass task_ids with every batch."
)
DROPPED = (
    "No task ids came with the batch: the routing table has {n} rows. A Trainer keeps the column task_ids"
    " with TrainingArguments(remove_unused_columns=False), and with a data collator that keeps it."
)


class Mixture(NamedTuple):
    """Mixed factors, the groups they are for, and the frozen linear they are to be added to.

    The linear is looked at where mixtures are made: all layers in a row cost less than each in its turn.
    `weight` is its parameter, `base` what to run; `None` where it may be more than a frozen linear.
    """

    groups: Groups
    A: Tensor
    B: Tensor
    weight: Tensor | None = None
    base: FrozenLinear | None = None


class Forward:
    """What belongs to one forward: ids, noise and mixtures. Copies begin without the latter two."""

    def __init__(self, ids: Ids | None = None, lengths: frozenset[int] = frozenset()) -> None:
        self.ids = ids
        self.lengths = lengths
        """Tokens per row, for layers that see rows and tokens flattened into one axis."""
        self.noise: dict[Place, Tensor] = {}
        self.mixtures: dict[Place, Mixture] = {}
        self.differentiates = True
        """Whether the mixtures are part of a graph: made for training, or kept in evaluation."""
        self.rows: int | None = None
        """Rows that a layer's input must have for its mixture to fit; `None`: any number."""
        self.repeated: Ids | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self.ids, self.lengths)


State = tuple[Forward, bool, tuple[tuple[int, Forward, bool], ...]]


class TaskIds:
    """The current ids of a model, shared by all its MHR layers."""

    def __init__(self) -> None:
        self.configs: dict[str, MHRConfig] = {}
        """Of every adapter, the same dict as PEFT's own: a config is replaced there, not changed."""
        self.bins: dict[tuple[str, str], Router] = {}
        """Routing tables by adapter and by the part of the model that shares one."""
        self.layers: list[BaseTunerLayer] = []
        self.forward = Forward()
        self.running = False
        """Whether the model's forward is under way."""
        self.under_way: list[tuple[int, Forward, bool]] = []
        """Thread, ids and `from_batch` of each: several where the model is called within its own forward.
        One that Ctrl-C ended stays until ids are set by hand, and changes none that come later."""
        self.generating = False
        """Whether `generate` is, which repeats rows."""
        self.reads_batch = False
        """Whether `route_by_batch` is on."""
        self.from_batch = False
        """Whether the ids came with a batch, and so are no one else's."""
        self.arrived: int | None = None
        """The thread with whose batch they came, until its forward begins."""
        self.n_changes = 0
        """How often adapters were chosen, changed or removed."""
        self.n_evals = 0
        """How often layers were told to evaluate: what was kept before may be stale."""
        self._active: tuple[int, list[str]] = -1, []

    @property
    def ids(self) -> Ids | None:
        """Of the forward under way, or the next one."""
        return self.forward.ids

    @ids.setter
    def ids(self, ids: Ids | None) -> None:
        self.forward = Forward(ids)

    def active(self) -> list[str]:
        """The adapters that layers use; after one was deleted, layers may differ in what is left to them."""
        if self._active[0] != self.n_changes:
            used = [name for layer in self.layers for name in layer.active_adapters if name in layer.mhr_A]
            self._active = self.n_changes, [name for name in dict.fromkeys(used) if name in self.configs]
        return self._active[1]

    def is_routed(self) -> bool:
        """Whether any layer is going to look at ids."""
        first = self.layers[0]
        if first.disable_adapters or first.merged:
            return False
        return any(self.configs[name].router != "uniform" for name in self.active())

    def check_present(self) -> None:
        """Raises: RoutingError: if an active adapter needs ids and has none, or those of another's names."""
        ids = self.ids
        for name in self.active():
            config = self.configs[name]
            if config.router == "uniform":
                continue
            if ids is None and config.n_tasks != 1:
                raise RoutingError((DROPPED if self.reads_batch else MISSING).format(n=config.n_tasks))
            if ids is not None and ids.names and config.task_names and config.task_names != ids.names:
                raise RoutingError(
                    f"The task ids were given by name, of another list of tasks than adapter {name!r} has."
                    " Call thawline.set_task_ids again after set_adapter."
                )

    def check_thread(self) -> None:
        """Raises: RoutingError: if a forward is under way in another thread."""
        if self.under_way and self.under_way[0][0] != get_ident():
            raise RoutingError(ONE_THREAD)

    def state(self) -> State:
        """What `restore` puts back."""
        return self.forward, self.from_batch, tuple(self.under_way)

    def restore(self, state: State) -> None:
        """The ids of before, in the forwards that were under way."""
        self.forward, self.from_batch, self.under_way[:] = state
        self.running = bool(self.under_way)

    # A forward.

    def check(self, inputs: Tensor | None) -> None:
        """Check the ids against the first inputs (rows, ...) of the forward that begins.

        Args:
            inputs: `None` where no argument is a tensor: the layers check their own rows then.
        Raises: RoutingError: for other rows, or packed ids for other tokens, than the batch has, or no ids.
        """
        ids = self.ids
        self.check_present()
        if ids is not None and inputs is not None:
            ids.check_rows(inputs.shape[0], self.generating, "the batch")
            if ids.tokens is not None and tuple(inputs.shape[1:2]) != (ids.tokens,):
                raise RoutingError(
                    f"Task ids for {ids.tokens} tokens per row, but the batch has {tuple(inputs.shape)}."
                    " Give one id"
                    " per token, or one per row."
                )

    def begin(self, inputs: Tensor | None) -> None:
        """Start a forward with the ids that there are, and nothing of the last one's."""
        self.forward = Forward(self.ids, frozenset(() if inputs is None else inputs.shape[1:2]))
        if self.under_way:
            self.under_way[-1] = self.under_way[-1][0], self.forward, self.from_batch

    def enter(self) -> None:
        """A forward of the model runs from now on.

        Raises: RoutingError: if another thread runs one, or gave ids after this thread did.
        """
        mine = get_ident(), self.forward, self.from_batch
        self.under_way.append(mine)
        if self.under_way[0][0] != mine[0] or self.arrived not in (None, mine[0]):
            self.under_way.remove(mine)
            raise RoutingError(ONE_THREAD)

    def leave(self) -> None:
        """It has ended. A forward within which it ran goes on as it was."""
        if self.under_way and self.under_way[-1][0] == get_ident():
            self.under_way.pop()
            if self.under_way:
                _, self.forward, self.from_batch = self.under_way[-1]
        self.running = bool(self.under_way)

    def take(self, place: Place, groups: Groups, dtype: torch.dtype) -> Mixture | None:
        """The mixture made for this place at the forward's beginning, if it is still good.

        Without gradients a layer in training is inside a reentrant checkpoint, whose backward runs through a
        graph of its own: the layer must mix by itself there, now and then. A layer that is called by itself,
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
            ids = self.forward.ids = Ids([0], None, None, x.device)
        ids.check_table(config.n_tasks or 1)
        if ids.tokens is not None:
            if x.is_floating_point():  # the model's own inputs may be token numbers, without features
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
        self.n_changes += 1
        if not self.active():
            self.ids = None  # they are not those of an adapter to come
        self.bins = {key: router for key, router in self.bins.items() if key[0] != adapter_name}
