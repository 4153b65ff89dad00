"""RMSNorm and gated MLPs that keep less for backward, bit-equal; losses that never hold all logits.

In a frozen model linear layers keep nothing, so a block's memory is what lies between them:

| kept per token          | stock                                        | lean                       |
|-------------------------|----------------------------------------------|----------------------------|
| RMSNorm, half precision | x in float32; a second copy if it is trained | x in its dtype, one scalar |
| act(gate) · up          | gate, act(gate), up                          | gate, up                   |

The backward recomputes the rest: a multiplication for the norm, the activation for the MLP. `apply_lean`
replaces the classes of a model's norms and MLPs in place: parameters, names, hooks and PEFT's layers inside
them stay. A module is replaced only if its own forward, run on a few numbers, gives the bits of the lean
version, so new architectures need no entry here and modules that compute anything else are left alone.

Liger and Unsloth recompute act(gate) too, in fused kernels; this is plain torch, for any device.
"""

from __future__ import annotations

__all__ = ["apply_lean", "is_lean", "lean_geglu", "lean_rms_norm", "lean_swiglu", "undo_lean"]

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thawline.ops.lean_head import LeanHeadModel, lean_head_form

aten = torch.ops.aten

# Activation and its vector-Jacobian product, the one that autograd calls, so that gradients are bit-equal.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(aten.gelu_backward, approximate="tanh"),
    ),
}


def apply_lean(model: nn.Module, *, loss: bool = False) -> nn.Module:
    """Make every RMSNorm and gated MLP of `model` keep less for backward; its outputs stay bit-equal.

    Made for the decoder blocks of Llama, Qwen2, Qwen3, Mistral and Gemma. Works in place, can be undone
    (`undo_lean`) and called twice. Works before or after `peft.get_peft_model`, with gradient
    checkpointing, autocast, `torch.compile` and DDP; `state_dict` and `save_pretrained` are unchanged.
    Second derivatives are not supported.

    Args:
        model: any module; a warning names norms and MLPs of other kinds, which are left alone.
        loss: also let a language model compute its training loss without holding the logits of all tokens
            (`thawline.ops.lean_head`): equal within rounding; `logits` of its output are then computed when
            asked for, without a gradient. The recipe's `lean` does.
    Returns: `model` itself.
    """
    left_alone: dict[str, str] = {}
    n_lean = 0
    for module in model.modules():
        lean = type(module) if isinstance(module, _Lean) else _lean_version(module)
        if loss and lean is None and (form := lean_head_form(module)) is not None:
            origin: Any = type(module)
            lean = _lean_class(origin, _LeanHeadModel, form)
        if lean is not None:
            module.__class__ = lean
            n_lean += 1
        elif (reason := _why_left_alone(module)) is not None:
            left_alone[type(module).__name__] = reason
    if left_alone or not n_lean:
        detail = "; ".join(f"{name} ({reason})" for name, reason in sorted(left_alone.items()))
        warnings.warn(
            f"apply_lean replaced {n_lean} modules of {type(model).__name__}. Left alone: "
            f"{detail or 'everything, since it has no RMSNorm and no gated MLP'}.",
            stacklevel=2,
        )
    return model


def is_lean(model: nn.Module) -> bool:
    """Return whether `apply_lean` has replaced a module of the model."""
    return any(isinstance(module, _Lean) for module in model.modules())


def undo_lean(model: nn.Module) -> nn.Module:
    """Restore the class of every module that `apply_lean` replaced. In place; returns `model`."""
    for module in model.modules():
        if isinstance(module, _Lean):
            module.__class__ = module.lean_origin
    return model


def lean_rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Root-mean-square norm over the last axis, computed in float32, keeping `x` in its own dtype.

    Args:
        x: (..., I), any float dtype.    weight: (I,), frozen or trainable.
        eps: added to the mean square.
        unit_offset: multiply by 1 + weight, before going back to the dtype of `x` (Gemma), instead of by
            weight, after (Llama and most others). In half precision the order decides the last bits.
    Returns: (..., I).
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    return _RMSNorm.apply(x, weight, eps, unit_offset)


def lean_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) · up, keeping gate and up but not silu(gate). All are (..., F).

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    return _GatedUnit.apply(gate, up, "silu")


