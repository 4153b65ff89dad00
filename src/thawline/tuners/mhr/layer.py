"""`MHRLinear`: a frozen linear and its inventory of skills, mixed for the tasks of the batch.

A layer adds the mixture that was prepared where the model's forward began (prepare.py), or mixes its skills
itself. With gradients, one autograd node runs the base and adds the update in place
(`ops.mixing.low_rank_linear`). Under torch.compile the same arithmetic is plain torch, for the compiler to
fuse.
"""

from __future__ import annotations

__all__ = ["MHRLinear", "find_layers", "linear_sizes"]

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thawline.errors import ConfigError, RoutingError
from thawline.ops.mixing import (
    FrozenLinear,
    apply_low_rank,
    apply_low_rank_by_token,
    low_rank_linear,
    mix_skills,
    mix_skills_of_many,
)
from thawline.tuners._scaling import ScaledLayer
from thawline.tuners._tuner import BROKEN
from thawline.tuners.mhr.config import MHRConfig
from thawline.tuners.mhr.ids import AVERAGE, Groups, Ids, read_ids
from thawline.tuners.mhr.routing import Router, logistic_noise
from thawline.tuners.mhr.state import Mixture, RoutingState


class MHRLinear(nn.Module, ScaledLayer, BaseTunerLayer):
    """A linear (or GPT-2's Conv1D) that adds each task's mixture of skills to its frozen output.

    Attributes:
        mhr_A: per adapter, (S, I, r).     mhr_B: (S, O, r).
        mhr_router: the routing table, in the first layer that uses it; other layers that share it only refer
            to it (`routers`), so that it is saved, trained and moved once.
    """

    adapter_layer_names = ("mhr_A", "mhr_B", "mhr_router")
    other_param_names = ("r", "scaling", "base_scaling", "routers")

    def __init__(self, base_layer: nn.Module, name: str, state: RoutingState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.state = state
        self.in_features, self.out_features = linear_sizes(self.get_base_layer())
        self.mhr_A, self.mhr_B = nn.ParameterDict(), nn.ParameterDict()
        self.mhr_router = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.base_scaling: dict[str, float] = {}
        self.routers: dict[str, Router] = {}
        self.merged_adapters: list[str] = []
        self._merged_groups: dict[str, Groups] = {}
        self.training = base_layer.training  # an evaluating model stays one: no noise, and mixtures are kept

    def update_layer(
        self, adapter_name: str, config: MHRConfig, router: Router, owns_router: bool, r: int, alpha: float
    ) -> None:
        """Add an adapter, its skills initialised as `config` says."""
        self.r[adapter_name] = r
        self.scaling[adapter_name] = self.base_scaling[adapter_name] = alpha / r
        self.routers[adapter_name] = router
        if owns_router:
            self.mhr_router[adapter_name] = router
        self.mhr_A[adapter_name] = nn.Parameter(torch.empty(config.n_skills, self.in_features, r))
        self.mhr_B[adapter_name] = nn.Parameter(torch.empty(config.n_skills, self.out_features, r))
        self.init_skills(adapter_name, self.mhr_A[adapter_name], self.mhr_B[adapter_name])
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def init_skills(self, adapter_name: str, A: Tensor, B: Tensor) -> None:
        """Draw A (S, I, r) of new skills; set their B (S, O, r) to 0, or draw it if `init_weights` is off."""
        config = self.configs[adapter_name]
        fan = {"lora": 1.0, "mttl": 1 / 3, "peft": self.routers[adapter_name].n_heads}[config.a_init]
        bound = math.sqrt(fan / self.in_features)
        A.uniform_(-bound, bound)
        if config.init_weights:
            B.zero_()
        else:
            bound = 1 / math.sqrt(self.r[adapter_name])
            B.uniform_(-bound, bound)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus c · x Aᵗ Bᵗ for the task t of each row.

        Raises: RoutingError: if the model has task ids for other rows than these, or none.
        """
        is_plain_call = not (args or kwargs)
        if is_plain_call and not torch.compiler.is_compiling():
            y = self._add_prepared(x)
            if y is not None:
                return y
        names = self._names_to_add()
        frozen = self.frozen_base() if names and is_plain_call else None
        y = self.base_layer(x, *args, **kwargs) if frozen is None else frozen
        for name in names:
            y = self._add(name, x, y)
        return y

    def _names_to_add(self) -> list[str]:
        """Return the adapters whose update the forward adds; unmerge where adapters are switched off."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = () if self.disable_adapters or self.merged else self.active_adapters
        return [name for name in active if name in self.mhr_A]

    def _add_prepared(self, x: Tensor) -> Tensor | None:
        """Apply the prepared mixture of the only active adapter; return `None` for anything less common.

        On small layers Python decides the time, so this checks no more than it must, past
        Module.__getattr__.
        """
        state, active = self.state, self._active_adapter
        forward = state.forward
        name = active if isinstance(active, str) else active[0] if len(active) == 1 else ""
        mixture = forward.mixtures.get((self, name))
        if (
            mixture is None
            or x.shape[0] != forward.rows
            or torch.is_grad_enabled() is not forward.grad_enabled
            or not state.running
            or self._disable_adapters
            or self.merged_adapters
        ):
            return None
        base = self.frozen_base()
        if base is None or mixture.A.dtype is not output_dtype(base, x):
            return None
        apply = low_rank_linear if forward.grad_enabled else apply_low_rank
        return apply(base, x, mixture.A, mixture.B)

    def _add(self, name: str, x: Tensor, base: Tensor | FrozenLinear) -> Tensor:
        """Run the base, if that is still to do, and add the update of one adapter."""
        config = self.configs[name]
        groups = AVERAGE if config.router == "uniform" else self.state.groups(x, config, self.training)
        dropout = config.dropout if self.training else 0.0
        is_compiling = torch.compiler.is_compiling()
        _, A, B = (self.mix if is_compiling else self._mixture)(name, groups, output_dtype(base, x))
        if not (groups.by_token or dropout or is_compiling):
            return (low_rank_linear if torch.is_grad_enabled() else apply_low_rank)(base, x, A, B)
        y = F.linear(x, *base) if isinstance(base, tuple) else base
        x = F.dropout(x, dropout) if dropout else x
        if groups.by_token:
            return apply_low_rank_by_token(y, x, A, B, groups.index)
        return apply_low_rank(y, x, A, B)

    def frozen_base(self) -> FrozenLinear | None:
        """Return weight (O, I) and bias of a base that is exactly a frozen linear, `None` for any other."""
        base = self._modules["base_layer"]
        own, kind = base.__dict__, type(base)
        if (
            kind not in FROZEN_WEIGHTS
            or "forward" in own  # accelerate replaces it
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            return None
        weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
        # A quantised or sharded weight has a class of its own, which may lack a product with ∂y.
        if (
            type(weight) is not nn.Parameter
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        ):
            return None
        return FROZEN_WEIGHTS[kind](weight), bias

    def expected_dtype(self) -> torch.dtype | None:
        """Return the dtype that the base's output will have, `None` where only running it can tell."""
        frozen = self.frozen_base()
        return None if frozen is None else output_dtype(frozen, frozen[0])

    @property
    def configs(self) -> dict[str, MHRConfig]:
        """Current config of every adapter."""
        return self.state.configs

    # Mixing.

    def _mixture(self, name: str, groups: Groups, dtype: torch.dtype) -> Mixture:
        """Take the forward's mixture, or mix, and leave the mixture to later forwards where they are kept."""
        place, state = (self, name), self.state
        found = state.prepared(place, groups, dtype)
        if found is not None:
            return found
        forward = state.forward
        is_kept = forward.keeps and state.running and not self.training
        if not is_kept or torch.is_grad_enabled() is not forward.grad_enabled:
            return self.mix(name, groups, dtype)
        with torch.inference_mode(False), torch.no_grad():  # a forward with gradients may use it too
            found = forward.mixtures[place] = self.mix(name, groups, dtype)
        return found

    def mix(self, name: str, groups: Groups, dtype: torch.dtype) -> Mixture:
        """Mix the skills per group, or per distinct row where groups are tokens; B includes the scale."""
        A, B, router, scale = self.mhr_A[name], self.mhr_B[name], self.routers[name], self.scaling[name]
        weights = None
        if router.needs_ids:
            rows = groups.rows.to(A.device)
            is_noisy = self.training and self.configs[name].noise != "none"
            weights = router(rows, self._noise(name, rows) if is_noisy else None)
        index = None if groups.index is None or groups.by_token else groups.index.to(A.device)
        if weights is None or torch.compiler.is_compiling():
            mixed = mix_skills(weights, A, dtype), mix_skills(weights, B, dtype, scale)
            if index is not None:
                mixed = mixed[0].index_select(0, index), mixed[1].index_select(0, index)
        else:
            mixed = mix_skills_of_many(weights[None], [A], [B], index, dtype, scale)
        return Mixture(groups, *mixed)

    def _noise(self, name: str, rows: Tensor) -> Tensor:
        """Return the forward's noise; draw and keep it only where a layer runs outside a forward."""
        drawn, router = self.state.forward.noise, self.routers[name]
        if (self, name) not in drawn or len(drawn[self, name]) != len(rows):
            drawn[self, name] = logistic_noise(len(rows), router.n_heads, router.n_skills, device=rows.device)
        return drawn[self, name].to(rows.device)

    def train(self, mode: bool = True) -> MHRLinear:
        """Switch between training and evaluation, and forget kept mixtures."""
        self.state.n_changes += not (mode and self.training)
        return super().train(mode)

    # Exporting and merging: one task at a time.

    @torch.no_grad()
    def low_rank_factors(self, adapter_name: str, task: str | int | None = None) -> tuple[Tensor, Tensor]:
        """Return one task's mixture as stock LoRA weights A (r, I) and B (O, r); exact, B has the scale.

        Args:
            task: an id, a name, "mean" for the average of the skills, or "usage" for their average weighted
                by how much the tasks use them. `None` if there is only one.
        Raises: RoutingError: for an unknown task, or `None` if there are several.
        """
        weights_HS = self.weights_of(adapter_name, task)
        return self._factors(adapter_name, None if weights_HS is None else weights_HS[None])

    def weights_of(self, name: str, task: str | int | None) -> Tensor | None:
        """Return routing weights (H, S) of a task (see `low_rank_factors`); `None` for 1 / S everywhere."""
        router, device = self.routers[name], self.mhr_A[name].device
        if not router.needs_ids or task == "mean":
            return None
        if task == "usage":
            return router(torch.arange(router.n_tasks, device=device)).mean(0)
        if task is None and router.n_tasks > 1:
            raise RoutingError(
                f"The adapter has {router.n_tasks} tasks, and a LoRA holds one: give task=an id, a name,"
                " 'mean' or 'usage'."
            )
        return router(read_ids(0 if task is None else task, self.configs[name], device).groups.rows)[0]

    def _factors(self, name: str, weights_1HS: Tensor | None) -> tuple[Tensor, Tensor]:
        A, B = (mix_skills(weights_1HS, skills[name].detach())[0] for skills in (self.mhr_A, self.mhr_B))
        return A.T.contiguous(), B * self.scaling[name]

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the change of the base's weight for the one task of the current ids, in its shape, fp32.

        Raises: RoutingError: if the ids are of several tasks, or missing.
        """
        rows = self._single_task(adapter).rows.to(self.mhr_A[adapter].device)
        A, B = self._factors(adapter, self.routers[adapter](rows))
        return (B @ A).T if isinstance(self.get_base_layer(), Conv1D) else B @ A

    def _single_task(self, name: str) -> Groups:
        """Return the routing row of the merged task, or else of the current ids."""
        if name in self._merged_groups or not self.routers[name].needs_ids:
            return self._merged_groups.get(name, AVERAGE)
        return self.state.single_task(self.configs[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the one task that the current ids stand for to the base's weight.

        Raises: RoutingError: if the ids are of several tasks, or missing. ConfigError: with `safe_merge`, if
            the merged weight holds NaN or infinity.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.mhr_A:
                continue
            groups, merged = self._single_task(name), self._changed_weight(name, 1)
            if safe_merge and not torch.isfinite(merged).all():
                raise ConfigError(BROKEN.format(name, self.name))
            self.set_base_weight(merged)
            self._merged_groups[name] = groups
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged adapters from the base's weight, exact to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self.set_base_weight(self._changed_weight(name, -1))
            del self._merged_groups[name]

    @torch.no_grad()
    def _changed_weight(self, name: str, sign: int) -> Tensor:
        """Return the base's weight, dequantised where PEFT can, plus or minus the task's change.

        Raises: ConfigError: for a quantised weight that PEFT cannot write back.
        """
        backend, weight = self.quantization_backend, getattr(self.get_base_layer(), "weight", None)
        is_plain = weight is not None and type(weight) is nn.Parameter and weight.is_floating_point()
        if not (backend.supports_merge if backend is not None else is_plain):
            raise ConfigError(
                f"'{self.name}' is a {type(self.get_base_layer()).__name__}, whose quantised weight cannot be"
                " merged into. Write the task as a LoRA with thawline.to_lora, or load the base unquantised."
            )
        weight = self.get_base_weight()
        return weight.add(self.get_delta_weight(name).to(weight.device), alpha=sign).to(weight.dtype)

    def check_merged(self, ids: Ids) -> None:
        """Raises: RoutingError: if another task than `ids` stand for is merged into the weights."""
        for name, groups in self._merged_groups.items():
            merged = groups.rows.tolist()
            if self.routers[name].needs_ids and (ids.n_distinct > 1 or [ids.highest] != merged):
                raise RoutingError(
                    f"Task {merged[0]} is merged into the weights; other ids would be ignored. Call"
                    " model.unmerge_adapter() first."
                )

    # Adapters: choosing, freezing, scaling, removing.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters and make them trainable, except the skills in mode z."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.state.n_changes += 1
        self._freeze_skills()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Make these adapters trainable or frozen, except the skills in mode z, which stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._freeze_skills()

    def _freeze_skills(self) -> None:
        for name in self.mhr_A:
            if self.configs[name].mode == "z":
                self.mhr_A[name].requires_grad_(False)
                self.mhr_B[name].requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        super().delete_adapter(adapter_name)
        self.state.delete(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: one task's update is a LoRA, which `thawline.to_lora` writes exactly."""
        return True

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Keep skills and routing in `dtype`, where a user asks for it (`autocast_adapter_dtype=False`)."""
        for skills in (self.mhr_A, self.mhr_B):
            if adapter_name in skills:
                skills[adapter_name].data = skills[adapter_name].to(dtype)
        if adapter_name in self.mhr_router:
            self.mhr_router[adapter_name].to(dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move the adapter as PEFT does, but keep routing in fp32: a logit's step is lost in 16 bits."""
        router = self.mhr_router._modules.pop(adapter_name, None)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if router is not None:
            self.mhr_router._modules[adapter_name] = router
            if not any(p.is_meta for p in router.parameters()):
                router.to(self.mhr_A[adapter_name].device)

    def extra_repr(self) -> str:
        """Return the adapters' sizes."""
        return ", ".join(
            f"{name}: {len(A)} skills of rank {self.r[name]}, {self.routers[name].n_heads} heads"
            for name, A in self.mhr_A.items()
        )


FROZEN_WEIGHTS: dict[type, Callable[[Tensor], Tensor]] = {
    nn.Linear: lambda weight: weight,
    Conv1D: Tensor.t,
    nn.Conv2d: lambda weight: weight.flatten(1),
}
"""Class of a base whose product with a frozen weight runs here → that weight as (O, I)."""


def find_layers(model: nn.Module) -> Iterator[tuple[str, MHRLinear]]:
    """Yield every MHR layer of the model with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MHRLinear))


def linear_sizes(base: nn.Module) -> tuple[int, int]:
    """Return in and out features of a linear layer, including quantised ones and GPT-2's Conv1D.

    For a convolution: its channels.
    """
    if isinstance(base, Conv1D):
        return tuple(base.weight.shape)
    if isinstance(base, nn.Conv2d):
        return base.in_channels, base.out_channels
    return base.in_features, base.out_features


def output_dtype(base: Tensor | FrozenLinear, x: Tensor) -> torch.dtype:
    """Return the dtype that the base's output has, or will have."""
    if not isinstance(base, tuple):
        return base.dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base[0].dtype
