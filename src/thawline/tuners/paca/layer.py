"""PaCA layers: a frozen Linear, Conv1D or Conv2d, some columns of whose weight are trained.

The base layer's forward runs untouched, with the changed columns inside its weight; `tap_columns` on its
output gives them their gradient. An adapter is δ, the change of the columns in fp32, and the column indices.
A layer whose weight must not be written, and any layer when rows of a batch use different adapters, adds the
product of the changed columns to the output instead (`additive`).

When the columns are written into the weight:
 · right after the step of an optimiser that holds δ, and after load_state_dict, set_adapter, enabling,
   scaling and merging;
 · before a forward, if a backward or a switch of mode came since the last write (optimisers may write `.data`
   or step a copy), or if δ, its indices or its scale are visibly not those written.
The plainer rule, before every forward in training, costs no measurable time: one write of all columns is
0.5 % of a forward and backward (benchmark case `reference`, one CPU thread), and 16 paired rounds could not
tell the rules apart. It is not used because it saves little: a forward cannot write under torch.compile,
nor where FSDP2 shows it a gathered copy of the weight, and in evaluation a write would take 55 % of
decoding one token.

The weight is the original again, bit for bit, while adapters are disabled and in every state dict, copy and
pickle.
"""

from __future__ import annotations

__all__ = [
    "ASKED_FOR",
    "LAYERS",
    "PacaConv2d",
    "PacaExpertsLinear",
    "PacaLayer",
    "PacaLinear",
    "check_index",
    "layer_class",
]

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers.pytorch_utils import Conv1D

from thawline.errors import CheckpointError, ConfigError
from thawline.ops.dequantised_linear import dequantised_linear
from thawline.ops.grouped import add_grouped_columns, tap_grouped_columns
from thawline.ops.partial_conv import ConvGeometry, add_channels, conv_columns, tap_channels
from thawline.ops.partial_linear import add_columns, split_columns, tap_columns
from thawline.tuners._scaling import ScaledLayer
from thawline.tuners._steps import watch
from thawline.tuners._tuner import BROKEN, OFFLOADED
from thawline.tuners.experts import ExpertsLinear
from thawline.tuners.paca.quantised import dequantise, is_dequantisable, plain_linear, quantise_again
from thawline.tuners.paca.resident import Change, Resident, is_sharded
from thawline.tuners.paca.weights import HALF

ASKED_FOR = "mode='additive'."
"""Why a layer applies columns beside its weight, if not because it must."""


