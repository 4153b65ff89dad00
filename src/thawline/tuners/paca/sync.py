"""Send adapted columns to another copy of the base: an inference engine, another process, another dtype.

Rollouts need the trained weights in the model that generates. With LoRA the adapter is merged, the merged
model sent, and the adapter unmerged, which rounds the weights each time. Columns are in the weights already:
`pack_columns` reads them, `apply_columns` writes them, and the receiver's weights equal the merged ones.

A pack is a flat dict of tensors, ready for safetensors. For a weight called W in the plain base model:

    W.columns             (R,), int64: positions on axis 1
    W.rows                on axis 0, where the weight is stored (in, out) (Conv1D) or has a filter per channel
                          (depthwise convolution)
    W.inputs              on axis 2, of experts in one weight
    W.values              what stands there, in the weight's dtype
    W.kept                positions sent earlier, which still stand (only with `since`)
"""

from __future__ import annotations

__all__ = ["apply_columns", "pack_columns"]

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from thawline.errors import ConfigError, did_you_mean
from thawline.ops.partial_conv import ConvGeometry
from thawline.tuners._names import plain_name, unwrapped
from thawline.tuners.experts import ExpertsLinear
from thawline.tuners.paca.layer import PacaLayer
from thawline.tuners.paca.weights import FLOATS

AXIS_NAMES = ("rows", "columns", "inputs")
FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 2),
    "v_proj": ("qkv_proj", 1),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Layer → the fused one that holds it in vLLM and SGLang, and how many of its own heights it begins before
the end (0: at the start). Keys and values are of one height, gate and up too."""


class Part(NamedTuple):
    """The columns of one weight in a pack."""

    axis: int
    index: Tensor
    values: Tensor
    kept: Tensor


@torch.no_grad()
def pack_columns(model: nn.Module, since: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the adapted columns as they stand in the weights: of the active or merged PaCA adapters.

    With FSDP2 every process must call it; each gets the whole columns.

    Args:
        model: with PaCA adapters; may be wrapped by DDP or torch.compile.
        since: the pack that the receiver applied last. Then only columns that changed since, those that a
            switched or disabled adapter gave back included.
    Returns: a flat dict of tensors for `apply_columns`, on the model's device; see this module.
    Raises: ConfigError: for a model without PaCA layers, an adapter that trains more than columns (biases,
        modules in full, tokens), or a `since` of another model.
    """
    model = unwrapped(model)
    layers = {_weight_name(path, m): m for path, m in model.named_modules() if isinstance(m, PacaLayer)}
    if not layers:
        raise ConfigError("The model has no PaCA layers. Pack before merge_and_unload or unload.")
    _check_columns_only(model, {name for layer in layers.values() for name in layer.wanted_adapters})
    earlier = _parts(since or {})
    if unknown := sorted(earlier.keys() - layers.keys()):
        raise ConfigError(f"`since` has '{unknown[0]}', which is no adapted weight of this model.")
    packed: dict[str, Tensor] = {}
    for key, layer in layers.items():
        packed |= _pack_weight(key, layer, earlier.get(key))
    return packed


def _pack_weight(key: str, layer: PacaLayer, earlier: Part | None) -> dict[str, Tensor]:
    weight, columns = layer.resident_columns()
    axis, index = _place(layer.base_layer, columns)
    kept = index[:0]
    if earlier is not None:
        adapted, earlier = index, Part(axis, *(tensor.to(index.device) for tensor in earlier[1:]))
        same = _unchanged(weight, earlier)
        kept = same[torch.isin(same, adapted)]
        index = torch.cat([adapted, earlier.index, earlier.kept]).unique()
        index = index[~torch.isin(index, same)]
    packed: dict[str, Tensor] = {f"{key}.kept": kept} if len(kept) else {}
    if len(index):
        packed[f"{key}.{AXIS_NAMES[axis]}"] = index
        packed[f"{key}.values"] = _select(weight, axis, index)
    return packed


def _unchanged(weight: Tensor, part: Part) -> Tensor:
    """Return the positions where the weight still holds what was sent."""
    if not len(part.index):
        return part.index
    now = _select(weight, part.axis, part.index)
    return part.index[(now == part.values).movedim(part.axis, 0).flatten(1).all(1)]


