"""Methods of training one network that the benches compare, each set up as its users would."""

from __future__ import annotations

__all__ = ["METHODS", "ROUTED", "Adapt", "attach"]

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import peft
from torch import Tensor, nn

from thawline.errors import ConfigError, did_you_mean
from thawline.ops.lean import apply_lean


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """The parts of a network that are adapted, and the sizes of the adapters."""

    entry: str
    """The first module. Where frozen, its output is made to require a gradient, so that backward runs through
    the whole network with every method."""
    targets: str
    """`target_modules` of every tuner: "all-linear", or a regular expression over module names."""
    lora_parameters: tuple[str, ...] = ()
    """Parameters that LoRA adapts instead, where the targets are no modules to PEFT: fused experts."""
    lora_r: int = 8
    paca_r: int = 16
    dropout: float = 0.05
    """Dropout of LoRA, in the methods that have one."""
    head: str | None = None
    """Module trained in full beside every tuner, such as a new classification head."""
    task_type: str | None = None
    """Task type of the PEFT model. PEFT's Poly needs one to receive task ids."""
    n_tasks: int = 8
    """Rows of Poly's and MHR's routing tables; their rank is `lora_r`."""
    n_skills: int = 8
    n_heads: int = 8


def attach(method: str, model: nn.Module, adapt: Adapt) -> nn.Module:
    """Make `model` train by a method, in place; return the module to call.

    Raises:
        ConfigError: if `method` is not in `METHODS`.
    """
    if method not in METHODS:
        raise ConfigError(f"Unknown method '{method}'. {did_you_mean(method, METHODS)}")
    if method != "full":
        model.requires_grad_(False)
        model.get_submodule(adapt.entry).register_forward_hook(_require_grad)
    return METHODS[method](model, adapt)


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    first = output if isinstance(output, Tensor) else next(iter(output))
    if first.is_floating_point() and not first.requires_grad:
        first.requires_grad_()


def _frozen(model: nn.Module, adapt: Adapt) -> nn.Module:
    if adapt.head is not None:
        model.get_submodule(adapt.head).requires_grad_(True)
    return model


def _full(model: nn.Module, adapt: Adapt) -> nn.Module:
    return model.requires_grad_(True)


def _lora(model: nn.Module, adapt: Adapt, *, dropout: bool = False, fp32: bool = False) -> nn.Module:
    config = peft.LoraConfig(
        r=adapt.lora_r,
        lora_alpha=2 * adapt.lora_r,
        lora_dropout=adapt.dropout if dropout else 0.0,
        target_modules=[] if adapt.lora_parameters else adapt.targets,
        target_parameters=list(adapt.lora_parameters) or None,
        modules_to_save=[adapt.head] if adapt.head else None,
        task_type=adapt.task_type,
    )
    # PEFT's default keeps float32 adapters beside a half-precision base; users run both.
    return peft.get_peft_model(model, config, autocast_adapter_dtype=fp32)


def _paca(
    model: nn.Module, adapt: Adapt, *, lean: bool = False, mode: Literal["auto", "additive"] = "auto"
) -> nn.Module:
    from thawline.tuners import PacaConfig  # registers PaCA with PEFT: only where it is used

    config = PacaConfig(
        r=adapt.paca_r,
        mode=mode,
        target_modules=adapt.targets,
        modules_to_save=[adapt.head] if adapt.head else None,
        task_type=adapt.task_type,
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return apply_lean(adapted) if lean else adapted


def _poly(model: nn.Module, adapt: Adapt) -> nn.Module:
    """PEFT's own Poly, with as many splits as MHR has heads."""
    config = peft.PolyConfig(
        r=adapt.lora_r,
        n_tasks=adapt.n_tasks,
        n_skills=adapt.n_skills,
        n_splits=adapt.n_heads,
        target_modules=adapt.targets,
        task_type=adapt.task_type,
    )
    adapted = peft.get_peft_model(model, config)
    return adapted if adapt.task_type else adapted.base_model


def _mhr(model: nn.Module, adapt: Adapt) -> nn.Module:
    from thawline.tuners import MHRConfig, route_by_batch

    config = MHRConfig(
        r=adapt.lora_r,
        alpha=2.0 * adapt.lora_r,
        n_tasks=adapt.n_tasks,
        n_skills=adapt.n_skills,
        n_heads=adapt.n_heads,
        target_modules=adapt.targets,
        task_type=adapt.task_type,
    )
    return route_by_batch(peft.get_peft_model(model, config))


METHODS: dict[str, Callable[[nn.Module, Adapt], nn.Module]] = {
    "floor": _frozen,
    "full": _full,
    "lora": _lora,
    "lora_dropout": partial(_lora, dropout=True),
    "lora_fp32": partial(_lora, fp32=True),
    "lora_fp32_dropout": partial(_lora, fp32=True, dropout=True),
    "paca": _paca,
    "paca_lean": partial(_paca, lean=True),
    "paca_additive": partial(_paca, mode="additive"),
    "poly": _poly,
    "mhr": _mhr,
}
ROUTED = ("poly", "mhr")
"""Methods that take the task of every row."""