class WriteState:
    """Write state of a layer's weight. A separate object, because setting a module's attribute is slow."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.wanted: tuple[str, ...] = ()  # adapters whose columns the weight should hold
        self.inside: tuple[str, ...] = ()  # adapters whose columns were written last
        self.trained: tuple[str, ...] = ()  # adapters whose columns in the weight forward gives a gradient
        self.added: tuple[str, ...] = ()  # adapters that forward applies beside the weight
        self.rows: tuple[str, ...] | None = None  # the adapter of each row, within `adapter_names`
        self.stale = True  # δ may have changed unseen since the last write
        self.sharded = False  # FSDP2 has sharded the weight: in forward it shows a gathered copy
        self.compiled = False  # forward was compiled: it cannot write
        self.released = False  # the base layer was given back by unload() or merge_and_unload()


class PacaLayer(nn.Module, ScaledLayer, BaseTunerLayer):
    """A frozen layer and the adapters that train some of its columns.

    Args:
        base_layer: the layer, of the type the subclass is for.
        name: its name in the model, for messages.
        additive: why columns are applied beside the weight. None: they are written into it.
    Attributes:
        in_features, out_features: sizes of the base layer; of a convolution, its channels.
        shape: of the weight with its input features on axis 1, (O, I, ...), however it is stored.
        is_quantised: whether columns are written into a dequantised copy of the weight, for each product.
    """

    adapter_layer_names = ("thawline_paca_delta",)
    other_param_names = ("r", "scaling", "base_scaling", "thawline_paca_indices", "thawline_paca_start")
    _tap: Callable[..., Tensor]  # gives δ its gradient; see `tap_columns`

    def __init__(self, base_layer: nn.Module, name: str, additive: str | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.additive = additive
        self.is_quantised = is_dequantisable(base_layer)
        self.columns_of = column_view(base_layer)
        self.shape = shape_of(base_layer)
        if isinstance(base_layer, nn.Conv2d):
            self.in_features, self.out_features = base_layer.in_channels, base_layer.out_channels
        else:
            self.in_features = self.shape[1]
            self.out_features = self.shape[2 if isinstance(base_layer, ExpertsLinear) else 0]
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.base_scaling: dict[str, float] = {}
        self.thawline_paca_delta = nn.ParameterDict()
        self.thawline_paca_indices = BufferDict(persistent=True)
        self.thawline_paca_start = BufferDict(persistent=False)  # columns to start from that are not its own
        self._read_start: dict[str, Callable[[Tensor], Tensor]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._state = WriteState(Resident(name, self.columns_of))
        watch(self)
        self.register_state_dict_post_hook(_put_original_weight)
        self.register_load_state_dict_post_hook(_after_load)

    @abstractmethod
    def low_rank_factors(self, adapter_name: str, task: str | int | None = None) -> tuple[Tensor, Tensor]:
        """Return the adapter as the weights (A, B) of an equal stock LoRA, its scale within B.

        Raises: ConfigError: if no LoRA is equal.
        """

    @abstractmethod
    def _run_additive(
        self, x: Tensor, parts: list[tuple[Change, Tensor | None]], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the base layer's output with changes added, each to all rows or to those of its index."""

    # Forward.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output; its gradient reaches the active adapters' columns."""
        state, on_backward = self._state, None
        if state.rows is not None or state.added or self.is_quantised:
            return self._run_additive(x, self._parts(x), *args, **kwargs)
        if torch.compiler.is_compiling():
            state.compiled = True
        else:
            if state.stale or not state.resident.holds(self._weight(), self._changes()):
                self.write()
                self._check_there(x, state.wanted)
            # Built per call: kept on the layer, it would be a reference cycle.
            on_backward = partial(self._before_backward, state.wanted)
        y = self.base_layer(x, *args, **kwargs)
        if state.trained and torch.is_grad_enabled():
            deltas, indices = self._tensors()
            for name in state.trained:
                if deltas[name].requires_grad:
                    y = self._tap(
                        y, x, deltas[name], indices[name], *args, scale=self.scaling[name],
                        on_backward=on_backward,
                    )  # fmt: skip
        return y

    def _tensors(self) -> tuple[Any, Any]:
        """Return δ and the column indices by adapter, bypassing nn.Module's slow __getattr__."""
        modules = self._modules
        return modules["thawline_paca_delta"]._parameters, modules["thawline_paca_indices"]._buffers

    def _weight(self) -> Any:
        return self._modules["base_layer"]._parameters.get("weight")

    def _changes(self, names: Iterable[str] | None = None) -> list[Change]:
        deltas, indices = self._tensors()
        names = self._state.wanted if names is None else names
        return [Change(deltas[name], indices[name], self.scaling[name]) for name in names]

    def _parts(self, x: Tensor) -> list[tuple[Change, Tensor | None]]:
        """Return the changes to apply beside the weight, and the rows of `x` that each is for (None: all)."""
        state = self._state
        self._check_there(x, state.added if state.rows is None else tuple(self.thawline_paca_delta))
        if state.rows is None:
            return [(change, None) for change in self._changes(state.added)]
        self.evict()  # the next plain forward writes again
        if len(x) % len(state.rows) or (x.dim() == 2 and len(x) != len(state.rows)):
            raise ConfigError(
                f"adapter_names has {len(state.rows)} rows, but '{self.name}' gets inputs {tuple(x.shape)}: "
                "it cannot be told which row each belongs to. Run the rows of each adapter apart."
            )
        rows = torch.arange(len(x), device=x.device) * len(state.rows) // len(x)
        parts: list[tuple[Change, Tensor | None]] = []
        for name in dict.fromkeys(state.rows):
            if name in self.thawline_paca_delta:
                mine = torch.tensor([row == name for row in state.rows], device=x.device)
                parts.append((self._whole_change(name), mine[rows].nonzero().flatten()))
        return parts

    def _whole_change(self, name: str) -> Change:
        """Return an adapter's change of the base's columns, the step to where it started included."""
        (change,) = self._changes([name])
        if name not in self.thawline_paca_start:
            return change
        own = dequantise(self.base_layer).index_select(1, change.index)
        step = self.thawline_paca_start[name].float() - own.float()
        return Change(change.delta * change.scale + step, change.index, 1.0)

    def _floats(self, names: Iterable[str]) -> Tensor:
        """Return the dequantised weight, with the columns that these adapters start from."""
        weight, starts = dequantise(self.base_layer), self._modules["thawline_paca_start"]._buffers
        for name in names:
            if name in starts:
                index = self.thawline_paca_indices[name]
                weight.index_copy_(1, index, starts[name].to(weight.dtype))
        return weight

    def use_for_rows(self, adapter_names: Sequence[str] | None) -> None:
        """Apply to each row of the next inputs the adapter of its name; None: the active ones to all."""
        self._state.rows = None if adapter_names is None else tuple(adapter_names)
        self._state.stale = True

    def columns(self) -> Tensor:
        """Return the weight to choose columns from, inputs on axis 1: on meta, where it cannot be read."""
        if self.is_quantised:
            return dequantise(self.base_layer)
        if self.additive in (None, ASKED_FOR):
            return self.columns_of(self.base_layer.weight)
        return torch.empty(self.shape, device="meta")

    def start_columns(self, adapter_name: str) -> Tensor | None:
        """Return the columns that an adapter starts from, (O, R, ...). None: they cannot be read."""
        index = self.thawline_paca_indices[adapter_name]
        if adapter_name in self.thawline_paca_start:
            return self.thawline_paca_start[adapter_name]
        if self.is_quantised:
            return self.columns().index_select(1, index)
        weight = self._weight()
        is_there = self.additive in (None, ASKED_FOR) and not (is_sharded(weight) or is_fake(weight))
        is_there = is_there and not (weight.is_meta or index.is_meta)
        return self._state.resident.original_columns(weight, index) if is_there else None

    # Adapters: adding, choosing, removing.

    def update_layer(
        self,
        adapter_name: str,
        index: Tensor,
        scale: float,
        init_weights: bool,
        inference_mode: bool = False,
        read_start: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Add an adapter on the columns `index`, or replace the one of the same name.

        Args:
            read_start: returns the columns of an index, (O, R), as they are to start. None: as they are.
        """
        device = device_of(self.base_layer)
        if adapter_name in self.thawline_paca_delta:
            self.evict()
        self.r[adapter_name] = len(index)
        self.scaling[adapter_name] = self.base_scaling[adapter_name] = scale
        self.thawline_paca_indices[adapter_name] = index.to(device)
        if read_start is not None:
            self._read_start[adapter_name] = read_start
        self._load_starts()
        shape = (self.shape[0], len(index), *self.shape[2:])
        is_double = getattr(self._weight(), "dtype", None) is torch.float64
        delta = torch.zeros(shape, dtype=torch.float64 if is_double else torch.float32, device=device)
        if not init_weights:
            delta.normal_(std=0.02)
        self.thawline_paca_delta[adapter_name] = nn.Parameter(delta)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _load_starts(self) -> None:
        for name, read in self._read_start.items():
            index = self.thawline_paca_indices[name]
            if not index.is_meta:
                self.thawline_paca_start[name] = read(index).to(index.device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active, trainable ones, and write their columns."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """Write the active adapters' columns, or restore the original weight."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self._refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Take the adapter's columns out of the weight and delete it."""
        self.evict()
        self._read_start.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        self._refresh()

    def _rescale(self, adapter_names: Iterable[str], scale_of: Callable[[str], float]) -> None:
        super()._rescale(adapter_names, scale_of)
        self.write()

    # Merging: the columns are in the weight already, so only a flag changes.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the adapters' columns in the weight and stop training them.

        Raises: ConfigError: if the weight must not be written; with `safe_merge`, if the merged columns hold
            NaN or infinity.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.thawline_paca_delta]
        if not names:
            return
        self.check_mergeable()
        self.merged_adapters = [*self.merged_adapters, *names]
        self._refresh()
        if safe_merge and not self._state.resident.is_finite():
            self.merged_adapters = self.merged_adapters[: -len(names)]
            self._refresh()
            raise ConfigError(BROKEN.format(", ".join(names), self.name))

    def check_mergeable(self) -> None:
        """Raise ConfigError if the weight must not be written."""
        if self.is_quantised:
            raise ConfigError(
                f"'{self.name}' is quantised: merging into it would round its other columns again. "
                "merge_and_unload writes bfloat16 layers, merge_and_requantise does it; to_lora works too."
            )
        if self.additive not in (None, ASKED_FOR):
            raise ConfigError(f"'{self.name}' cannot be merged. {self.additive} thawline.to_lora works.")

    def unmerge(self) -> None:
        """Return to the active adapters."""
        self.merged_adapters = []
        self._refresh()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, with the columns written permanently or with its original weight."""
        if merge and self.is_quantised:
            return self._dequantised(check_adapters_to_merge(self, adapter_names), safe_merge)
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if merge and self.merged:
            self.write()  # pickling may have evicted the columns of merged adapters
            self._state.resident.forget()
        else:  # none of the merged adapters may be in this layer, and the active one in it
            self.evict()
        self._state.released = True
        return self.base_layer

    def _dequantised(self, adapter_names: Sequence[str], safe_merge: bool) -> nn.Linear:
        """Return a plain layer in bfloat16 with the adapters' columns written."""
        return plain_linear(self.merged_floats(adapter_names, safe_merge), self.base_layer.bias)

    def merged_floats(self, adapter_names: Sequence[str], safe_merge: bool = False) -> Tensor:
        """Return the dequantised weight with the adapters' columns written, in fp32.

        Raises: ConfigError: with `safe_merge`, for NaN or infinity.
        """
        names = [name for name in adapter_names if name in self.thawline_paca_delta]
        weight = self._floats(names).float()
        for delta, index, scale in self._changes(names):
            weight.index_add_(1, index, delta.detach().float(), alpha=scale)
        if safe_merge and not torch.isfinite(weight).all():
            raise ConfigError(BROKEN.format(", ".join(adapter_names), self.name))
        return weight

    def quantise_again(self) -> None:
        """Put the active adapters into the quantised weight, and set their changes to zero."""
        names = [name for name in self.active_adapters if name in self.thawline_paca_delta]
        quantise_again(self.base_layer, self.merged_floats(names))
        for name in names:
            self.thawline_paca_delta[name].data.zero_()
            if name in self.thawline_paca_start:
                del self.thawline_paca_start[name], self._read_start[name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the adapter's change of the weight, in the weight's shape and δ's dtype."""
        delta, index, scale = self._whole_change(adapter)
        stored = self.shape if self.columns_of is _as_stored else self.base_layer.weight.shape
        change = torch.zeros(stored, dtype=delta.dtype, device=delta.device)
        self.columns_of(change).index_copy_(1, index, delta.detach() * scale)
        return change

    def _scaled_delta(self, adapter_name: str, task: str | int | None) -> tuple[Tensor, Tensor]:
        if task is not None:
            raise ConfigError(f"task={task!r}: a PaCA adapter serves one task. Leave `task` out.")
        delta, index, scale = self._whole_change(adapter_name)
        delta = delta.detach()
        return (delta.full_tensor() if is_sharded(delta) else delta) * scale, index

    # Writing the columns into the weight, and taking them out.

    def write(self) -> None:
        """Write the columns of the wanted adapters into the weight."""
        state = self._state
        if not (state.wanted or state.inside):
            state.stale = False
            return
        weight, changes = self._weight(), self._changes()
        if state.released or self._is_gathered(weight):
            return
        if any(change.delta.is_meta or is_fake(change.delta) for change in changes):
            return  # no data: _after_load or the next forward writes
        if not state.resident.is_in(weight):
            self._check_in_place(weight)
        state.resident.install(weight, changes)
        state.inside, state.stale = state.wanted, False

    @property
    def holds_columns(self) -> bool:
        """Return whether the layer's weight is its own to write: then no other model may hold it."""
        if self.additive is not None or self.is_quantised or self._state.released:
            return False
        weight = self.base_layer.weight
        return not (weight.is_meta or is_fake(weight))  # without data there is none to share

    @property
    def wanted_adapters(self) -> tuple[str, ...]:
        """Names of the adapters whose columns the weight should hold: the merged or the active ones."""
        return self._state.wanted

    def resident_columns(self) -> tuple[Tensor, Tensor]:
        """Return the weight with its columns written, and which columns those are: (R,), sorted.

        Raises: ConfigError: if the layer applies columns beside its weight.
        """
        if self._state.added:
            reason = "It is quantised." if self.is_quantised else self.additive
            raise ConfigError(f"The weight of '{self.name}' holds no columns: they are added. {reason}")
        self.write()
        weight = self.base_layer.weight
        self._check_not_gathered()
        return weight, self._state.resident.index(weight)

    def evict(self) -> None:
        """Restore every bit of the original weight; the next forward writes the columns again."""
        state = self._state
        if not state.released and state.inside:
            self._check_not_gathered()
            state.resident.evict(self.base_layer.weight)
            state.inside = ()

    def after_step(self, moved: set[int]) -> None:
        """Write if an optimiser stepped that holds δ, or any where the next forward cannot write.

        Args:
            moved: ids of the optimiser's parameters.
        """
        state, (deltas, _) = self._state, self._tensors()
        if not (state.wanted or state.inside):
            return
        state.sharded = is_sharded(self.base_layer.weight)
        if state.sharded or state.compiled or any(id(deltas[name]) in moved for name in state.wanted):
            self.write()

    def _refresh(self) -> None:
        """Recompute the active adapters and write their columns into the weight."""
        state = self._state
        if self.merged:  # also while disabled: merge_and_unload asks for the adapters, not the base
            names = self.merged_adapters
        else:
            names = [] if self._disable_adapters else self.active_adapters
        names = [name for name in names if name in self.thawline_paca_delta]
        is_beside = (self.additive is not None or self.is_quantised) and not self.merged
        state.added = tuple(names) if is_beside else ()
        state.wanted = () if is_beside else tuple(names)
        state.trained = () if self.merged else state.wanted
        if state.inside != state.wanted:
            self._check_not_gathered()
        self.write()

    def _before_backward(self, inside: tuple[str, ...]) -> None:
        """Restore the columns that the forward used, before the base layer's own backward.

        A reference pass with adapters disabled, or another adapter's forward, may lie between the two.
        """
        state = self._state
        if state.inside != inside:
            wanted, state.wanted = state.wanted, inside
            self.write()
            state.wanted = wanted
        state.stale = True

    def _is_gathered(self, weight: Tensor) -> bool:
        """Return whether FSDP2 shows a gathered copy of the weight, which is freed after this forward.

        Such a copy is not written: `after_step` writes the shards, from which it was made.

        Raises: ConfigError: for a weight that other schemes have flattened or partitioned.
        """
        state = self._state
        is_distributed = torch.distributed.is_initialized()
        is_flat = weight.dim() == 1 or hasattr(weight, "_fsdp_flattened")
        if hasattr(weight, "ds_id") or is_flat or (is_distributed and type(weight) is Tensor):
            raise ConfigError(
                f"The weight of '{self.name}' was flattened or partitioned (FSDP1 or ZeRO-3). PaCA writes "
                "columns in place: attach it with mode='additive', or use FSDP2 (fsdp_version: 2), ZeRO-1, "
                "ZeRO-2 or DDP."
            )
        if is_sharded(weight):
            state.sharded = True
            return False
        return is_distributed and (state.sharded or state.resident.is_elsewhere(weight))

    def _check_not_gathered(self) -> None:
        if self._is_gathered(self.base_layer.weight):
            raise ConfigError(
                f"FSDP2 holds a gathered copy of the weight of '{self.name}', which cannot be kept equal to "
                "its shards. Call `reshard()` on the FSDP modules before switching, merging or saving "
                "adapters."
            )

    def _check_there(self, x: Tensor, names: Iterable[str]) -> None:
        if any(change.delta.is_meta for change in self._changes(names)) and not x.is_meta:
            raise ConfigError(OFFLOADED.format(self.name))

    def _check_in_place(self, weight: Tensor) -> None:
        if weight.is_meta:
            raise ConfigError(OFFLOADED.format(self.name))
        if is_sharded(weight) and self.columns_of is not _as_stored:
            raise ConfigError(
                f"'{self.name}' ({type(self.base_layer).__name__}) keeps its inputs on the sharded axis. Use "
                "DDP, or exclude the module."
            )

    # Moving, saving, loading and copying, all with the original weight.

    def train(self, mode: bool = True) -> PacaLayer:
        """Switch mode; an optimiser may have swapped parameters along with it."""
        if mode != self.training:
            self._state.stale = True
            if self._state.compiled:
                self.write()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PacaLayer:
        """Move or cast the layer. δ moves along but stays in fp32: 16 bits lose small steps."""
        self.evict()
        masters = {id(delta) for delta in self.thawline_paca_delta.values()}

        def keep_master(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in masters and moved.dtype in HALF else moved

        super()._apply(keep_master, recurse)
        self.write()
        return self

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Keep δ in `dtype`, where a user asks for that of the base (`autocast_adapter_dtype=False`)."""
        if adapter_name in self.thawline_paca_delta:
            delta = self.thawline_paca_delta[adapter_name]
            delta.data = delta.to(dtype)
            self.write()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move the adapter as PEFT does, but keep the dtype of δ."""
        device = device_of(self.base_layer) if device is None else device
        delta = self.thawline_paca_delta.get(adapter_name)
        if delta is not None and device.type != "meta" and not delta.is_meta:
            delta.data = delta.data.to(device)
            self.thawline_paca_indices[adapter_name] = self.thawline_paca_indices[adapter_name].to(device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.merged:
            self.write()
        elif self._next_forward_writes():
            self.evict()  # else _put_original_weight puts in a copy
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def check_columns(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Check the numbers of columns that `state_dict` has for this layer, under `prefix`.

        Raises: CheckpointError: for one that the layer cannot have.
        """
        for name in self.thawline_paca_delta:
            index = state_dict.get(f"{prefix}thawline_paca_indices.{name}")
            if index is not None and not index.is_meta:
                check_index(index, self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self.evict()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _next_forward_writes(self) -> bool:
        """Return whether the next forward writes evicted columns again; compiled and sharded ones do not."""
        return not (self._state.compiled or is_sharded(self._weight()))

    def __deepcopy__(self, memo: dict[int, Any]) -> PacaLayer:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__setstate__({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        self.write()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "_state"}
        if self._next_forward_writes():
            self.evict()
        else:
            base_layer = copy.deepcopy(self.base_layer)
            base_layer.weight.data = self._state.resident.original(self.base_layer.weight)
            state["_modules"] = {**self._modules, "base_layer": base_layer}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._state = WriteState(Resident(self.name, self.columns_of))
        watch(self)
        self._refresh()

    def __repr__(self) -> str:
        return f"thawline.{super().__repr__()}"


class PacaLinear(PacaLayer):
    """PaCA on `nn.Linear`, and on transformers' `Conv1D`, a Linear with its weight stored (I, O)."""

    _tap = staticmethod(tap_columns)

    def _run_additive(
        self, x: Tensor, parts: list[tuple[Change, Tensor | None]], *args: Any, **kwargs: Any
    ) -> Tensor:
        if self.is_quantised and all(rows is None for _, rows in parts):
            return self._run_quantised(x, [change for change, _ in parts], self._state.added)
        inputs = []
        for change, _ in parts:
            x, selected = split_columns(x, change.index.to(x.device))
            inputs.append(selected)
        y = self._run_quantised(x, []) if self.is_quantised else self.base_layer(x, *args, **kwargs)
        for (change, rows), selected in zip(parts, inputs, strict=True):
            if rows is None:
                y = add_columns(y, selected, change.delta, change.scale)
            else:
                mine = add_columns(y[rows], selected[rows], change.delta, change.scale)
                y = y.index_copy(0, rows, mine)
        return y

    def _run_quantised(self, x: Tensor, changes: list[Change], names: tuple[str, ...] = ()) -> Tensor:
        """Return the product with a dequantised copy; bitsandbytes' own forward in evaluation differs."""
        base, device = self.base_layer, x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return dequantised_linear(
            x, base.bias, partial(self._floats, names), [change.delta for change in changes],
            [change.index for change in changes], [change.scale for change in changes],
            autocast or getattr(base, "compute_dtype", None),
        )  # fmt: skip

    def low_rank_factors(self, adapter_name: str, task: str | int | None = None) -> tuple[Tensor, Tensor]:
        """Return A, which picks the columns (R, I), and B, their scaled change (O, R)."""
        delta, index = self._scaled_delta(adapter_name, task)
        n = self.shape[1]
        return nn.functional.one_hot(index, n).to(delta.dtype), delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: PEFT's convert_to_lora works; `thawline.to_lora` is exact."""
        return True


class PacaConv2d(PacaLayer):
    """PaCA on `nn.Conv2d`: columns are the filters that read a channel."""

    def __init__(self, base_layer: nn.Conv2d, name: str, additive: str | None = None) -> None:
        super().__init__(base_layer, name, additive)
        self._geometry = ConvGeometry.of(base_layer)
        self._tap = partial(tap_channels, geometry=self._geometry)

    def _run_additive(
        self, x: Tensor, parts: list[tuple[Change, Tensor | None]], *args: Any, **kwargs: Any
    ) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for (delta, index, scale), rows in parts:
            if rows is None:
                y = add_channels(y, x, delta, index, self._geometry, scale)
            else:
                y = y.index_copy(0, rows, add_channels(y[rows], x[rows], delta, index, self._geometry, scale))
        return y

    def low_rank_factors(self, adapter_name: str, task: str | int | None = None) -> tuple[Tensor, Tensor]:
        """Return A, which picks one channel at one place of the kernel, and B, its change.

        A is (R·K·K, C, K, K), B is (O, R·K·K, 1, 1).

        Raises: ConfigError: for groups, dilation and padding modes, which PEFT's LoRA of a convolution lacks.
        """
        conv = self.base_layer
        for field, plain in (("groups", 1), ("dilation", (1, 1)), ("padding_mode", "zeros")):
            if getattr(conv, field) != plain:
                raise ConfigError(
                    f"'{self.name}' has {field}={getattr(conv, field)}, which PEFT's LoRA of a convolution "
                    "cannot express. Use merge_and_unload, or train without this module."
                )
        delta, index = self._scaled_delta(adapter_name, task)
        kernel = delta.shape[2:]
        places = torch.eye(kernel.numel(), dtype=delta.dtype, device=index.device)
        channels = nn.functional.one_hot(index, conv.in_channels).to(delta.dtype)
        a = torch.einsum("rc,pk->rpck", channels, places).reshape(-1, conv.in_channels, *kernel)
        return a, delta.flatten(1)[:, :, None, None]


class PacaExpertsLinear(PacaLayer):
    """PaCA on one weight of fused experts: the same columns of every expert, δ is (E, R, O)."""

    _tap = staticmethod(tap_grouped_columns)

    def _parts(self, x: Tensor) -> list[tuple[Change, Tensor | None]]:
        if self._state.rows is not None:
            raise ConfigError(
                f"adapter_names: '{self.name}' gets tokens sorted by expert, and it cannot be told which row "
                "each belongs to. Run the rows of each adapter apart."
            )
        return super()._parts(x)

    def _run_additive(
        self, x: Tensor, parts: list[tuple[Change, Tensor | None]], *args: Any, **kwargs: Any
    ) -> Tensor:
        (ends,) = args
        inputs = []
        for change, _ in parts:
            x, selected = split_columns(x, change.index)
            inputs.append(selected)
        y = self.base_layer(x, ends)
        for ((delta, _, scale), _), selected in zip(parts, inputs, strict=True):
            y = add_grouped_columns(y, selected, delta, ends, scale)
        return y

    def low_rank_factors(self, adapter_name: str, task: str | int | None = None) -> tuple[Tensor, Tensor]:
        """Return A, which picks the columns for each expert (E·R, I), and B, their change (O, R·E).

        PEFT stores the rows of A by expert, and the columns of B by rank.
        """
        delta, index = self._scaled_delta(adapter_name, task)
        a = nn.functional.one_hot(index, self.shape[1]).to(delta.dtype)
        return a.repeat(len(delta), 1), delta.permute(2, 1, 0).flatten(1)


LAYERS: dict[type[nn.Module], type[PacaLayer]] = {
    nn.Linear: PacaLinear,
    Conv1D: PacaLinear,
    nn.Conv2d: PacaConv2d,
    ExpertsLinear: PacaExpertsLinear,
}


def layer_class(module: nn.Module) -> type[PacaLayer] | None:
    """Return the class that adapts a module: by its kind, or as a linear layer that only runs forward."""
    found = next((made for kind, made in LAYERS.items() if isinstance(module, kind)), None)
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return found or (PacaLinear if all(isinstance(size, int) for size in sizes) else None)


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """Return (O, I, ...) of a layer's weight, however it is stored: packed, partitioned or offloaded."""
    if isinstance(layer, nn.Conv2d | Conv1D | ExpertsLinear):
        return tuple(column_view(layer)(layer.weight).shape)
    return layer.out_features, layer.in_features


def device_of(layer: nn.Module) -> torch.device:
    """Return where a layer's adapter belongs: beside its weight, or where an offloaded one is run."""
    hook = getattr(layer, "_hf_hook", None)
    tensors = [*layer.parameters(), *layer.buffers()]
    device: torch.device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta" and (runs_on := getattr(hook, "execution_device", None)) is not None:
        return torch.device(runs_on)
    return device


def column_view(base_layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function that views a weight of this layer as (O, I, ...), selectable inputs on axis 1."""
    if isinstance(base_layer, Conv1D):
        return torch.t
    if isinstance(base_layer, ExpertsLinear):
        return base_layer.inputs_first
    if isinstance(base_layer, nn.Conv2d) and (geometry := ConvGeometry.of(base_layer)).depthwise:
        return partial(conv_columns, geometry=geometry)
    return _as_stored


def _as_stored(weight: Tensor) -> Tensor:
    return weight


def _put_original_weight(
    layer: PacaLayer, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Put a copy of the original weight into a state dict where the columns were not evicted."""
    key = f"{prefix}base_layer.weight"
    if key in state_dict and not layer.merged and not layer._next_forward_writes():
        state_dict[key] = layer._state.resident.original(layer.base_layer.weight)


def _after_load(layer: PacaLayer, incompatible_keys: Any) -> None:
    """Check the loaded indices and write. Raises: CheckpointError: as `check_index`."""
    for index in layer.thawline_paca_indices.values():
        if not index.is_meta:
            check_index(index, layer)
    layer._load_starts()
    layer.write()


def check_index(index: Tensor, layer: PacaLayer) -> None:
    """Check column indices of a file. Raises: CheckpointError: for columns the layer cannot have."""
    n, found = layer.shape[1], index.tolist()
    odd = [column for column in found if not 0 <= column < n]
    if odd:
        raise CheckpointError(
            f"The adapter names column {odd[0]} of '{layer.name}', which has {n} input features: it was made "
            "for another base model."
        )
    if len(set(found)) < len(found):
        raise CheckpointError(f"The adapter's column indices of '{layer.name}' repeat: the file is damaged.")
