"""`Plan`: parameters, bytes by part and time of a run, from its recipe alone."""

from __future__ import annotations

__all__ = ["SHARDINGS", "Plan", "cast_trained", "plan_run", "read_bytes"]

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thawline.errors import ConfigError, did_you_mean
from thawline.planning.blueprint import Blueprint, draw_blueprint
from thawline.planning.devices import find_device
from thawline.planning.simulate import StepCost, simulate_step
from thawline.recipe import RunConfig
from thawline.training.objective import Objective
from thawline.tuners.paca.layer import PacaLayer

SHARDINGS: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp2": ("optimizer", "gradients", "weights", "tuner"),
}
"""Sharding method → the parts of a run that it divides among the devices."""
FOUR_BITS = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes of a weight in bitsandbytes' nf4, doubly quantised: blocks of 64, their scales in blocks of 256."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Needs of a run on one device."""

    parameters: int
    """Parameters of the model, a tuner's included."""
    trained: int
    """Those of them that train."""
    bytes: Mapping[str, int]
    """Bytes by part. `weights`, `quantised`, `buffers`; `tuner`: originals and indices of PaCA's columns;
    `gradients`; `optimizer`; `average` of the weights; `saved` for backward, the loss's share included;
    `loss`: what logits and loss need beyond it; `workspace`: other passing tensors; `overhead` of the
    process; `reused`, negative: gradients that come where backward has freed something; `total`: their sum,
    the peak."""
    seconds_per_step: float
    """Time of an optimiser step."""
    steps: int | None
    """Optimiser steps of the run. None: the rows could not be read."""
    shape: str
    """The batch of a forward pass, in words."""
    device: str
    """Name of the device that the plan is for."""
    assumptions: tuple[str, ...] = field(default=())
    """Assumptions behind the numbers."""

    @property
    def seconds(self) -> float | None:
        """Time of all steps, without evaluation."""
        return None if self.steps is None else self.steps * self.seconds_per_step

    def fits(self, n_bytes: int | str) -> bool:
        """Return whether the peak is at most a number of bytes, or a size such as "24GB"."""
        return self.bytes["total"] <= read_bytes(n_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return {**dataclasses.asdict(self), "bytes": dict(self.bytes), "seconds": self.seconds}


def plan_run(
    config: RunConfig,
    *,
    length: int | None = None,
    device: str | None = None,
    devices: int = 1,
    sharding: str = "ddp",
    quantised: bool = False,
    half_adapter: bool = False,
    objective: Objective | None = None,
) -> Plan:
    """Plan a run without reading weights.

    Args:
        length: tokens of a row. None: `data.max_length`.
        device: cpu, cuda, or a name of `DEVICES`. None: the one that `thawline train` would use.
        devices: number of devices, each with the recipe's batch.
        sharding: how they share the run, a key of `SHARDINGS`.
        quantised: the frozen linear layers have four bits a weight.
        half_adapter: what is trained has the base's type, where PEFT would keep float32.
        objective: the recipe's, with its rows, if there is one already.
    Raises: ConfigError: if the recipe cannot work, or its model cannot be planned.
    """
    if sharding not in SHARDINGS:
        raise ConfigError(f"Unknown sharding '{sharding}'. {did_you_mean(sharding, SHARDINGS)}")
    machine = find_device(device)
    if machine.on_gpu and config.training.precision == "auto" and not torch.cuda.is_available():
        training = dataclasses.replace(config.training, precision=machine.precision)
        config = dataclasses.replace(config, training=training)
    blueprint = draw_blueprint(config, length=length, objective=objective)
    if half_adapter:
        cast_trained(blueprint.model)
    sizes = _sizes(blueprint, quantised=quantised)
    keeps = blueprint.accumulation > 1
    cost = simulate_step(
        blueprint.model, blueprint.batch, blueprint.loss, autocast=blueprint.autocast, on_gpu=machine.on_gpu,
        keep_gradients=keeps,
    )  # fmt: skip
    parts = _parts(sizes, cost, sharding, devices) | {"overhead": machine.overhead}
    peak = cost.peak + (sizes["gradients"] if keeps else 0)
    beyond = peak - cost.saved - cost.loss - sizes["gradients"]
    parts |= {"workspace": parts["workspace"] + max(0, beyond), "reused": min(0, beyond)}
    steps = _steps(blueprint, devices)
    parameters = list(blueprint.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    assumptions = [*machine.assumptions]
    if devices > 1:
        assumptions.append(f"{devices} devices, {sharding}: communication takes no time")
    return Plan(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        bytes=parts | {"total": sum(parts.values())},
        seconds_per_step=machine.seconds(cost, blueprint.autocast or _dtype(parameters))
        * blueprint.accumulation
        + machine.seconds_to_move(4 * sizes["gradients"] + 2 * sizes["optimizer"]),
        steps=steps,
        shape=blueprint.shape,
        device=machine.name,
        assumptions=tuple(assumptions),
    )


def read_bytes(size: int | str) -> int:
    """Return a number of bytes, given as such or as "24GB" (10⁹) or "24GiB" (2³⁰). Raises: ConfigError."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size.lower())
    if found is None:
        raise ConfigError(f"'{size}' is no amount of memory. Write it as 24GB, 23.5GiB or 800MB.")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def _sizes(blueprint: Blueprint, *, quantised: bool) -> dict[str, int]:
    """Return the bytes that live as long as the run."""
    model = blueprint.model
    parameters, buffers = list(model.parameters()), list(model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    weights, in_four_bits = sum(p.nbytes for p in parameters), 0
    if quantised:
        linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and _is_quantised(m)]
        in_four_bits = int(FOUR_BITS * sum(weight.numel() for weight in linears))
        weights -= sum(weight.nbytes for weight in linears)
    layers = [module for module in model.modules() if isinstance(module, PacaLayer)]
    indices = [index for layer in layers for index in layer.thawline_paca_indices.values()]
    originals = sum(
        delta.numel() * layer.base_layer.weight.element_size()
        for layer in layers
        for delta in layer.thawline_paca_delta.values()
    )
    averaged = [*trained, *(b for b in buffers if b.is_floating_point())] if blueprint.averaged else []
    return {
        "weights": weights,
        "quantised": in_four_bits,
        "buffers": sum(b.nbytes for b in buffers) - sum(i.nbytes for i in indices),
        # A layer keeps the indices twice: a new set can be loaded over the one in use.
        "tuner": originals + 2 * sum(i.nbytes for i in indices),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": _optimizer_bytes(blueprint, trained),
        "average": sum(t.nbytes for t in averaged),
    }


def _parts(sizes: Mapping[str, int], cost: StepCost, sharding: str, devices: int) -> dict[str, int]:
    """Return the bytes by part on one of several devices."""
    divided = SHARDINGS[sharding] if devices > 1 else ()
    parts = {name: size // devices if name in divided else size for name, size in sizes.items()}
    parts |= {"saved": cost.saved, "loss": cost.loss, "workspace": 0}
    if devices > 1:
        # DDP and ZeRO reduce gradients in buckets; sharded weights are gathered two blocks at a time.
        parts["workspace"] = sizes["gradients"]
        if "weights" in divided:
            parts["workspace"] = sizes["weights"] // 16
    return parts


def _optimizer_bytes(blueprint: Blueprint, trained: list[nn.Parameter]) -> int:
    """Return the bytes of the optimiser's state, after a step on tensors without data."""
    if not trained:
        return 0
    twins = [torch.empty_like(p, device="meta").requires_grad_() for p in trained]
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    fields = {name: value for name, value in blueprint.optimizer_fields.items() if name != "fused"}
    try:
        optimizer = blueprint.optimizer(twins, **fields)
        optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"`training.optimizer`: {blueprint.optimizer.__name__} cannot be planned ({reason}). "
            "Plan with adamw_torch_fused."
        ) from error
    state = [value for values in optimizer.state.values() for value in values.values()]
    return sum(value.nbytes for value in state if isinstance(value, Tensor))


def _steps(blueprint: Blueprint, devices: int) -> int | None:
    if blueprint.max_steps is not None:
        return blueprint.max_steps
    if blueprint.n_rows is None:
        return None
    per_step = blueprint.rows * blueprint.accumulation * devices
    return round(-(-blueprint.n_rows // per_step) * blueprint.epochs)


def cast_trained(model: nn.Module) -> None:
    """Give trained parameters the type of the frozen ones, where PEFT keeps float32. In place."""
    kept = next((p.dtype for p in model.parameters() if not p.requires_grad), None)
    for parameter in model.parameters():
        if parameter.requires_grad and kept is not None:
            parameter.data = parameter.data.to(kept)


def _is_quantised(module: nn.Linear) -> bool:
    """Tell the linear layers of blocks from heads and adapters, which keep their type."""
    return not module.weight.requires_grad and min(module.weight.shape) >= 64


def _dtype(parameters: list[nn.Parameter]) -> torch.dtype:
    return parameters[0].dtype if parameters else torch.float32
