"""Language models whose training loss never holds the logits of all tokens.

`apply_lean(model, loss=True)` gives a model the class made of `LeanHeadModel` and its own. With labels, in
training, its head hands over the hidden states, `linear_cross_entropy` computes the loss, and logits are
computed only when asked for. Without labels, in evaluation, under torch.compile, for a few tokens, and with
a head that is no plain linear (an adapter on it, a quantised one), the model's own forward runs.

A model is replaced only if its own forward, run on a few numbers with stand-ins for its parts, gives the loss
of one of the known forms: labels shifted by one token or not, logits scaled, capped, or as they are.
"""

from __future__ import annotations

__all__ = ["LeanHeadModel", "lean_head_form"]

import copy
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thawline.ops.linear_cross_entropy import LEAST, linear_cross_entropy

IGNORED = -100
Form = tuple[bool, float, float | None]
"""True if labels are shifted; scale and cap of the logits."""


class LeanHeadModel(nn.Module):
    """Forward of a language model with a lean loss. Its other base is the model's own class."""

    config: Any
    lean_form: Form
    lean_label_smoothing = 0.0
    lean_origin: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward, with a lean loss where there is one to compute."""
        head = self.get_output_embeddings()
        labels = kwargs.get("labels")
        plain = (
            kwargs.get("return_dict") is False
            or kwargs.get("logits_to_keep")
            or self._has_router_loss(kwargs)
        )
        # Hooks would break a compiled graph, and what fits into one chunk has nothing to gain.
        plain = plain or torch.compiler.is_compiling() or (labels is not None and labels.numel() <= LEAST)
        # By class: an adapter or a quantised layer computes something else.
        if labels is None or not self.training or plain or type(head) is not nn.Linear or head._forward_hooks:
            return self.lean_origin.forward(self, *args, **kwargs)
        del kwargs["labels"]
        divisor = kwargs.pop("num_items_in_batch", None)
        shifted = kwargs.pop("shift_labels", None)
        if hasattr(self, "prepare_decoder_input_ids_from_labels") and kwargs.get("decoder_input_ids") is None:
            kwargs["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels=labels)
        taken: list[Tensor] = []

        def take(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            taken.append(inputs[0])
            return (inputs[0][..., :0, :],)  # the head then computes the logits of no token

        handle = head.register_forward_pre_hook(take)
        try:
            output = self.lean_origin.forward(self, *args, **kwargs)
        finally:
            handle.remove()
        is_shifted, scale, softcap = self.lean_form
        if is_shifted:
            labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shifted is None else shifted
        hidden = taken[0]
        output["loss"] = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            labels.reshape(-1).to(hidden.device),
            head.bias,
            divisor=divisor,
            label_smoothing=self.lean_label_smoothing,
            scale=scale,
            softcap=softcap,
        )
        kind: Any = type(output)
        output.__class__ = _with_late_logits(kind)
        output.__dict__["late_logits"] = partial(_logits, hidden.detach(), head, scale, softcap)
        return output

    def _has_router_loss(self, kwargs: Any) -> bool:
        wanted = kwargs.get("output_router_logits")
        return bool(getattr(self.config, "output_router_logits", False) if wanted is None else wanted)


def lean_head_form(model: nn.Module) -> Form | None:
    """Return the form of a language model's loss, or None where it is none of the known."""
    name = next((n for n, child in model.named_children() if child is _head(model)), None)
    if name is None or "forward" in vars(model):
        return None
    hidden = torch.linspace(-9, 9, 3 * 7, device="cpu").view(1, 3, 7)
    labels = torch.tensor([[3, IGNORED, 5]], device="cpu")
    seen: list[Tensor] = []

    def head(x: Tensor) -> Tensor:
        seen.append(x)
        return 2 * x

    stand_in = copy.copy(model)
    parts: dict[str, Any] = {child: lambda *args, **kwargs: _Output(hidden) for child in model._modules}
    stand_in.__dict__["_modules"] = parts | {name: head}
    stand_in.training = True
    config = stand_in.__dict__["config"] = copy.copy(model.config)
    sizes = {key: 7 for key in ("vocab_size",) if hasattr(config, key)}
    vars(config).update(sizes)
    if "vocab_size" in vars(stand_in):
        stand_in.__dict__["vocab_size"] = 7
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            loss = type(model).forward(stand_in, **_inputs(stand_in, labels), labels=labels).loss
    except Exception:  # a forward that cannot run with the stand-ins has another form
        return None
    for form in _forms(config):
        is_shifted, scale, softcap = form
        logits = 2 * scale * seen[0][0]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        wanted = F.pad(labels[0], (0, 1), value=IGNORED)[1:] if is_shifted else labels[0]
        if torch.allclose(loss, F.cross_entropy(logits, wanted), rtol=1e-5):
            return form
    return None


@cache
def _with_late_logits(kind: Any) -> Any:
    """Return a class of outputs whose `logits` are computed when asked for, without a gradient."""

    def get(self: Any) -> Any:
        compute = self.__dict__.get("late_logits")
        return None if compute is None else compute()

    # The setter: copies are built from the other values.
    return type(kind.__name__, (kind,), {"logits": property(get, lambda self, value: None)})


@torch.no_grad()
def _logits(hidden: Tensor, head: nn.Linear, scale: float, softcap: float | None) -> Tensor:
    logits: Tensor = head(hidden)
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class _Output:
    """Output of a stand-in for a part of a model; its first value is the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Any:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _inputs(model: Any, labels: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": torch.zeros_like(labels)}
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        inputs["decoder_input_ids"] = torch.zeros_like(labels)
    return inputs


def _forms(config: Any) -> Iterator[Form]:
    scales = {
        1.0,
        float(getattr(config, "logit_scale", None) or 1),
        1 / (getattr(config, "logits_scaling", None) or 1),
    }
    caps = {None, getattr(config, "final_logit_softcapping", None)}
    for is_shifted in (True, False):
        for scale in scales:
            for cap in caps:
                yield is_shifted, scale, cap


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
