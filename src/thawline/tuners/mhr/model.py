"""`MHRModel` puts MHR around a model's linears, as PEFT asks of a tuner; and how task ids reach them.

Ids are set with `set_task_ids`, or read from the batch after `route_by_batch`. They are checked once, where
the model's forward begins, and stay until they are replaced: gradient checkpointing needs them again in the
backward.
"""

from __future__ import annotations

__all__ = ["MHRModel", "find_layers", "find_task_ids", "route_by_batch", "set_task_ids"]

import math
from collections.abc import Iterator
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thawline.errors import ConfigError, RoutingError
from thawline.tuners.mhr.checkpointing import Checkpoints
from thawline.tuners.mhr.config import MHR, MHRConfig
from thawline.tuners.mhr.ids import Ids, read_ids
from thawline.tuners.mhr.kept import KeptMixtures
from thawline.tuners.mhr.layer import MHRLinear, layers_of, linear_sizes
from thawline.tuners.mhr.routing import ROUTERS, Router
from thawline.tuners.mhr.state import TaskIds
from thawline.tuners.mhr.together import Together

FIRST_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_values",
    "input_features",
    "decoder_input_ids",
)
NO_HOOK = (
    "The model got task_ids but does not read them from the batch: PEFT would drop them. Call"
    " thawline.route_by_batch(model) once, or thawline.set_task_ids(model, ids) before the forward."
)
DATA_PARALLEL = (
    "nn.DataParallel runs copies of the model in threads, which would share one batch's task ids. Start one"
    " process per GPU (torchrun --nproc-per-node=N: DistributedDataParallel), or show one GPU"
    " (CUDA_VISIBLE_DEVICES=0)."
)


