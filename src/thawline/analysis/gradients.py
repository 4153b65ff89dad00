"""Do tasks pull alike on what they share? Inner products of their gradients, read off a model as it stands.

Caccia et al. 2023 (arXiv 2211.03831) explain routing by the alignment of gradients between training tasks,
but the released code does not measure it, and the order of methods hangs on how it is measured. Here:

· Routing logits are left out. Rows of different tasks are disjoint: they would only make gradients longer.
· Two spaces. *Skill* space is what the optimiser sees, the gradients of the shared parameters themselves;
  two tasks that route apart are orthogonal there, whatever they ask for. *Effective* space is the gradients
  of each task's own mixed factors Aᵗ and Bᵗ, as if each were a LoRA; how much two tasks' routes overlap plays
  no part. Where nothing is mixed (LoRA, PaCA, full fine-tuning) the two are one.
· Noise and dropout are off (evaluation mode), and every method gets the same batches.
· Two numbers, the mean cosine c over pairs of T tasks and the coherence ‖mean g/|g|‖² = (1 + (T − 1) c) / T.
  Tasks whose gradients cancel, as at the optimum of a shared adapter, have c = −1/(T − 1) and coherence 0;
  orthogonal ones c = 0 and coherence 1/T. Compare with these, not with −1 and 1.
· One step says little: everyone is aligned at first and no one at last. Average over the trajectory
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
    """How alike T gradients point.

    Attributes:
        cosines: (T, T), fp64. A gradient of length 0 has cosine 0 with every other.
        norms: (T,), fp64, lengths of the gradients.
    """

    cosines: Tensor
    norms: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> Agreement:
        """From the gradients' inner products (T, T)."""
        norms = gram.diagonal().clamp(min=0).sqrt()
        lengths = norms.where(norms > 0, torch.inf)
        return cls(gram / lengths[:, None] / lengths, norms)

    @property
    def mean_cosine(self) -> float:
        """Over all pairs of different tasks; −1/(T − 1) where the gradients cancel."""
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
        """Plain numbers, with what to compare them with."""
        n = len(self.tasks)
        return {
            space: {"mean_cosine": found.mean_cosine, "coherence": found.coherence}
            for space, found in (("skill", self.skill), ("effective", self.effective))
        } | {"n_tasks": n, "cosine_if_cancelling": -1 / (n - 1), "coherence_if_orthogonal": 1 / n}


def gradient_alignment(
    model: nn.Module,
    batches: Batches,
    loss: Loss | None = None,
    *,
    keep_bytes: int = KEEP_BYTES,
) -> Alignment:
    """Measure the agreement of tasks' gradients on everything that trains, routing apart.

    The model is left as it was: mode, task ids, `.grad` and random numbers. Works on LoRA and most other
    methods of PEFT, PaCA, full fine-tuning, MHR and Poly.

    Args:
        model: in fp32 or better where small cosines matter.
        batches: for each task a batch, or a list of batches whose gradients are averaged. Large ones: what is
            measured is the tasks' disagreement and the sampling noise together. With MHR inside, the keys are
            ids or names of the routing table, and ids are set from them.
        loss: of model and batch, averaged over rows. None: `model(**batch).loss`.
        keep_bytes: most that is held of all tasks' gradients at once. Beyond it parameters are taken in
            groups, each with a backward pass per task of its own.
    Raises: ConfigError: if nothing that tasks share trains, fewer than two tasks are given, or parameters are
        sharded. RoutingError: for a task that is not in the routing table.
    """
    check_alignable(model, batches)
    loss = loss or model_loss
    parts = _shared_parts(model)
    routed = any(isinstance(part, _Skills) for part in parts)
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
                gram_HTT = _gram(torch.stack(rows, 1))
                effective = effective + gram_HTT.sum(0)
                skill = skill + (gram_HTT * part.overlap(tuple(batches))).sum(0)
    return Alignment(tuple(map(str, batches)), Agreement.of(skill), Agreement.of(effective))


def check_alignable(model: nn.Module, batches: Batches) -> None:
    """Raises: ConfigError: if `gradient_alignment` could not measure: told before a training begins."""
    if len(batches) < 2:
        raise ConfigError(f"Alignment is between tasks; got batches of {len(batches)}. Give two or more.")
    _shared_parts(model)


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """`model(**batch).loss`, the batch brought to the model's device."""
    return model(**plain_batch(model, batch)).loss


def plain_batch(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch on the model's device, without task ids of its own: which task it is of is said otherwise."""
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if not name.endswith("task_ids")
    }


