"""Experts in one weight, taken apart into a layer for each of their products.

In transformers 5 the experts of Mixtral, Qwen-MoE, DeepSeek, gpt-oss and their like are parameters of three
dimensions of one module, which no tuner of modules reaches. `split_experts` puts a module in its place that
holds each such parameter, the same tensor, in a layer: `mlp.experts.gate_up_proj`, with a name to adapt it
by. `join_experts` puts the original back.

The products are those of transformers' grouped experts: rows sorted by expert, one product for all. So
outputs equal those of its default, `experts_implementation="grouped_mm"`, bit for bit, and of the others
within rounding. Kernels of other libraries (DeepGEMM, SonicMoE) do not run.
"""

from __future__ import annotations

__all__ = ["ExpertsLinear", "SplitExperts", "can_split", "join_experts", "split_experts"]

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from thawline.ops.grouped import grouped_product

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class ExpertsLinear(nn.Module):
    """One weight of all experts: rows, sorted by expert, are multiplied with that of theirs.

    Args:
        weight: (E, O, I), or (E, I, O) where `is_transposed`.
    """

    def __init__(self, weight: nn.Parameter, is_transposed: bool) -> None:
        super().__init__()
        self.weight = weight
        self.is_transposed = is_transposed

    def inputs_first(self, weight: Tensor) -> Tensor:
        """Return a view of such a weight as (E, I, O)."""
        return weight if self.is_transposed else weight.transpose(1, 2)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the products, (S, O).

        Args:
            x: (S, I), sorted by expert.
            ends: (E,), int32: where the rows of each expert end.
        """
        return grouped_product(x, self.inputs_first(self.weight), ends)


class SplitExperts(nn.Module):
    """Stands for a module of fused experts, with a layer for each product.

    Args:
        experts: a module of transformers that takes part in its `experts_implementation`.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self._original = (experts,)  # in a tuple: no module of this one
        for name, module in experts._modules.items():
            self.add_module(name, module)
        for name, buffer in experts._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in experts._non_persistent_buffers_set)
        for name, parameter in experts._parameters.items():
            if name in PROJECTIONS and parameter is not None:
                self.add_module(name, ExpertsLinear(parameter, experts.is_transposed))
            else:
                self.register_parameter(name, parameter)
            experts._parameters[name] = None  # held here alone

    def joined(self) -> nn.Module:
        """Return the original module, with the parameters as they are now."""
        (experts,) = self._original
        for name in experts._parameters:
            found = getattr(self, name)
            experts._parameters[name] = found.weight if isinstance(found, ExpertsLinear) else found
        return experts.train(self.training)

    def products(self) -> dict[str, nn.Module]:
        """Return the layers, or tuners' layers around them, by name."""
        return {name: module for name, module in self.named_children() if name in PROJECTIONS}

    @property
    def is_adapted(self) -> bool:
        """Return whether a tuner's layer is around one of the products."""
        return any(hasattr(module, "base_layer") for module in self.products().values())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the experts' outputs, weighted and summed, (T, I).

        Args:
            hidden_states: (T, I).
            top_k_index: (T, K): the experts of each token.
            top_k_weights: (T, K).
        """
        (experts,) = self._original
        n_chosen = top_k_index.shape[-1]
        expert_S, order = torch.sort(top_k_index.reshape(-1))
        counts = torch.histc(expert_S.float(), bins=experts.num_experts, min=0, max=experts.num_experts - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)

        def project(name: str, x: Tensor) -> Tensor:
            y: Tensor = getattr(self, name)(x, ends)
            return y + getattr(self, f"{name}_bias")[expert_S] if experts.has_bias else y

        x_S = hidden_states[order // n_chosen]
        if experts.has_gate:
            inner = experts._apply_gate(project("gate_up_proj", x_S))
        else:
            inner = experts.act_fn(project("up_proj", x_S))
        y_S = project("down_proj", inner) * top_k_weights.reshape(-1)[order, None]
        y_TK = y_S[torch.argsort(order)].view(len(hidden_states), n_chosen, -1)
        return y_TK.sum(1).to(hidden_states.dtype)


def split_experts(model: nn.Module, is_left_out: Callable[[str], bool]) -> None:
    """Put `SplitExperts` in the place of every module of fused experts, in place.

    Args:
        is_left_out: whether the weights of the module of this name shall stay as they are.
    """
    for name, module in list(model.named_modules()):
        if can_split(module) and not is_left_out(name):
            _replace(model, name, SplitExperts(module))


def join_experts(model: nn.Module, keep: Collection[str] = ()) -> None:
    """Put the original modules back where no tuner's layer is inside, in place.

    Args:
        keep: names of layers that are about to be adapted.
    """
    for name, module in list(model.named_modules()):
        is_kept = any(f"{name}.{leaf}" in keep for leaf in PROJECTIONS)
        if isinstance(module, SplitExperts) and not (is_kept or module.is_adapted):
            _replace(model, name, module.joined())


def can_split(module: nn.Module) -> bool:
    """Return whether a module is one of transformers' fused experts, whose forward is known."""
    known = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "num_experts"))
    weight = module._parameters.get("down_proj")
    return (
        known
        and weight is not None
        and weight.dim() == 3
        and not getattr(module, "has_post_expert_norm", False)
        and not getattr(module, "_is_expert_parallel", False)
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
