"""One training step on tensors without data: bytes kept and alive, arithmetic, operations.

PyTorch's fake tensors carry shape, type and storage but no data, and dispatch as a processor's tensors do:
attention stays one fused operation, autocast casts, autograd keeps what it would keep. So the bytes that the
saved-tensor hooks see are those of the real step, and the largest sum of bytes alive is its peak. A forward
that reads values cannot run this way and is refused.
"""

from __future__ import annotations

__all__ = ["StepCost", "simulate_step"]

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from thawline.planning.depth import Stack, find_stacks
from thawline.tuners.mhr.layer import find_layers

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
    whole: bool = False,
) -> StepCost:
    """Run one forward and backward pass without data; of a deep transformers model, with few of its blocks.

    Args:
        model: in training mode, on any device, meta included. Its tensors are replaced by fake ones.
        batch: tensors, in any nesting.
        loss: `loss(model, batch)`, a scalar or an output whose `loss` is one.
        autocast: type of mixed precision. None: off.
        on_gpu: dropout keeps a mask of bytes and may happen within fused attention, as on a GPU.
        keep_gradients: gradients of earlier passes are there, as with gradient accumulation.
        whole: run all blocks.
    Raises: ConfigError: if the model's forward depends on values.
    """
    mode = _replace_tensors(model)
    batch = tree_map_only(Tensor, lambda tensor: _fake(mode, tensor), batch)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_known = hasattr(base, "get_output_embeddings")  # a detector may use each block in another way
    stacks = find_stacks(base) if is_known and not whole else []

    def run(n_periods: Sequence[int]) -> _Tracker:
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
            tracker.held = tracker.live
            return scalar

        with _readable(model), mode, contextlib.ExitStack() as context:
            if on_gpu:
                context.enter_context(_OnGPU())
            for parameter in model.parameters():
                wanted = keep_gradients and parameter.requires_grad
                parameter.grad = torch.empty_like(parameter) if wanted else None
            for stack, n in zip(stacks, n_periods, strict=True):
                context.enter_context(stack.cut_to(n))
            context.enter_context(tracker)
            context.enter_context(tracker.watch(model, stacks))
            tracker.saved = saved_bytes(forward, own)
            found.pop().backward()
        return tracker

    twos = [2] * len(stacks)
    two = run(twos)
    ones = [run([*twos[:i], 1, *twos[i + 1 :]]) for i in range(len(stacks))]
    further = [(stack, one, stack.n_periods - 2) for stack, one in zip(stacks, ones, strict=True)]

    def in_full(name: str) -> int:
        at_two: int = getattr(two, name)
        return at_two + sum(n * (at_two - getattr(one, name)) for _, one, n in further)

    work = {name: in_full(name) for name in ("saved", "loss", "flops", "moved", "n_ops")}
    # Gradients are added to earlier ones at once, unless MHR's layers, mixed together, get theirs together.
    adds_at_once = keep_gradients and next(find_layers(model), None) is None
    return StepCost(**work, peak=_peak_in_full(two, further, adds_at_once))


def _peak_in_full(two: _Tracker, further: list[tuple[Stack, _Tracker, int]], adds_at_once: bool) -> int:
    """Return the peak of all blocks: before the backward of a stack they keep more, after it there are more
    gradients."""
    peaks = list(two.peaks)
    for stack, one, n in further:
        kept, gradients = two.held - one.held, 0 if adds_at_once else stack.gradients
        begins = two.passed.index(stack.blocks) if stack.blocks in two.passed else len(peaks)
        for i in range(len(peaks)):
            before, after = i <= begins + 1, i > begins
            peaks[i] += n * max(before * kept, after * gradients)
    return max(peaks)


class _Tracker(TorchDispatchMode):
    """Bytes alive, and a count of the work, over all operations dispatched."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.held = self.saved = self.flops = self.moved = self.n_ops = 0
        self.peaks = [0]
        """Most bytes alive until the backward reaches a stack, in its last period, after that; and so on."""
        self.passed: list[nn.Module] = []
        """Points between one of `peaks` and the next, as backward passes them: stacks, their last periods."""
        self._around_loss = 0
        self._is_around_loss = False
        self._storages: dict[int, Any] = dict.fromkeys(map(_storage_key, known))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for several times per operation
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_floating_point():
            return 1.0  # such as an affine scale, whose sign chooses between operations of one cost
        product = _grouped_product(func, args, kwargs)
        output = func(*args, **kwargs) if product is None else product
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._see(tensor)
        if not (func.is_view or func is aten._unsafe_view.default):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in (*inputs, *tensors))
            self.n_ops += 1
            if count := flop_registry.get(func.overloadpacket):
                self.flops += int(count(*args, **kwargs, out_val=output))
        return output

    @property
    def loss(self) -> int:
        """Bytes beyond those saved that were alive from the head to the gradient of its input."""
        return max(0, self._around_loss - self.saved)

    @contextlib.contextmanager
    def watch(self, model: nn.Module, stacks: Sequence[Stack]) -> Iterator[None]:
        """Take note of what is alive around the head, and of where the backward enters and leaves a block."""
        head = getattr(model, "get_output_embeddings", lambda: None)()

        def start(module: nn.Module, args: Any) -> None:
            self._is_around_loss = True
            if args and args[0].requires_grad:
                args[0].register_hook(stop)

        def stop(gradient: Tensor) -> None:
            self._is_around_loss = False

        def begin_backward(blocks: nn.Module, module: nn.Module, args: Any, output: Any) -> None:
            self._pass_at(output, blocks)

        def end_backward(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._pass_at((args, kwargs), module)

        handles = [head.register_forward_pre_hook(start)] if isinstance(head, nn.Module) else []
        for stack in stacks:
            handles.append(stack.blocks[-1].register_forward_hook(partial(begin_backward, stack.blocks)))
            first = stack.blocks[-stack.period]
            handles.append(first.register_forward_pre_hook(end_backward, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _pass_at(self, values: Any, place: nn.Module) -> None:
        """Begin another of `peaks` when the backward reaches the first of `values`."""

        def note(gradient: Tensor) -> None:
            if place not in self.passed:  # with gradient checkpointing it comes here twice
                self.passed.append(place)
                self.peaks.append(self.live)

        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(note)
                return

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
        self.peaks[-1] = max(self.peaks[-1], self.live)
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
            x, p, training, _ = inspect.getcallargs(F.dropout, *args, **kwargs).values()
            return torch.native_dropout(x, p, True)[0] if training and p else x
        return func(*args, **kwargs)


def _grouped_product(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return the grouped matrix product of float32, which has no fake version, by way of bfloat16."""
    if func is not aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return None
    half = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, (args, kwargs))
    product: Tensor = func(*half[0], **half[1]).to(args[0].dtype)
    return product


def _replace_tensors(model: nn.Module) -> FakeTensorMode:
    """Replace parameters and buffers by fake ones, once; those that modules share stay shared."""
    first = next(model.parameters(), None)
    if isinstance(first, FakeTensor):
        return first.fake_mode
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(_fake(mode, parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = known.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = known.setdefault(id(buffer), _fake(mode, buffer))
    return mode


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
