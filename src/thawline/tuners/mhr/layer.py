"""`MHRLinear`: a frozen linear and its inventory of skills, mixed for the tasks of the batch.

In training, one autograd node runs the base and adds the mixture in place (`ops.mixing.low_rank_linear`). In
evaluation the mixed factors are kept, so that decoding pays two small products per layer. Under torch.compile
the same arithmetic is spelt out in plain torch, for the compiler to fuse.
"""

from __future__ import annotations

__all__ = ["MHRLinear", "layers_of", "linear_sizes"]

import math
import warnings
from typing import Any, NamedTuple, cast

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
from thawline.tuners._steps import n_steps
from thawline.tuners.mhr.config import MHRConfig
from thawline.tuners.mhr.ids import AVERAGE, Groups, Ids, read_ids
from thawline.tuners.mhr.routing import Router, logistic_noise
from thawline.tuners.mhr.state import TaskIds


class Mixed(NamedTuple):
    """Mixed factors of one group assignment, and the state of everything they were made from."""

    groups: Groups
    state: tuple[Any, ...]
    A: Tensor
    B: Tensor


class MHRLinear(nn.Module, ScaledLayer, BaseTunerLayer):
    """A linear (or GPT-2's Conv1D) that adds each task's mixture of skills to its frozen output.

    Attributes:
        mhr_A: per adapter, (S, I, r).     mhr_B: (S, O, r).
        mhr_router: the routing table, in the first layer that uses it; the other layers of its bin only refer
            to it, so that it is saved, trained and moved once.
    """

    adapter_layer_names = ("mhr_A", "mhr_B", "mhr_router")
    other_param_names = ("r", "scaling", "base_scaling", "routers", "mixed")

    def __init__(self, base_layer: nn.Module, name: str, task_ids: TaskIds) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.task_ids = task_ids
        self.in_features, self.out_features = linear_sizes(self.get_base_layer())
        self.mhr_A, self.mhr_B = nn.ParameterDict(), nn.ParameterDict()
        self.mhr_router = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.base_scaling: dict[str, float] = {}
        self.routers: dict[str, Router] = {}
        self.mixed: dict[str, Mixed] = {}
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
        """Draw skills A (S, I, r), and set their B (S, O, r) to 0, or draw it where `init_weights` is off."""
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
        """The base's output plus c · x Aᵗ Bᵗ for the task t of each row.

        Raises: RoutingError: if the model has task ids for other rows than these, or none.
        """
        if not (args or kwargs or torch.compiler.is_compiling()):
            y = self._add_made_mixture(x)
            if y is not None:
                return y
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = () if self.disable_adapters or self.merged else self.active_adapters
        names = [name for name in active if name in self.mhr_A]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        frozen = None if args or kwargs else self.frozen_base()
        y = self.base_layer(x, *args, **kwargs) if frozen is None else frozen
        for name in names:
            y = self._add(name, x, y)
        return y

    def _add_made_mixture(self, x: Tensor) -> Tensor | None:
        """The common forward, whose mixture was there when the model's began; `None` for anything uncommon.

        On small layers Python decides the time, so this checks no more than it must, and past
        Module.__getattr__.
        """
        shared, active = self.task_ids, self._active_adapter
        forward = shared.forward
        name = active if isinstance(active, str) else active[0] if len(active) == 1 else ""
        made = forward.mixtures.get((self, name))
        if (
            made is None
            or made.base is None
            or not shared.running
            or torch.is_grad_enabled() is not forward.differentiates
            or self._disable_adapters
            or self.merged_adapters
            or (forward.rows is not None and x.shape[0] != forward.rows)
            or self._modules["base_layer"].__dict__["_parameters"].get("weight") is not made.weight
            or made.A.dtype is not output_dtype(made.base, x)
        ):
            return None
        if forward.differentiates:
            return low_rank_linear(x, made.base, made.A, made.B)
        return apply_low_rank(made.base, x, made.A, made.B)

    def _add(self, name: str, x: Tensor, base: Tensor | FrozenLinear) -> Tensor:
        """Run the base, if that is still to do, and add what one adapter adds."""
        groups = self._groups(name, x)
        dropout = self.configs[name].dropout if self.training else 0.0
        if groups.by_token or dropout or torch.compiler.is_compiling():
            A, B = self._mix(name, groups, output_dtype(base, x))
            return self._apply_plainly(base, x, A, B, groups, dropout)
        dtype = output_dtype(base, x)
        made = self.task_ids.take((self, name), groups, dtype) if self.training else None
        if made is not None:
            return low_rank_linear(x, base, made.A, made.B)
        if self._differentiates(name, x):
            return low_rank_linear(x, base, *self._mix(name, groups, dtype))
        return apply_low_rank(base, x, *self.kept_mixture(name, groups, dtype))

    @staticmethod
    def _apply_plainly(
        base: Tensor | FrozenLinear,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        groups: Groups,
        dropout: float,
    ) -> Tensor:
        y = F.linear(x, *base) if isinstance(base, tuple) else base
        x = F.dropout(x, dropout) if dropout else x
        if groups.by_token:
            return apply_low_rank_by_token(y, x, A, B, groups.index)
        return apply_low_rank(y, x, A, B)

    def frozen_base(self) -> FrozenLinear | None:
        """Weight (O, I) and bias of a base that is a frozen linear and no more; `None` if it may be more."""
        base = self._modules["base_layer"]
        own, kind = base.__dict__, type(base)
        if (
            (kind is not nn.Linear and kind is not Conv1D)
            or "forward" in own  # accelerate replaces it
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            return None
        weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
        # A quantised weight is of a class of its own, which need not have a product with ∂y.
        if (
            type(weight) is not nn.Parameter
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        ):
            return None
        return (weight if kind is nn.Linear else weight.t()), bias

    def expected_dtype(self) -> torch.dtype | None:
        """The dtype of the base's output, as far as that can be said before it ran."""
        frozen = self.frozen_base()
        if frozen is None:
            return None
        kind = frozen[0].device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else frozen[0].dtype

    def _differentiates(self, name: str, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        A, router = self.mhr_A[name], self.routers[name]
        return (
            x.requires_grad
            or A.requires_grad
            or any(p.requires_grad for p in router.parameters(recurse=False))
        )

    @property
    def configs(self) -> dict[str, MHRConfig]:
        """Of every adapter, as they are now."""
        return self.task_ids.configs

    # Routing.

    def _groups(self, name: str, x: Tensor) -> Groups:
        """How the rows of x share routing rows."""
        if not self.routers[name].needs_ids:
            return AVERAGE
        return self.task_ids.groups(x, self.configs[name], self.training)

    def _weights(self, name: str, groups: Groups) -> Tensor | None:
        """Routing weights (U, H, S) of the rows that `groups` name."""
        router = self.routers[name]
        if not router.needs_ids:
            return None
        rows = groups.rows.to(self.mhr_A[name].device)
        noise = self._noise(name, rows) if self.training and self.configs[name].noise != "none" else None
        return router(rows, noise)

    def _noise(self, name: str, rows: Tensor) -> Tensor:
        """Drawn before the forward; here, and kept, only where a layer runs outside of one."""
        drawn, router = self.task_ids.forward.noise, self.routers[name]
        if (self, name) not in drawn or len(drawn[self, name]) != len(rows):
            drawn[self, name] = logistic_noise(len(rows), router.n_heads, router.n_skills, device=rows.device)
        return drawn[self, name].to(rows.device)

    # Mixing.

    def _mix(self, name: str, groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mixed factors, per group, or per distinct row where groups are tokens; B has the scale."""
        weights, A, B = self._weights(name, groups), self.mhr_A[name], self.mhr_B[name]
        scale = self.scaling[name]
        index = None if groups.index is None or groups.by_token else groups.index.to(A.device)
        if weights is None or torch.compiler.is_compiling():
            A, B = mix_skills(weights, A, dtype), mix_skills(weights, B, dtype, scale)
            return (A, B) if index is None else (A.index_select(0, index), B.index_select(0, index))
        mixed_A, mixed_B = mix_skills_of_many(weights[None], [A], [B], index, dtype, scale)
        return mixed_A, mixed_B

    def kept_mixture(self, name: str, groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`_mix`, computed once for the same ids and parameters. Training mode keeps nothing."""
        if self.training:
            return self._mix(name, groups, dtype)
        router = self.routers[name]
        state = (
            dtype,
            self.scaling[name],
            router.uniform_mix,
            n_steps(),
            *map(tensor_state, (self.mhr_A[name], self.mhr_B[name])),
        )
        state += tuple(map(tensor_state, router.state()))
        kept = self.mixed.get(name)
        if kept is None or kept.groups is not groups or kept.state != state:
            kept = self.mixed[name] = Mixed(groups, state, *self._mix(name, groups, dtype))
        return kept.A, kept.B

    def train(self, mode: bool = True) -> MHRLinear:
        """Switch mode and forget kept mixtures."""
        self.mixed.clear()
        self.task_ids.n_evals += not mode
        return super().train(mode)

    # Merging: one task at a time.

    @torch.no_grad()
    def low_rank_factors(self, adapter_name: str, task: str | int | None = None) -> tuple[Tensor, Tensor]:
        """One task's mixture as stock LoRA weights A (r, I) and B (O, r), exact, its scale within B.

        Args:
            task: an id, a name, "mean" for the average of the skills, or "usage" for their average weighted
                by how much the tasks use them. `None` where there is but one.
        Raises: RoutingError: for an unknown task, or none where there are several.
        """
        return self._factors(adapter_name, self.weights_of(adapter_name, task))

    def _factors(self, name: str, weights_HS: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = None if weights_HS is None else weights_HS[None]
        A, B = (mix_skills(weights, skills[name].detach())[0] for skills in (self.mhr_A, self.mhr_B))
        return A.T.contiguous(), B * self.scaling[name]

    def weights_of(self, name: str, task: str | int | None) -> Tensor | None:
        """Routing weights (H, S) that stand for `task` (see `low_rank_factors`); `None` for 1 / S."""
        router, config = self.routers[name], self.configs[name]
        if not router.needs_ids or task == "mean":
            return None
        device = self.mhr_A[name].device
        if task == "usage":
            weights = router(torch.arange(router.n_tasks, device=device))
            return None if weights is None else weights.mean(0)
        if task is None and router.n_tasks > 1:
            raise RoutingError(
                f"{router.n_tasks} tasks, and one LoRA can say one: give task=an id, a name, 'mean' or"
                " 'usage'."
            )
        weights = router(read_ids(0 if task is None else task, config, device).groups.rows)
        return None if weights is None else weights[0]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the base's weight that the one task of the current ids means, in the weight's shape,
        fp32.

        Raises: RoutingError: if the ids are of several tasks, or missing.
        """
        groups = self._merged_groups.get(adapter)
        if groups is None:
            groups = AVERAGE
            if self.routers[adapter].needs_ids:
                groups = self.task_ids.single(self.configs[adapter], self.mhr_A[adapter].device)
        return self._delta(adapter, groups)

    @torch.no_grad()
    def _delta(self, adapter: str, groups: Groups) -> Tensor:
        router = self.routers[adapter]
        weights = router(groups.rows) if router.needs_ids else None
        A, B = self._factors(adapter, None if weights is None else weights[0])
        return (B @ A).T if isinstance(self.get_base_layer(), Conv1D) else B @ A

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the one task that the current ids mean to the base's weight.

        Raises: RoutingError: if the ids are of several tasks, or missing. ConfigError: with `safe_merge`, if
            the merged weight holds NaN or infinity.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.mhr_A:
                continue
            groups = AVERAGE
            if self.routers[name].needs_ids:
                groups = self.task_ids.single(self.configs[name], self.mhr_A[name].device)
            weight = self._base_weight()
            merged = (weight + self._delta(name, groups).to(weight.device)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ConfigError(
                    f"NaN or infinity in the merged weight of '{self.name}': adapter {name!r} seems broken."
                )
            self.set_base_weight(merged)
            self._merged_groups[name] = groups
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base's weight again, to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self._base_weight()
            delta = self._delta(name, self._merged_groups.pop(name))
            self.set_base_weight((weight - delta.to(weight.device)).to(weight.dtype))

    def _base_weight(self) -> Tensor:
        """The base's weight, computed from its quantised one where PEFT knows how.

        Raises: ConfigError: where it does not.
        """
        backend, weight = self.quantization_backend, getattr(self.get_base_layer(), "weight", None)
        is_plain = weight is not None and type(weight) is nn.Parameter and weight.is_floating_point()
        if backend.supports_merge if backend is not None else is_plain:
            return self.get_base_weight()
        raise ConfigError(
            f"'{self.name}' is a {type(self.get_base_layer()).__name__}, whose quantised weight cannot be"
            " merged into. Write the task as a LoRA with thawline.to_lora, or load the base unquantised."
        )

    def check_merged(self, ids: Ids) -> None:
        """Raises: RoutingError: if the weights hold another task than `ids` mean."""
        for name, groups in self._merged_groups.items():
            merged = groups.rows.tolist()
            if self.routers[name].needs_ids and (ids.n_distinct > 1 or [ids.highest] != merged):
                raise RoutingError(
                    f"Task {merged[0]} is merged into the weights; other ids would be ignored. Call"
                    " model.unmerge_adapter() first."
                )

    # Adapters: choosing, freezing, scaling, removing.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, and trainable as far as their mode says."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.task_ids.n_changes += 1
        self._freeze_skills()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Train these adapters or not, as far as their mode says."""
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._freeze_skills()

    def _freeze_skills(self) -> None:
        for name in self.mhr_A:
            if self.configs[name].mode == "z":
                self.mhr_A[name].requires_grad_(False)
                self.mhr_B[name].requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        self.task_ids.forget(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """One task's update is a LoRA; `thawline.to_lora` writes it exactly."""
        return True

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As PEFT does, except that routing stays in fp32: a logit's step is lost in 16 bits."""
        router = self.mhr_router._modules.pop(adapter_name, None)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if router is not None:
            self.mhr_router._modules[adapter_name] = router
            if not any(p.is_meta for p in router.parameters()):
                router.to(self.mhr_A[adapter_name].device)

    def extra_repr(self) -> str:
        """Sizes of the adapters."""
        return ", ".join(
            f"{name}: {len(A)} skills of rank {self.r[name]}, {self.routers[name].n_heads} heads"
            for name, A in self.mhr_A.items()
        )


def layers_of(shared: TaskIds, adapter_name: str | None = None) -> list[MHRLinear]:
    """The layers that share it; with a name, those that have this adapter."""
    layers = cast(list[MHRLinear], shared.layers)
    return [layer for layer in layers if adapter_name is None or adapter_name in layer.routers]


def linear_sizes(base: nn.Module) -> tuple[int, int]:
    """In and out features of a linear layer, quantised ones and GPT-2's Conv1D included."""
    if isinstance(base, Conv1D):
        in_features, out_features = base.weight.shape
        return in_features, out_features
    return base.in_features, base.out_features


def output_dtype(base: Tensor | FrozenLinear, x: Tensor) -> torch.dtype:
    """The dtype that the base's output has, or will have."""
    if not isinstance(base, tuple):
        return base.dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base[0].dtype


def tensor_state(tensor: Tensor) -> tuple[int, ...]:
    """What changes when a tensor is written, replaced or moved. Fused optimisers leave no trace here."""
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
