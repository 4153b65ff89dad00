"""Give a model its task ids: set by hand, or read from every batch; and hooks at the forwards that use them.

Ids stay until they are replaced, because gradient checkpointing needs them again in the backward. They are
checked against the batch once, where the model's forward begins.
"""

from __future__ import annotations

__all__ = ["find_state", "follow_forwards", "route_by_batch", "set_task_ids", "stop_following"]

from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thawline.errors import RoutingError
from thawline.tuners.mhr.ids import Ids, read_ids
from thawline.tuners.mhr.layer import find_layers
from thawline.tuners.mhr.prepare import CheckpointWithIds, Preparer
from thawline.tuners.mhr.state import Forward, RoutingState

FIRST_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_values",
    "input_features",
    "decoder_input_ids",
)
NOT_READ = (
    "The model got task_ids but does not read them from the batch: PEFT would drop them. Call"
    " thawline.route_by_batch(model) once, or thawline.set_task_ids(model, ids) before the forward."
)
DATA_PARALLEL = (
    "nn.DataParallel runs copies of the model in threads, which would share one batch's task ids. Start one"
    " process per GPU (torchrun --nproc-per-node=N: DistributedDataParallel), or use one GPU"
    " (CUDA_VISIBLE_DEVICES=0)."
)


class set_task_ids:  # noqa: N801 - used like a function, and like torch.no_grad as a context
    """Set the task of each row of the coming batches.

    Takes effect at once and stays. As a context (`with set_task_ids(model, ids): ...`), which must then
    include the backward, it restores the ids of before at the end. Works on models wrapped by PEFT, DDP and
    torch.compile.

    Args:
        model: any module with MHR layers inside.
        ids: one id or task name, for any number of rows; a list, array or tensor (batch,) of them; (batch,
            tokens) for packed rows; or `None` to remove the ids. Ids on the host spare a synchronisation.
    Raises: RoutingError: for ids that are misshapen, not integers, negative, too large, or unknown names.
    """

    def __init__(self, model: nn.Module, ids: Any) -> None:
        self._state = find_state(model)
        self._before = self._state.forward, tuple(self._state.running)
        _set(self._state, ids)

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state.forward, self._state.running[:] = self._before


def route_by_batch(model: nn.Module) -> nn.Module:
    """Make the model read the ids of each batch from the batch: `model(**batch, task_ids=ids)`.

    Call it on the outermost module: on what is wrapped by DDP or torch.compile, once wrapped. From then on a
    batch without ids raises, unless `set_task_ids` set some. A plain `transformers.Trainer` needs
    `remove_unused_columns=False` to keep the column.

    Returns: the model.
    """
    state = find_state(model)
    for module in model.modules():  # if called before the model was wrapped, the hook moves outwards
        _remove_hooks(module, _TakeIds)
    state.reads_batch = True
    model.register_forward_pre_hook(_TakeIds(state), with_kwargs=True)
    return model


def find_state(model: nn.Module) -> RoutingState:
    """Return the state that the MHR layers of a model share.

    Raises: RoutingError: if it has none.
    """
    for _, layer in find_layers(model):
        return layer.state
    raise RoutingError(
        f"{type(model).__name__} has no MHR layers: wrap it with get_peft_model(model, MHRConfig(...))."
    )


def follow_forwards(model: nn.Module) -> RoutingState:
    """Attach a state to the adapted model, once, with hooks where its forwards begin and end."""
    if not hasattr(model, "mhr_state"):
        model.mhr_state = RoutingState()
        model.register_forward_pre_hook(_BeforeForward(model.mhr_state), with_kwargs=True)
        model.register_forward_hook(_AfterForward(model.mhr_state), always_call=True)
        if hasattr(type(model), "generate"):
            # Not a bound method, which would not be found again when unpickled.
            model.generate = partial(_generate, model)
    return model.mhr_state