def lean_geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """Compute gelu(gate) · up, keeping gate and up but not gelu(gate). All are (..., F).

    Args:
        approximate: "tanh" (Gemma) or "none", as in `torch.nn.functional.gelu`.
    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    return _GatedUnit.apply(gate, up, {"tanh": "gelu_tanh", "none": "gelu"}[approximate])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
        x_float = x.to(torch.float32)
        scale = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        ctx.unit_offset = unit_offset
        normed = x_float * scale
        if unit_offset:
            return (normed * (1.0 + weight.float())).type_as(x)
        return weight * normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, weight = ctx.saved_tensors
        normed = x * scale  # float32: scale is
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).sum_to_size(weight.shape).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_normed = (
                grad.float() * (1.0 + weight.float()) if ctx.unit_offset else (grad * weight).float()
            )
            # The scale depends on x: remove the part of the gradient that is parallel to the normed x.
            along = (grad_normed * normed).mean(-1, keepdim=True)
            grad_x = (torch.addcmul(grad_normed, normed, along, value=-1) * scale).to(x.dtype)
        return grad_x, grad_weight, None, None


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        act, _ = ACTIVATIONS[activation]
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        act, act_backward = ACTIVATIONS[ctx.activation]
        grad_gate = act_backward(grad * up, gate) if ctx.needs_input_grad[0] else None
        grad_up = grad * act(gate) if ctx.needs_input_grad[1] else None
        return grad_gate, grad_up, None


class _Lean(nn.Module):
    """Base of the replacement classes, which also derive from the replaced ones, so `isinstance` holds."""

    lean_origin: type[nn.Module]
    lean_kind: type[_Lean]
    lean_form: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle cannot import the replacement class by name; it rebuilds the class from its parts.
        return _empty, (self.lean_origin, self.lean_kind, self.lean_form), self.__dict__


class _LeanNorm(_Lean):
    def forward(self, hidden_states: Tensor) -> Tensor:
        eps, unit_offset = self.lean_form
        return lean_rms_norm(hidden_states, self.weight, getattr(self, eps), unit_offset=unit_offset)


class _LeanMLP(_Lean):
    def forward(self, x: Tensor) -> Tensor:
        # The projections may be nn.Linear, quantised, or a tuner's layers.
        return self.down_proj(_GatedUnit.apply(self.gate_proj(x), self.up_proj(x), self.lean_form))


class _LeanHeadModel(LeanHeadModel, _Lean):
    """Language model whose loss is computed in chunks."""


@functools.cache
def _lean_class(origin: Any, kind: Any, form: Any) -> type[nn.Module]:
    body: dict[str, Any] = {
        "lean_origin": origin,
        "lean_kind": kind,
        "lean_form": form,
        "__module__": __name__,
    }
    name = f"Lean{origin.__name__}"
    if kind is _LeanHeadModel:
        # Its name goes into a saved config, and Trainer reads the parameters of its forward.
        name, body["forward"] = origin.__name__, _lean_forward_like(origin.forward)
    return type(name, (kind, origin), body)


def _lean_forward_like(original: Any) -> Any:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return LeanHeadModel.forward(self, *args, **kwargs)

    return forward


def _empty(origin: Any, kind: Any, form: Any) -> Any:
    cls: Any = _lean_class(origin, kind, form)
    return cls.__new__(cls)


def _lean_version(module: nn.Module) -> type[nn.Module] | None:
    """Return the lean class that gives the bits of this module's own forward on a few numbers, if any."""
    origin: Any = type(module)
    for kind, form in _candidates(module):
        cls = _lean_class(origin, kind, form)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if all(_same_bits(module, cls, *numbers) for numbers in _numbers()):
                return cls
    return None


def _candidates(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield the lean forms that the module's parts allow."""
    if "forward" in vars(module) or type(module).__module__.startswith("torch."):
        return  # an instance's own forward would hide the lean one; torch's RMSNorm keeps no copy
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return  # the lean forward takes self and one tensor
    parameters, children = dict(module.named_parameters(recurse=False)), dict(module.named_children())
    if parameters.keys() == {"weight"} and parameters["weight"].dim() == 1 and not children:
        for eps in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, eps, None), float):
                yield _LeanNorm, (eps, False)
                yield _LeanNorm, (eps, True)
    if not parameters and children.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        for activation in ACTIVATIONS:
            yield _LeanMLP, activation


def _numbers() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and norm weights that tell the forms apart: signs, zero, large values, mixed precision."""
    x = torch.linspace(-3, 3, 51, device="cpu", dtype=torch.float32).pow(3).view(3, 17)
    weight = torch.linspace(-0.5, 1.5, 17, device="cpu", dtype=torch.float32)
    yield x, weight
    yield x.bfloat16(), weight.bfloat16()
    yield x.bfloat16(), weight


def _same_bits(module: nn.Module, lean: type[nn.Module], x: Tensor, weight: Tensor) -> bool:
    """Return whether the module's own forward and the lean one agree on `x`, with stand-ins for both."""
    stand_in = copy.copy(module)
    stand_in.training = True  # so that dropout in the forward shows
    if "act_fn" in stand_in._modules:
        projections = {"gate_proj": lambda t: t, "up_proj": lambda t: t + 1, "down_proj": lambda t: 2 * t}
        stand_in.__dict__["_modules"] = {**projections, "act_fn": stand_in.act_fn}
    else:
        stand_in.__dict__["_parameters"] = {"weight": weight}
    twin = copy.copy(stand_in)
    twin.__class__ = lean
    try:
        expected = type(module).forward(stand_in, x)
    except Exception:  # a forward that cannot run with the stand-ins has another form
        return False
    got = twin.forward(x)
    return isinstance(expected, Tensor) and expected.dtype == got.dtype and torch.equal(expected, got)


def _why_left_alone(module: nn.Module) -> str | None:
    """Return the reason for the warning, or None for modules that nobody expects to be replaced."""
    name = type(module).__name__
    if not any(word in name for word in ("RMSNorm", "MLP", "GLU", "GatedAct")):
        return None
    if "forward" in vars(module):
        return "its forward has been replaced on the instance (a hub kernel, an offload hook)"
    return "its forward is not one of the known forms"
