"""One training step on tensors without data: bytes kept and alive, arithmetic, operations.

PyTorch's fake tensors carry shape, type and storage but no data, and dispatch as a processor's tensors do:
attention stays one fused operation, autocast casts, autograd keeps what it would keep. So the bytes that the
saved-tensor hooks see are those of the real step, and the largest sum of bytes alive is its peak. A forward
that reads values cannot run this way and is refused.
"""

from __future__ import annotations

__all__ = ["StepCost", "simulate_step"]

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from thawline.errors import ConfigError
from thawline.measure import saved_bytes

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of one forward and backward pass."""

    saved: int
    """Bytes that autograd keeps for the backward pass, the loss's share included."""
    loss: int
    """Bytes beyond `saved` that are alive around the head and the loss: logits, their gradient."""
    peak: int
    """Most bytes alive at once, without weights, buffers and the batch; gradients included."""
    flops: int
    """Floating-point operations of matrix products, convolutions and attention."""
    moved: int
    """Bytes read and written by all operations."""
    n_ops: int
    """Operations dispatched."""


def simulate_step(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Any],
    *,
    autocast: torch.dtype | None = None,
    on_gpu: bool = False,
    keep_gradients: bool = False,
) -> StepCost:
    """Run one forward and backward pass without data.

    Args:
        model: in training mode, on any device, meta included. Its tensors are replaced by fake ones.
        batch: tensors, in any nesting.
        loss: `loss(model, batch)`, a scalar or an output whose `loss` is one.
        autocast: type of mixed precision. None: off.
        on_gpu: dropout keeps a mask of bytes and may happen within fused attention, as on a GPU.
        keep_gradients: gradients of earlier passes are there, as with gradient accumulation.
    Raises: ConfigError: if the model's forward depends on values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _replace_tensors(model, mode)
    batch = tree_map_only(Tensor, lambda tensor: _fake(mode, tensor), batch)
    own = [*model.parameters(), *model.buffers()]
    tracker = _Tracker([*own, *(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))])
    found: list[Tensor] = []

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            output = loss(model, batch)
        if autocast is not None:
            output = convert_to_fp32(output)  # as accelerate does
        scalar: Tensor = output if isinstance(output, Tensor) else output.loss
        found.append(scalar)
        return scalar

    with _readable(model), mode, contextlib.ExitStack() as stack:
        if on_gpu:
            stack.enter_context(_OnGPU())
        if keep_gradients:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        stack.enter_context(tracker)
        stack.enter_context(tracker.watch_head(model))
        saved = saved_bytes(forward, own)
        tracker.end_forward(saved)
        found.pop().backward()
    return StepCost(
        saved=saved,
        loss=tracker.loss,
        peak=tracker.peak,
        flops=tracker.flops,
        moved=tracker.moved,
        n_ops=tracker.n_ops,
    )


class _Tracker(TorchDispatchMode):
    """Bytes alive, and a count of the work, over all operations dispatched."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.moved = self.n_ops = self.loss = 0
        self._saved = self._around_loss = 0
        self._is_around_loss = False
        self._storages: dict[int, Any] = dict.fromkeys(map(_storage_key, known))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_floating_point():
            return 1.0  # such as an affine scale, whose sign chooses between operations of one cost
        product = _grouped_product(func, args, kwargs)
        output = func(*args, **kwargs) if product is None else product
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._see(tensor)
        if not func.is_view:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in (*inputs, *tensors))
            self.n_ops += 1
            if count := flop_registry.get(func.overloadpacket):
                self.flops += int(count(*args, **kwargs, out_val=output))
        return output

    @contextlib.contextmanager
    def watch_head(self, model: nn.Module) -> Iterator[None]:
        """Take note of the bytes alive from a language model's head to the gradient of its input."""
        head = getattr(model, "get_output_embeddings", lambda: None)()

        def start(module: nn.Module, args: Any) -> None:
            self._is_around_loss = True
            if args and args[0].requires_grad:
                args[0].register_hook(stop)

        def stop(gradient: Tensor) -> None:
            self._is_around_loss = False

        handle = head.register_forward_pre_hook(start) if isinstance(head, nn.Module) else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
            self.loss = max(0, self._around_loss - self._saved)

    def end_forward(self, saved: int) -> None:
        """Take note of the bytes kept for backward."""
        self._saved = saved

    def _see(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage_key(tensor)
        if key in self._storages:
            return
        n_bytes = storage.nbytes()

        def free(reference: Any) -> None:
            self._storages.pop(key, None)
            self.live -= n_bytes

        self._storages[key] = weakref.ref(storage, free)
        self.live += n_bytes
        self.peak = max(self.peak, self.live)
        if self._is_around_loss:
            self._around_loss = max(self._around_loss, self.live)


class _OnGPU(TorchFunctionMode):
    """Dropout as a GPU computes it: a mask of one byte a value, none at all within attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
            args = args[:4]
        elif func is F.dropout:
            x, p, training = _dropout_arguments(*args, **kwargs)
            return torch.native_dropout(x, p, True)[0] if training and p else x
        return func(*args, **kwargs)


def _dropout_arguments(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return input, p, training


def _grouped_product(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return the grouped matrix product of float32, which has no fake version, by way of bfloat16."""
    if func is not aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return None
    half = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, (args, kwargs))
    product: Tensor = func(*half[0], **half[1]).to(args[0].dtype)
    return product


def _replace_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by fake ones; those that modules share stay shared."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(_fake(mode, parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = known.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = known.setdefault(id(buffer), _fake(mode, buffer))


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, like, torch.device("cpu"))


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def _readable(model: nn.Module) -> Iterator[None]:
    """Turn what fake tensors cannot do into a ConfigError of one line."""
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"No plan for {name}: its training step needs the values of tensors ({reason}). "
            "Start the run with `training.max_steps: 1` to see what it takes."
        ) from error