def apply_columns(target: nn.Module | Mapping[str, Tensor], packed: Mapping[str, Tensor]) -> None:
    """Write packed columns into another copy of the base, in place.

    Layers that the target holds fused (`qkv_proj`, `gate_up_proj`) are found by name. Another float dtype is
    rounded to. Everything is checked before the first weight is written.

    Args:
        target: a plain copy of the base model, or a mapping from its parameters' names to them.
        packed: from `pack_columns`; each one from the last full pack on, in order.
    Raises: ConfigError: for a weight that the target lacks, of another shape, or not of plain floats:
        the columns of a quantised weight share scales with their neighbours.
    """
    if isinstance(target, nn.Module):
        target = unwrapped(target)
        if any(isinstance(module, PacaLayer) for module in target.modules()):
            raise ConfigError("The target has PaCA layers itself. Apply to a plain copy of the base model.")
        target = dict(target.named_parameters(remove_duplicate=False))
    writes = [(_find(target, name, part), part) for name, part in _parts(packed).items() if len(part.index)]
    for weight, (axis, index, values, _) in writes:
        weight.data.index_copy_(axis, index.to(weight.device), values.to(weight.device, weight.dtype))


def _find(target: Mapping[str, Tensor], name: str, part: Part) -> Tensor:
    """Return the weight called `name`, or its rows of a fused one.

    Raises: ConfigError: if there is none that the part fits.
    """
    height = part.values.shape[0]
    layer, _, leaf = name.removesuffix(".weight").rpartition(".")
    fused, n_before_end = FUSED.get(leaf, ("", 0))
    where = name if name in target else f"{layer}.{fused}.weight".lstrip(".")
    if where not in target:
        raise ConfigError(f"The target has no weight '{name}'. {did_you_mean(name, target)}")
    weight = target[where]
    if weight.dtype not in FLOATS or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        raise ConfigError(
            f"'{where}' of the target is {type(weight).__name__} of {weight.dtype} on {weight.device}. "
            "Columns are written into weights of plain floats; a quantised one shares scales between "
            "columns: apply to a float copy and quantise that."
        )
    if where != name:
        start = len(weight) - n_before_end * height if n_before_end else 0
        if not 0 <= start <= len(weight) - height:
            raise ConfigError(
                f"'{where}' has {len(weight)} rows, too few for '{name}' with {height}: another model."
            )
        weight = weight.narrow(0, start, height)
    expected = list(weight.shape)
    expected[part.axis] = len(part.index)
    low, high = part.index.aminmax()
    if list(part.values.shape) != expected or low < 0 or high >= weight.shape[part.axis]:
        raise ConfigError(
            f"'{name}': got values {list(part.values.shape)} for positions up to {high} of axis {part.axis}, "
            f"but the target's weight is {list(weight.shape)}: another model."
        )
    return weight


def _parts(packed: Mapping[str, Tensor]) -> dict[str, Part]:
    """Return a pack by weight. Raises: ConfigError: for a mapping that is no pack."""
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in packed.items():
        name, _, kind = key.rpartition(".")
        entries[name][kind] = tensor
    none = torch.empty(0, dtype=torch.long)
    parts = {}
    for name, found in entries.items():
        kinds = found.keys() - {"kept"}
        axis = next((axis for axis, axis_name in enumerate(AXIS_NAMES) if axis_name in kinds), 1)
        index = found.get(AXIS_NAMES[axis], none)
        if kinds and kinds != {AXIS_NAMES[axis], "values"}:
            raise ConfigError(f"'{name}' is not from pack_columns: it has {sorted(found)}.")
        parts[name] = Part(axis, index, found.get("values", none), found.get("kept", none))
    return parts


def _weight_name(path: str, layer: PacaLayer) -> str:
    """Return the name of a layer's weight in the plain base model, where experts' are no layers."""
    name = plain_name(path)
    return name if isinstance(layer.base_layer, ExpertsLinear) else f"{name}.weight"


def _place(base_layer: nn.Module, columns: Tensor) -> tuple[int, Tensor]:
    """Return the axis and the positions of columns in the weight as it is stored."""
    if isinstance(base_layer, ExpertsLinear):
        return (1 if base_layer.is_transposed else 2), columns
    if isinstance(base_layer, Conv1D):
        return 0, columns
    if isinstance(base_layer, nn.Conv2d) and ConvGeometry.of(base_layer).depthwise:
        n_filters = base_layer.out_channels // base_layer.in_channels
        return 0, (columns[:, None] * n_filters + torch.arange(n_filters, device=columns.device)).flatten()
    return 1, columns


def _select(weight: Tensor, axis: int, index: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return weight.index_select(axis, index)
    local = weight.to_local().index_select(axis, index)
    shape = (weight.shape[0], *local.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def _check_columns_only(model: nn.Module, adapters: Iterable[str]) -> None:
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    for name in configs.keys() & set(adapters):
        for field, plain in (("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none")):
            value = getattr(configs[name], field, plain)
            if value and value != plain:
                raise ConfigError(
                    f"Adapter '{name}' has {field}={value!r}: it trains more than columns, which a pack does "
                    "not hold. Train without, or send a merged model."
                )