class MHRModel(BaseTuner):
    """The tuner that `get_peft_model(model, MHRConfig(...))` makes."""

    prefix = MHR.prefix
    tuner_layer_cls = MHRLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: MHRConfig, model: nn.Module) -> None:
        self._check_targets(peft_config, model)
        _follow_forwards(model)
        model.mhr_task_ids.configs = self.peft_config

    def _check_targets(self, config: MHRConfig, model: nn.Module) -> None:
        """Check every module before the first is replaced, so that a failure leaves the model as it was.

        Raises: ConfigError: for a module that is no linear, or that the heads do not divide.
        """
        _maybe_include_all_linear_layers(config, model)
        targets = {}
        for name, module in model.named_modules():
            if name and self._check_target_module_exists(config, name) and ".base_layer" not in name:
                targets[name] = module.get_base_layer() if isinstance(module, MHRLinear) else module
        for name, module in targets.items():
            if isinstance(module, BaseTunerLayer):
                raise ConfigError(f"'{name}' already carries an adapter of another method. Unload it first.")
            if not isinstance(module, nn.Linear | Conv1D) and not hasattr(module, "in_features"):
                raise ConfigError(
                    f"'{name}' is a {type(module).__name__}; MHR adapts linear layers. Narrow"
                    " target_modules, or add"
                    " it to exclude_modules."
                )
        shared = math.gcd(*(size for module in targets.values() for size in linear_sizes(module)))
        for name, module in targets.items():
            n_heads = heads_of(config, name)
            for size, what in zip(linear_sizes(module), ("in_features", "out_features"), strict=True):
                if size % n_heads:
                    raise ConfigError(
                        f"n_heads={n_heads} does not divide {what}={size} of '{name}'. All adapted modules"
                        " can be"
                        f" split into {', '.join(map(str, divisors(shared)))} heads; use one of these, give"
                        " the module"
                        " its own number with heads_pattern, or exclude it."
                    )

    def _create_and_replace(
        self,
        peft_config: MHRConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        task_ids: TaskIds = self.model.mhr_task_ids
        layer = target if isinstance(target, MHRLinear) else MHRLinear(target, current_key, task_ids)
        layer.quantization_backend = self._quantization_backend(layer.get_base_layer())
        key = adapter_name, bin_of(peft_config.granularity, current_key)
        owns_router = key not in task_ids.bins
        if owns_router:
            task_ids.bins[key] = build_router(peft_config, heads_of(peft_config, current_key))
        r = pattern_value(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = pattern_value(peft_config.alpha_pattern, current_key, peft_config.alpha or r)
        if layer is not target:
            layer._active_adapter = [adapter_name]
            task_ids.layers.append(layer)
        layer.update_layer(adapter_name, peft_config, task_ids.bins[key], owns_router, r, alpha)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _quantization_backend(self, base: nn.Module) -> QuantizationBackend | None:
        """What reads and writes a quantised weight; `None` for one that is not."""
        try:
            return resolve_quantization_backend(base, **get_quantization_kwargs(self))
        except ValueError:  # torchao by hand: nothing says how a merged weight is to be quantised again
            return ForwardOnlyQuantizationBackend("torchao")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        _stop_following(model)
        return model


def pattern_value(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value that a pattern has for the module called `name`."""
    return (pattern or {}).get(get_pattern_key(pattern or {}, name), default)


def heads_of(config: MHRConfig, name: str) -> int:
    """n_heads of the module called `name`."""
    return pattern_value(config.heads_pattern, name, config.n_heads)


def divisors(n: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def bin_of(granularity: str, name: str) -> str:
    """Which part of the model shares a routing table with the module called `name`."""
    parts = name.split(".")
    if granularity == "linear":
        return name
    if granularity == "layer":
        return ".".join(parts[:-1])
    if granularity == "block":
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        return name if number is None else ".".join(parts[: number + 1])
    if granularity == "coder":
        return next((part for part in parts if part in ("encoder", "decoder")), "")
    return ""


def build_router(config: MHRConfig, n_heads: int) -> Router:
    """A fresh routing table."""
    router = ROUTERS[config.router](config.n_tasks or 1, n_heads, config.n_skills, config.routing_init)
    router.temperature, router.uniform_mix = config.temperature, config.uniform_mix
    return router


# How ids get in.


class set_task_ids:  # noqa: N801 - used like a function, and like torch.no_grad as a context
    """Say which task each row of the coming batches belongs to.

    Takes effect at once and stays; as a context (`with set_task_ids(model, ids): ...`) it is undone at the
    end, which must then come after the backward. Works on models wrapped by PEFT, DDP and torch.compile.

    Args:
        model: any module with MHR layers inside.
        ids: one id or task name, for any number of rows; a list, array or tensor (batch,) of them; (batch,
            tokens) for packed rows; or `None` to take the ids away. Ids on the host spare a synchronisation.
    Raises: RoutingError: for ids that are misshapen, no whole numbers, negative, too large, or unknown names.
    """

    def __init__(self, model: nn.Module, ids: Any) -> None:
        self._task_ids = find_task_ids(model)
        self._before = self._task_ids.state()
        _set(self._task_ids, ids)

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task_ids.restore(self._before)


def route_by_batch(model: nn.Module) -> nn.Module:
    """Let the model take the ids of each batch from the batch: `model(**batch, task_ids=ids)`.

    Call it on the outermost module: on what is wrapped by DDP or torch.compile, once wrapped. From then on a
    batch without ids raises, unless `set_task_ids` set some. A plain `transformers.Trainer` needs
    `remove_unused_columns=False` to keep the column.

    Returns: the model.
    """
    task_ids = find_task_ids(model)
    for module in model.modules():  # called before it was wrapped: the hook moves outwards
        _remove_hooks(module, _TakeIds)
    task_ids.reads_batch = True
    model.register_forward_pre_hook(_TakeIds(task_ids), with_kwargs=True)
    return model


def find_layers(model: nn.Module) -> Iterator[tuple[str, MHRLinear]]:
    """Every MHR layer of the model and its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MHRLinear))


def find_task_ids(model: nn.Module) -> TaskIds:
    """What the MHR layers of a model share.

    Raises: RoutingError: if it has none.
    """
    for module in model.modules():
        if isinstance(module, MHRLinear):
            return module.task_ids
    raise RoutingError(
        f"{type(model).__name__} has no MHR layers: wrap it with get_peft_model(model, MHRConfig(...))."
    )


@torch.compiler.disable
def _set(task_ids: TaskIds, ids: Any, from_batch: bool = False) -> None:
    """Read ids and make them the current ones."""
    active = {name: task_ids.configs[name] for name in task_ids.active()}
    routed = {name: config for name, config in active.items() if config.router != "uniform"}
    found = (
        _read(task_ids, ids, routed) if routed and ids is not None else None
    )  # without routing, none refused
    task_ids.check_thread()
    if not from_batch:
        task_ids.under_way.clear()
    task_ids.ids, task_ids.from_batch = found, from_batch
    task_ids.arrived = get_ident() if from_batch else None


def _read(task_ids: TaskIds, ids: Any, routed: dict[str, MHRConfig]) -> Ids:
    """Ids that mean the same in every adapter that routes."""
    layer = next(layer for layer in layers_of(task_ids) if any(name in layer.mhr_A for name in routed))
    device = next(layer.mhr_A.parameters()).device
    named = [name for name, config in routed.items() if config.task_names] or list(routed)[:1]
    readings = {name: read_ids(ids, routed[name], device) for name in named}
    found = readings[named[0]]
    if any(reading.key != found.key for reading in readings.values()):
        raise RoutingError(
            f"The active adapters {named} have the same tasks in another order, so a name means several rows."
            " Give their configs the same task_names, or activate one adapter at a time."
        )
    for config in routed.values():
        found.check_table(config.n_tasks or 1)
    layer.check_merged(found)
    return found


class _TakeIds:
    """Forward pre-hook of the outermost module: takes `task_ids` out of the batch."""

    def __init__(self, task_ids: TaskIds) -> None:
        self.task_ids = task_ids

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shared, ids = self.task_ids, kwargs.pop("task_ids", None)
        if ids is not None:
            _set(shared, ids, from_batch=True)
        elif shared.from_batch:
            _set(shared, None)  # they were the last batch's
        if shared.is_routed():
            shared.check_present()
        return args, kwargs


class _BeforeForward:
    """Forward pre-hook of the adapted model: checks ids against the batch, once, and prepares the layers."""

    def __init__(self, task_ids: TaskIds) -> None:
        self.task_ids = task_ids
        self.checkpoints, self.together = Checkpoints(task_ids), Together(task_ids)
        self.kept = KeptMixtures(task_ids)

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shared, is_eager = self.task_ids, not torch.compiler.is_compiling()
        if is_eager:
            shared.enter()
            if model.__dict__.get("_is_replica") and shared.is_routed():
                raise RoutingError(DATA_PARALLEL)
        ids = kwargs.pop("task_ids", None)
        if ids is not None:
            if not shared.reads_batch:
                raise RoutingError(NO_HOOK)
            _set(shared, ids, from_batch=True)
        elif shared.from_batch and shared.arrived is None:
            shared.ids = None  # they were the last batch's
        shared.arrived = None
        inputs = first_inputs(args, kwargs)
        routed = shared.is_routed()
        if routed:
            shared.check(inputs)
        shared.begin(inputs)
        if is_eager:
            self._prepare(model, inputs, routed)
        shared.running = True
        return args, kwargs

    def _prepare(self, model: nn.Module, inputs: Tensor | None, routed: bool) -> None:
        """What the layers would each do; under torch.compile they do, for the compiler to fuse."""
        if model.training:
            self.kept.clear()
            if routed:
                self.checkpoints.carry(model)
                if inputs is not None:
                    self.together.prepare(inputs)
        elif inputs is not None and not torch.is_grad_enabled():
            self.kept.recall(inputs)


class _AfterForward:
    """Forward hook of the adapted model."""

    def __init__(self, task_ids: TaskIds) -> None:
        self.task_ids = task_ids

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            self.task_ids.running = False
        else:
            self.task_ids.leave()


def first_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor that has the batch's rows."""
    named = [kwargs[name] for name in FIRST_INPUTS if isinstance(kwargs.get(name), Tensor)]
    found = [*named, *args, *kwargs.values()]
    return next((one for one in found if isinstance(one, Tensor) and one.dim() > 0), None)


def _generate(model: nn.Module, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
    """The model's own `generate`, in which rows may be repeated: each id goes with its row's beams."""
    shared: TaskIds = model.mhr_task_ids
    before = shared.ids, shared.from_batch, shared.generating
    try:
        if task_ids is not None:
            _set(shared, task_ids)
        shared.from_batch = False
        shared.generating = True
        return type(model).generate(model, *args, **kwargs)
    finally:
        shared.ids, shared.from_batch, shared.generating = before


def _follow_forwards(model: nn.Module) -> None:
    """Check ids at every forward of the adapted model, and know when it generates."""
    if hasattr(model, "mhr_task_ids"):
        return
    model.mhr_task_ids = TaskIds()
    model.register_forward_pre_hook(_BeforeForward(model.mhr_task_ids), with_kwargs=True)
    model.register_forward_hook(_AfterForward(model.mhr_task_ids), always_call=True)
    if hasattr(type(model), "generate"):
        model.generate = partial(_generate, model)  # a bound method would not be found again when unpickled


def _stop_following(model: nn.Module) -> None:
    for kind in (_BeforeForward, _AfterForward, _TakeIds):
        _remove_hooks(model, kind)
    Checkpoints.release(model)
    for name in ("mhr_task_ids", "generate"):
        model.__dict__.pop(name, None)


def _remove_hooks(module: nn.Module, kind: type) -> None:
    before = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    after = (module._forward_hooks, module._forward_hooks_always_called)
    for hooks, options in (before, after):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            hooks.pop(key)
            options.pop(key, None)
