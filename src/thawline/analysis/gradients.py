"""Alignment of tasks: inner products of their gradients on the parameters they share.

Caccia et al. 2023 (arXiv 2211.03831) explain routing by the alignment of gradients between training tasks,
but the released code does not measure it, and the ranking of methods depends on how it is measured. Here:

· Routing logits are left out. Different tasks have different rows: they would only make gradients longer.
· Two spaces. *Skill* space is what the optimiser sees, the gradients of the shared parameters themselves;
  two tasks that use different skills are orthogonal there, whatever they learn. *Effective* space is the
  gradients of each task's own mixed factors Aᵗ and Bᵗ, as if each were a LoRA; the overlap of two tasks'
  routes does not count. Where nothing is mixed (LoRA, PaCA, full fine-tuning) the two are the same.
· Noise and dropout are off (evaluation mode), and every method gets the same batches.
· Two numbers, the mean cosine c over pairs of T tasks and the coherence ‖mean g/|g|‖² = (1 + (T − 1) c) / T.
  Tasks whose gradients cancel, as at the optimum of a shared adapter, have c = −1/(T − 1) and coherence 0;
  orthogonal ones c = 0 and coherence 1/T. Compare with these, not with −1 and 1.
· One step says little: all tasks are aligned at first, and none at the end. Average over the trajectory
  (`thawline.analysis.recorder`).

Under Poly and MHR a skill's gradient is that of the mixed factor times the skill's weight, head by head:

    ∂A_s^(q) = α_qs G^(q)     so     G^(q) = Σ_s α_qs ∂A_s^(q) / Σ_s α_qs²

and <∂A of task i, of task j> = Σ_q <α_i,q , α_j,q> <G_i^(q), G_j^(q)>: one backward pass per task gives both
spaces, and only G, 1/S of the skills' size, is kept.

Axes: T tasks, H heads, S skills, D features of a factor, R rank, F = D/H · R.
"""

from __future__ import annotations

__all__ = [
    "Agreement",
    "Alignment",
    "Batches",
    "Loss",
    "check_alignable",
    "effective_gradient",
    "gradient_alignment",
    "plain_batch",
]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from thawline.errors import ConfigError
from thawline.tuners.mhr.layer import MHRLinear, find_layers
from thawline.tuners.mhr.task_ids import set_task_ids

Batches = Mapping[str, Any] | Mapping[int, Any]
Loss = Callable[[nn.Module, Any], Tensor]

KEEP_BYTES = 2**30


@dataclass(frozen=True, eq=False)
class Agreement:
    """Agreement of the directions of T gradients.

    Attributes:
        cosines: (T, T), fp64. A gradient of length 0 has cosine 0 with every other.
        norms: (T,), fp64, lengths of the gradients.
    """

    cosines: Tensor
    norms: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> Agreement:
        """Build from the gradients' inner products, (T, T)."""
        norms = gram.diagonal().clamp(min=0).sqrt()
        lengths = norms.where(norms > 0, torch.inf)
        return cls(gram / lengths[:, None] / lengths, norms)

    @property
    def mean_cosine(self) -> float:
        """Mean over all pairs of different tasks; −1/(T − 1) where the gradients cancel."""
        n = len(self.norms)
        return float((self.cosines.sum() - self.cosines.trace()) / (n * (n - 1)))

    @property
    def coherence(self) -> float:
        """‖mean g/|g|‖²: 1 for gradients of one direction, 1/T for orthogonal ones, 0 where they cancel."""
        return float(self.cosines.mean())


@dataclass(frozen=True, eq=False)
class Alignment:
    """Agreement of the tasks' gradients in both spaces (see the top of this file)."""

    tasks: tuple[str, ...]
    skill: Agreement
    effective: Agreement

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, with the values of cancelling and orthogonal gradients to compare with."""
        n = len(self.tasks)
        return {
            space: {"mean_cosine": found.mean_cosine, "coherence": found.coherence}
            for space, found in (("skill", self.skill), ("effective", self.effective))
        } | {"n_tasks": n, "cosine_if_cancelling": -1 / (n - 1), "coherence_if_orthogonal": 1 / n}


def gradient_alignment(
    model: nn.Module, batches: Batches, loss: Loss | None = None, *, keep_bytes: int = KEEP_BYTES
) -> Alignment:
    """Measure the agreement of tasks' gradients on all trainable parameters except the routing.

    The model is left unchanged: mode, task ids, `.grad` and random numbers. Works on LoRA and most other
    methods of PEFT, PaCA, full fine-tuning, MHR and Poly.

    Args:
        model: in fp32 or better where small cosines matter.
        batches: for each task a batch, or a list of batches whose gradients are averaged. Use large ones: the
            result holds the tasks' disagreement and the sampling noise together. With MHR, the keys are ids
            or names of the routing table, and task ids are set from them.
        loss: function of model and batch, averaged over rows. None: `model(**batch).loss`.
        keep_bytes: maximum memory for the gradients of all tasks. Beyond it parameters are measured in
            groups, with one backward pass per task and group.
    Raises: ConfigError: if no parameter that tasks share is trainable, fewer than two tasks are given, or
        parameters are sharded. RoutingError: for a task that is not in the routing table.
    """
    check_alignable(model, batches)
    loss = loss or model_loss
    parts = _shared_parts(model)
    routed = any(part.layer is not None for part in parts)
    skill = effective = torch.zeros(len(batches), len(batches), dtype=torch.float64)
    with _evaluation_mode(model):
        for group in _groups(parts, keep_bytes // (4 * len(batches))):
            kept: list[list[Tensor]] = [[] for _ in group]
            # disable=None: no bar where stderr is not a terminal.
            bar = tqdm(total=len(batches), desc="alignment", unit="task", leave=False, delay=2, disable=None)
            with bar:
                for task, batch in batches.items():
                    with set_task_ids(model, task) if routed else nullcontext():
                        gradients = _gradients(model, group, batch, loss)
                    for part, rows, gradient in zip(group, kept, gradients, strict=True):
                        rows.append(part.own_gradient(gradient, task))
                    bar.update()
            for part, rows in zip(group, kept, strict=True):
                if sum(bool(row.any()) for row in rows) == 1:
                    continue  # a single task uses it, such as the class heads of a detector's dataset
                gram_HTT = _gram(torch.stack(rows, 1))
                effective = effective + gram_HTT.sum(0)
                skill = skill + (gram_HTT * part.overlap(tuple(batches))).sum(0)
    return Alignment(tuple(map(str, batches)), Agreement.of(skill), Agreement.of(effective))


def check_alignable(model: nn.Module, batches: Batches) -> None:
    """Check before training that `gradient_alignment` can measure. Raises: ConfigError: if not."""
    if len(batches) < 2:
        raise ConfigError(f"Alignment is between tasks; got batches of {len(batches)}. Give two or more.")
    _shared_parts(model)


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return `model(**batch).loss`, with the batch on the model's device."""
    return model(**plain_batch(model, batch)).loss