def stop_following(model: nn.Module) -> None:
    """Undo `follow_forwards` and `route_by_batch`."""
    for kind in (_BeforeForward, _AfterForward, _TakeIds):
        _remove_hooks(model, kind)
    CheckpointWithIds.unwrap(model)
    for name in ("mhr_state", "generate"):
        model.__dict__.pop(name, None)


@torch.compiler.disable
def _set(state: RoutingState, ids: Any, from_batch: bool = False) -> None:
    """Read ids and make them the current ones. Without an adapter that routes, any ids are accepted."""
    found = _read(state, ids) if ids is not None and state.routed() else None
    state.check_thread()
    if not from_batch:
        state.running.clear()
    state.forward = Forward(found, from_batch)
    state.arrived = get_ident() if from_batch else None


def _read(state: RoutingState, ids: Any) -> Ids:
    """Read ids that must mean the same in every active adapter that routes."""
    routed = state.routed()
    named = [name for name, config in routed.items() if config.task_names] or list(routed)[:1]
    found, *others = [read_ids(ids, routed[name], state.device()) for name in named]
    if any(other.key != found.key for other in others):
        raise RoutingError(
            f"The active adapters {named} have the same tasks in another order, so a name means several rows."
            " Give their configs the same task_names, or activate one adapter at a time."
        )
    for config in routed.values():
        found.check_table(config.n_tasks or 1)
    next(layer for layer in state.layers if any(name in layer.mhr_A for name in routed)).check_merged(found)
    return found


class _Hook:
    def __init__(self, state: RoutingState) -> None:
        self.state = state


class _TakeIds(_Hook):
    """Forward pre-hook of the outermost module: takes `task_ids` out of the batch."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        state, ids = self.state, kwargs.pop("task_ids", None)
        if ids is not None:
            _set(state, ids, from_batch=True)
        elif state.forward.from_batch:
            _set(state, None)  # they were the last batch's
        if not state.is_off():
            state.check_present()
        return args, kwargs


class _BeforeForward(_Hook):
    """Forward pre-hook of the adapted model: checks ids against the batch, once, and prepares mixtures."""

    def __init__(self, state: RoutingState) -> None:
        super().__init__(state)
        self.preparer = Preparer(state)

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        state, is_eager = self.state, not torch.compiler.is_compiling()
        if is_eager:
            state.enter()
            if model.__dict__.get("_is_replica") and state.routed():
                raise RoutingError(DATA_PARALLEL)
        ids = kwargs.pop("task_ids", None)
        if ids is not None:
            if not state.reads_batch:
                raise RoutingError(NOT_READ)
            _set(state, ids, from_batch=True)
        elif state.forward.from_batch and state.arrived is None:
            state.forward = Forward()  # they were the last batch's
        state.arrived = None
        inputs = _first_inputs(args, kwargs)
        state.begin(inputs)
        if is_eager:  # a compiler fuses what each layer does
            self.preparer.prepare(model, inputs)
        return args, kwargs


class _AfterForward(_Hook):
    """Forward hook of the adapted model, called after an error too."""

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.state.leave()


def _first_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the first tensor that has the batch's rows."""
    candidates = [*(kwargs.get(name) for name in FIRST_INPUTS), *args, *kwargs.values()]
    return next((one for one in candidates if isinstance(one, Tensor) and one.dim() > 0), None)


def _generate(model: nn.Module, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
    """Run the model's own `generate`, which may repeat rows: each id goes with its row's beams."""
    state: RoutingState = model.mhr_state
    before = state.forward, state.generating
    try:
        if task_ids is not None:
            _set(state, task_ids)
        state.forward = Forward(state.forward.ids)  # every forward of generate uses them
        state.generating = True
        return type(model).generate(model, *args, **kwargs)
    finally:
        state.forward, state.generating = before


def _remove_hooks(module: nn.Module, kind: type) -> None:
    before = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    after = (module._forward_hooks, module._forward_hooks_always_called)
    for hooks, options in (before, after):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            hooks.pop(key)
            options.pop(key, None)