def effective_gradient(gradient_SDR: Tensor, weights_HS: Tensor) -> Tensor:
    """The gradient (H, F) of a mixed factor, from that of the skills it was mixed from.

    Exact where all rows of the batch used `weights_HS`; a least-squares estimate otherwise.
    """
    n_heads, n_skills = weights_HS.shape
    heads_HSF = gradient_SDR.reshape(n_skills, n_heads, -1).transpose(0, 1)
    return (weights_HS[:, None] @ heads_HSF)[:, 0] / weights_HS.square().sum(-1, keepdim=True)


class _Whole:
    """A parameter that every task uses as it is."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.size = parameter.numel()

    def own_gradient(self, gradient: Tensor, task: str | int) -> Tensor:
        """(1, size)."""
        return gradient.reshape(1, -1)

    def overlap(self, tasks: tuple[str | int, ...]) -> Tensor:
        """(1, T, T): each task uses all of it."""
        return torch.ones(1, len(tasks), len(tasks), dtype=torch.float64)


class _Skills:
    """A factor of all skills of a layer, of which each task uses a mixture."""

    def __init__(self, parameter: nn.Parameter, layer: MHRLinear, adapter: str) -> None:
        self.parameter = parameter
        self.layer, self.adapter = layer, adapter
        self.size = parameter[0].numel()

    def own_gradient(self, gradient: Tensor, task: str | int) -> Tensor:
        """Of the mixed factor, (H, F)."""
        return effective_gradient(gradient, self._weights(task).to(gradient))

    def overlap(self, tasks: tuple[str | int, ...]) -> Tensor:
        """(H, T, T): inner products of the tasks' weights."""
        weights_THS = torch.stack([self._weights(task) for task in tasks]).double().cpu()
        return torch.einsum("ihs,jhs->hij", weights_THS, weights_THS)

    @torch.no_grad()
    def _weights(self, task: str | int) -> Tensor:
        weights = self.layer.weights_of(self.adapter, task)
        n_skills = len(self.parameter)
        return torch.full((1, n_skills), 1 / n_skills) if weights is None else weights


def _shared_parts(model: nn.Module) -> list[_Whole | _Skills]:
    """What trains, without routing."""
    for config in getattr(model, "peft_config", {}).values():
        if str.__eq__(config.peft_type, "POLY"):
            raise ConfigError(
                "The mixtures of PEFT's Poly cannot be read. Bring the adapter in with thawline.from_poly."
            )
    skills: dict[nn.Parameter, _Skills] = {}
    routing: set[nn.Parameter] = set()
    for _, layer in find_layers(model):
        for router in layer.routers.values():
            routing.update(router.parameters())
        for factors in (layer.mhr_A, layer.mhr_B):
            skills |= {one: _Skills(one, layer, adapter) for adapter, one in factors.items()}
    trained = [p for p in model.parameters() if p.requires_grad and p not in routing]
    if not trained:
        raise ConfigError(
            "Nothing that tasks share trains: measure before the model is frozen, or after"
            " PeftModel.from_pretrained(..., is_trainable=True)."
        )
    if any(hasattr(parameter, "full_tensor") for parameter in trained):
        raise ConfigError("Parameters are sharded, each process has a part. Measure on a whole model.")
    return [skills.get(parameter) or _Whole(parameter) for parameter in trained]


def _groups(parts: list[_Whole | _Skills], most: int) -> Iterator[list[_Whole | _Skills]]:
    """Parts in their order, in groups of at most `most` numbers a task, one part at least."""
    group: list[_Whole | _Skills] = []
    for part in parts:
        if group and sum(one.size for one in group) + part.size > most:
            yield group
            group = []
        group.append(part)
    yield group


def _gradients(model: nn.Module, group: list[_Whole | _Skills], batch: Any, loss: Loss) -> list[Tensor]:
    """Averaged over the batches of one task; zeros for a parameter that the loss does not touch."""
    parameters = [part.parameter for part in group]
    batches = batch if isinstance(batch, list) else [batch]
    total = [torch.zeros_like(p, dtype=_precision(p)) for p in parameters]
    for one in batches:
        with torch.enable_grad():
            found = torch.autograd.grad(loss(model, one), parameters, allow_unused=True)
        for mean, gradient in zip(total, found, strict=True):
            if gradient is not None:
                mean.add_(gradient, alpha=1 / len(batches))
    return total


def _gram(rows_HTF: Tensor) -> Tensor:
    """Inner products (H, T, T), fp64, on the host."""
    return torch.bmm(rows_HTF, rows_HTF.mT).double().cpu()


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, no noise, no batch statistics; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