def plain_batch(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch on the model's device, without its task ids: the caller sets those of the task."""
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if not name.endswith("task_ids")
    }


def effective_gradient(gradient_SDR: Tensor, weights_HS: Tensor) -> Tensor:
    """Return the gradient (H, F) of a mixed factor, from that of the skills it was mixed from.

    Exact where all rows of the batch used `weights_HS`; a least-squares estimate otherwise.
    """
    n_heads, n_skills = weights_HS.shape
    heads_HSF = gradient_SDR.reshape(n_skills, n_heads, -1).transpose(0, 1)
    return (weights_HS[:, None] @ heads_HSF)[:, 0] / weights_HS.square().sum(-1, keepdim=True)


class _Part:
    """A parameter that tasks share, whole or as the skills of a layer that each task mixes."""

    def __init__(self, parameter: nn.Parameter, layer: MHRLinear | None = None, adapter: str = "") -> None:
        self.parameter, self.layer, self.adapter = parameter, layer, adapter
        self.n_skills = 1 if layer is None else len(parameter)
        self.size = parameter.numel() // self.n_skills

    def own_gradient(self, gradient: Tensor, task: str | int) -> Tensor:
        """Return the gradient of the task's own mixture, (H, F)."""
        weights_HS = self._weights(task)
        return effective_gradient(gradient, weights_HS.to(gradient))

    def overlap(self, tasks: tuple[str | int, ...]) -> Tensor:
        """Return the inner products of the tasks' weights, (H, T, T)."""
        weights_THS = torch.stack([self._weights(task) for task in tasks]).double().cpu()
        return torch.einsum("ihs,jhs->hij", weights_THS, weights_THS)

    @torch.no_grad()
    def _weights(self, task: str | int) -> Tensor:
        weights = None if self.layer is None else self.layer.weights_of(self.adapter, task)
        return torch.full((1, self.n_skills), 1 / self.n_skills) if weights is None else weights


def _shared_parts(model: nn.Module) -> list[_Part]:
    """Return the trainable parameters without the routing."""
    for config in getattr(model, "peft_config", {}).values():
        if str.__eq__(config.peft_type, "POLY"):
            raise ConfigError(
                "The mixtures of PEFT's Poly cannot be read. Convert the adapter with thawline.from_poly."
            )
    skills: dict[nn.Parameter, _Part] = {}
    routing: set[nn.Parameter] = set()
    for _, layer in find_layers(model):
        for router in layer.routers.values():
            routing.update(router.parameters())
        for factors in (layer.mhr_A, layer.mhr_B):
            skills |= {one: _Part(one, layer, adapter) for adapter, one in factors.items()}
    trained = [p for p in model.parameters() if p.requires_grad and p not in routing]
    if not trained:
        raise ConfigError(
            "No parameter that tasks share is trainable: measure before the model is frozen, or after "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    if any(hasattr(parameter, "full_tensor") for parameter in trained):
        raise ConfigError("Parameters are sharded over processes. Measure on an unsharded model.")
    return [skills.get(parameter) or _Part(parameter) for parameter in trained]


def _groups(parts: list[_Part], most: int) -> Iterator[list[_Part]]:
    """Yield the parts in order, in groups of at most `most` numbers per task and at least one part."""
    group: list[_Part] = []
    for part in parts:
        if group and sum(one.size for one in group) + part.size > most:
            yield group
            group = []
        group.append(part)
    yield group


def _gradients(model: nn.Module, group: list[_Part], batch: Any, loss: Loss) -> list[Tensor]:
    """Return gradients averaged over the batches of one task; zeros for parameters the loss does not use."""
    parameters = [part.parameter for part in group]
    batches = batch if isinstance(batch, list) else [batch]
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    for one in batches:
        with torch.enable_grad():
            found = torch.autograd.grad(loss(model, one), parameters, allow_unused=True)
        for mean, gradient in zip(total, found, strict=True):
            if gradient is not None:
                mean.add_(gradient, alpha=1 / len(batches))
    return total


def _gram(rows_HTF: Tensor) -> Tensor:
    """Return inner products, (H, T, T), fp64, on the CPU."""
    return torch.bmm(rows_HTF, rows_HTF.mT).double().cpu()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode (no dropout, noise or batch statistics), and back to each module's own."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
