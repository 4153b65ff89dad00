"""Norms and gated MLPs that keep less for backward, bit-equal forward.

Beside a frozen model the linear layers keep nothing, so a block's memory is what sits between them:

| kept per token          | stock                                       | lean                     |
|-------------------------|---------------------------------------------|--------------------------|
| RMSNorm, half precision | x in float32; a second copy if it is trained | x as it came, one scalar |
| act(gate) · up          | gate, act(gate), up                         | gate, up                 |

The backward recomputes the rest: a multiply for the norm, the activation for the MLP. `apply_lean` swaps the
classes of a model's norms and MLPs in place: parameters, names, hooks and what PEFT put inside them stay.
A module is swapped only if its own forward, run on a few numbers, gives the lean version's bits; so a new
architecture needs no entry here, and one that computes anything else is left alone.

Liger and Unsloth recompute act(gate) too, in fused kernels; this is plain torch, on any device.
"""

from __future__ import annotations

__all__ = ["apply_lean", "lean_geglu", "lean_rms_norm", "lean_swiglu", "undo_lean"]

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

aten = torch.ops.aten

# Each activation with its vector-Jacobian product, as autograd itself calls it, so gradients keep their bits.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(aten.gelu_backward, approximate="tanh"),
    ),
}


def apply_lean(model: nn.Module) -> nn.Module:
    """Make every RMSNorm and gated MLP of `model` keep less for backward; the outputs keep their bits.

    Meant for decoder blocks of the Llama, Qwen2, Qwen3, Mistral and Gemma kind. In place, reversible
    (`undo_lean`), harmless to call twice. Works before or after `peft.get_peft_model`, with gradient
    checkpointing, autocast, `torch.compile` and DDP; `state_dict` and `save_pretrained` are unchanged.
    Second derivatives are not available.

    Args:
        model: any module; other kinds of norm and MLP are left alone, with a warning that names them.
    Returns: `model` itself.
    """
    left_alone: dict[str, str] = {}
    n_lean = 0
    for module in model.modules():
        if isinstance(module, _Lean):
            n_lean += 1
        elif (lean := _lean_version(module)) is not None:
            module.__class__ = lean
            n_lean += 1
        elif (reason := _why_left_alone(module)) is not None:
            left_alone[type(module).__name__] = reason
    if left_alone or not n_lean:
        detail = "; ".join(f"{name} ({reason})" for name, reason in sorted(left_alone.items()))
        warnings.warn(
            f"apply_lean made {n_lean} modules of {type(model).__name__} lean. Left alone, training as is: "
            f"{detail or 'everything, there being no RMSNorm and no gated MLP'}.",
            stacklevel=2,
        )
    return model


def undo_lean(model: nn.Module) -> nn.Module:
    """Give every module that `apply_lean` changed its own class back. In place; returns `model`."""
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
    out: Tensor = _RMSNorm.apply(x, weight, eps, unit_offset)
    return out


def lean_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, keeping gate and up but not silu(gate). Both (..., F); so is the result.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    out: Tensor = _GatedUnit.apply(gate, up, "silu")
    return out


def lean_geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """gelu(gate) · up, keeping gate and up but not gelu(gate). Both (..., F); so is the result.

    Args:
        approximate: "tanh" (Gemma) or "none", as in `torch.nn.functional.gelu`.
    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    out: Tensor = _GatedUnit.apply(gate, up, {"tanh": "gelu_tanh", "none": "gelu"}[approximate])
    return out


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
            # The scale depends on x: what of the gradient points along the normed x is taken out.
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
    """What the swapped classes share; each also derives from the class it replaces, so `isinstance` holds."""

    lean_origin: type[nn.Module]
    lean_kind: type[_Lean]
    lean_form: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # An unpickler cannot import the swapped class by name; it makes it again from what it can.
        return _empty, (self.lean_origin, self.lean_kind, self.lean_form), self.__dict__


class _LeanNorm(_Lean):
    def forward(self, hidden_states: Tensor) -> Tensor:
        eps, unit_offset = self.lean_form
        return lean_rms_norm(hidden_states, self.weight, getattr(self, eps), unit_offset=unit_offset)


class _LeanMLP(_Lean):
    def forward(self, x: Tensor) -> Tensor:
        # The projections are called, whatever they are by now: nn.Linear, quantised, or a tuner's layer.
        out: Tensor = self.down_proj(_GatedUnit.apply(self.gate_proj(x), self.up_proj(x), self.lean_form))
        return out


@functools.cache
def _lean_class(origin: Any, kind: Any, form: Any) -> type[nn.Module]:
    body = {"lean_origin": origin, "lean_kind": kind, "lean_form": form, "__module__": __name__}
    return type(f"Lean{origin.__name__}", (kind, origin), body)


def _empty(origin: Any, kind: Any, form: Any) -> Any:
    cls: Any = _lean_class(origin, kind, form)
    return cls.__new__(cls)


def _lean_version(module: nn.Module) -> type[nn.Module] | None:
    """The lean class that gives the bits of this module's own forward on a few numbers, if there is one."""
    origin: Any = type(module)
    for kind, form in _candidates(module):
        cls = _lean_class(origin, kind, form)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if all(_same_bits(module, cls, *numbers) for numbers in _numbers()):
                return cls
    return None


def _candidates(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """What the module may be, going by its parts."""
    if "forward" in vars(module) or type(module).__module__.startswith("torch."):
        return  # an instance's own forward would hide the lean one; torch's RMSNorm keeps no copy as it is
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return  # self and one tensor; a second argument would be lost
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
    """Inputs and norm weights that tell the forms apart: signs, zero, large values, mixed precision."""
    x = torch.linspace(-3, 3, 51, device="cpu", dtype=torch.float32).pow(3).view(3, 17)
    weight = torch.linspace(-0.5, 1.5, 17, device="cpu", dtype=torch.float32)
    yield x, weight
    yield x.bfloat16(), weight.bfloat16()
    yield x.bfloat16(), weight


def _same_bits(module: nn.Module, lean: type[nn.Module], x: Tensor, weight: Tensor) -> bool:
    """Whether the module's own forward and the lean one agree on `x`, with stand-ins for what both call."""
    stand_in = copy.copy(module)
    stand_in.training = True  # a dropout in the forward must show itself
    if "act_fn" in stand_in._modules:
        act = stand_in.act_fn
        parts = {
            "gate_proj": lambda t: t,
            "up_proj": lambda t: t + 1,
            "down_proj": lambda t: 2 * t,
            "act_fn": act,
        }
        stand_in.__dict__["_modules"] = parts
    else:
        stand_in.__dict__["_parameters"] = {"weight": weight}
    twin = copy.copy(stand_in)
    twin.__class__ = lean
    try:
        expected = type(module).forward(stand_in, x)
    except Exception:  # a forward that cannot take the stand-ins is of another kind
        return False
    got = twin.forward(x)
    return isinstance(expected, Tensor) and expected.dtype == got.dtype and torch.equal(expected, got)


def _why_left_alone(module: nn.Module) -> str | None:
    """The reason for the warning; None for modules that nobody would expect to be swapped."""
    name = type(module).__name__
    if not any(word in name for word in ("RMSNorm", "MLP", "GLU", "GatedAct")):
        return None
    if "forward" in vars(module):
        return "its forward has been replaced on the instance (a hub kernel, an offload hook)"
    return "its forward is not one of the known forms"
