"""`Plan`: parameters, bytes by part and time of a run; `Planner` makes it from the recipe alone."""

from __future__ import annotations

__all__ = ["SHARDINGS", "Plan", "Planner", "cast_trained", "read_bytes"]

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from thawline.errors import ConfigError, did_you_mean
from thawline.planning.blueprint import Blueprint, draw_blueprint
from thawline.planning.devices import find_device
from thawline.planning.simulate import StepCost, simulate_step
from thawline.recipe import RunConfig
from thawline.training.objective import Objective
from thawline.training.trainer import Trainer
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
STORED = {"nf4": FOUR_BITS, "int8": 1.0}
"""Bytes of a weight by `base.quantization`."""


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


class Planner:
    """Plans of a recipe on a device, for batches of any size: its model is built once.

    Args:
        device: cpu, cuda, or a name of `DEVICES`. None: the one that `thawline train` would use.
        devices: number of devices, each with the recipe's batch.
        sharding: how they share the run, a key of `SHARDINGS`.
        half_adapter: what is trained has the base's type, where PEFT would keep float32.
        objective: the recipe's, with its rows, if there is one already.
    Raises: ConfigError: if the recipe cannot work.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        device: str | None = None,
        devices: int = 1,
        sharding: str = "ddp",
        half_adapter: bool = False,
        objective: Objective | None = None,
    ) -> None:
        if sharding not in SHARDINGS:
            raise ConfigError(f"Unknown sharding '{sharding}'. {did_you_mean(sharding, SHARDINGS)}")
        self.device, self.devices, self.sharding = find_device(device), devices, sharding
        if self.device.precision and config.training.precision == "auto" and not torch.cuda.is_available():
            training = dataclasses.replace(config.training, precision=self.device.precision)
            config = dataclasses.replace(config, training=training)
        self.blueprint = draw_blueprint(config, objective)
        if not any(p.requires_grad and p.numel() for p in self.blueprint.model.parameters()):
            raise ConfigError(f"`tuner: {config.tuner.method}` trains nothing: there is no step to plan.")
        if half_adapter:
            cast_trained(self.blueprint.model)
        self._sizes = _sizes(self.blueprint)
        self._costs: dict[Any, StepCost] = {}
        self._stored = STORED.get(getattr(config.base, "quantization", "none"), 0.0)

    def bytes(
        self,
        rows: int | None = None,
        length: int | None = None,
        *,
        accumulation: int = 0,
        quantised: bool = False,
    ) -> dict[str, int]:
        """Return the bytes by part, as in `Plan`.

        Args:
            rows: in a forward pass. None: the recipe's.
            length: tokens of a row. None: the recipe's.
            accumulation: forward passes of an optimiser step. 0: the recipe's.
            quantised: the frozen linear layers have four bits a weight.
        Raises: ConfigError: if the model's step depends on values.
        """
        keeps = (accumulation or self.blueprint.accumulation) > 1
        return self._parts(self._cost(rows, length, keeps), keeps, quantised)

    def plan(
        self,
        rows: int | None = None,
        length: int | None = None,
        *,
        accumulation: int = 0,
        quantised: bool = False,
    ) -> Plan:
        """Return the plan; arguments and errors as those of `bytes`."""
        blueprint, device = self.blueprint, self.device
        accumulation = accumulation or blueprint.accumulation
        parts = self.bytes(rows, length, accumulation=accumulation, quantised=quantised)
        cost = self._cost(rows, length, accumulation > 1)
        parameters = list(blueprint.model.parameters())
        seconds = device.seconds(cost, blueprint.autocast or parameters[0].dtype)
        updated = device.seconds_to_move(4 * parts["gradients"] + 2 * parts["optimizer"])
        assumptions = list(device.assumptions)
        if blueprint.uses_liger:
            assumptions.append("training.args.use_liger_kernel: planned without, it needs less")
        if self.devices > 1:
            assumptions.append(f"{self.devices} devices, {self.sharding}: communication takes no time")
        return Plan(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            bytes=parts,
            seconds_per_step=accumulation * seconds + updated,
            steps=self._steps(rows or blueprint.rows, accumulation),
            shape=blueprint.make_batch(rows or blueprint.rows, length)[1],
            device=device.name,
            assumptions=tuple(assumptions),
        )

    def _cost(self, rows: int | None, length: int | None, keeps: bool) -> StepCost:
        blueprint, key = self.blueprint, (rows, length, keeps)
        if key not in self._costs:
            self._costs[key] = simulate_step(
                blueprint.model,
                blueprint.make_batch(rows or blueprint.rows, length)[0],
                blueprint.loss,
                autocast=blueprint.autocast,
                on_gpu=self.device.on_gpu,
                keep_gradients=keeps,
            )
        return self._costs[key]

    def _parts(self, cost: StepCost, keep_gradients: bool, quantised: bool) -> dict[str, int]:
        sizes, n = dict(self._sizes), self.devices
        stored = FOUR_BITS if quantised else self._stored
        if stored:
            linears = {m for m in self.blueprint.model.modules() if _is_quantised(m)}
            sizes["weights"] -= sum(m.weight.nbytes for m in linears)
            sizes["quantised"] = int(stored * sum(m.weight.numel() for m in linears))
            # Columns are written into a dequantised copy: no original is kept.
            layers = _paca_layers(self.blueprint.model)
            sizes["tuner"] -= sum(_original_bytes(one) for one in layers if one.base_layer in linears)
        divided = SHARDINGS[self.sharding] if n > 1 else ()
        parts = {name: size // n if name in divided else size for name, size in sizes.items()}
        # DDP and ZeRO reduce gradients in buckets; sharded weights are gathered two blocks at a time.
        shared = sizes["weights"] // 16 if "weights" in divided else sizes["gradients"] if n > 1 else 0
        peak = cost.peak + (sizes["gradients"] if keep_gradients else 0)
        beyond = peak - cost.saved - cost.loss - sizes["gradients"]
        parts |= {
            "saved": cost.saved,
            "loss": cost.loss,
            "workspace": shared + max(0, beyond),
            "overhead": self.device.overhead,
            "reused": min(0, beyond),
        }
        return parts | {"total": sum(parts.values())}

    def _steps(self, rows: int, accumulation: int) -> int | None:
        blueprint = self.blueprint
        if blueprint.arguments.max_steps > 0:
            return blueprint.arguments.max_steps
        if blueprint.n_rows is None:
            return None
        return round(-(-blueprint.n_rows // (rows * accumulation * self.devices)) * blueprint.epochs)


def read_bytes(size: int | str) -> int:
    """Return a number of bytes, given as such or as "24GB" (10⁹) or "24GiB" (2³⁰). Raises: ConfigError."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size.lower())
    if found is None:
        raise ConfigError(f"'{size}' is no amount of memory. Write it as 24GB, 23.5GiB or 800MB.")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def _sizes(blueprint: Blueprint) -> dict[str, int]:
    """Return the bytes that live as long as the run, by part."""
    model = blueprint.model
    parameters, buffers = list(model.parameters()), list(model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    layers = _paca_layers(model)
    indices = [index for layer in layers for index in layer.thawline_paca_indices.values()]
    averaged = [*trained, *(b for b in buffers if b.is_floating_point())] if blueprint.averaged else []
    return {
        "weights": sum(p.nbytes for p in parameters),
        "quantised": 0,
        "buffers": sum(b.nbytes for b in buffers) - sum(i.nbytes for i in indices),
        # A layer keeps the indices twice: a new set can be loaded over the one in use.
        "tuner": sum(map(_original_bytes, layers)) + 2 * sum(i.nbytes for i in indices),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": _optimizer_bytes(blueprint, trained),
        "average": sum(t.nbytes for t in averaged),
    }


def _optimizer_bytes(blueprint: Blueprint, trained: list[nn.Parameter]) -> int:
    """Return the bytes of the optimiser's state, after a step on tensors without data."""
    if not trained:
        return 0
    kind, fields = Trainer.get_optimizer_cls_and_kwargs(blueprint.arguments, blueprint.model)
    twins = [torch.empty_like(p, device="meta").requires_grad_() for p in trained]
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    try:
        optimizer = kind(twins, **{name: value for name, value in fields.items() if name != "fused"})
        optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"`training.optimizer`: {kind.__name__} cannot be planned ({reason}). "
            "Plan with adamw_torch_fused."
        ) from error
    state = [value for values in optimizer.state.values() for value in values.values()]
    return sum(value.nbytes for value in state if isinstance(value, Tensor))


def cast_trained(model: nn.Module) -> None:
    """Give trained parameters the type of the frozen ones, where PEFT keeps float32. In place."""
    kept = next((p.dtype for p in model.parameters() if not p.requires_grad), None)
    for parameter in model.parameters():
        if parameter.requires_grad and kept is not None:
            parameter.data = parameter.data.to(kept)


def _paca_layers(model: nn.Module) -> list[PacaLayer]:
    return [module for module in model.modules() if isinstance(module, PacaLayer)]


def _original_bytes(layer: PacaLayer) -> int:
    size: int = layer.base_layer.weight.element_size()
    return size * sum(delta.numel() for delta in layer.thawline_paca_delta.values())


def _is_quantised(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell the linear layers of blocks from heads and adapters, which keep their type."""
    return (
        isinstance(module, nn.Linear) and not module.weight.requires_grad and min(module.weight.shape) >= 64
    )
