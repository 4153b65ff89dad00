"""MHR around tiny models, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tests.support.models import VOCAB, tiny_llama
from thawline import MHRConfig


def config(**changes: Any) -> MHRConfig:
    """Three tasks, five skills, two heads; B random, so that tasks differ."""
    fields = {"r": 3, "alpha": 6, "n_tasks": 3, "n_skills": 5, "n_heads": 2, "routing_init": 2.0}
    return MHRConfig(**{**fields, "target_modules": "all-linear", "init_weights": False, **changes})


def routed(base: nn.Module | None = None, seed: int = 1, **changes: Any) -> PeftModel:
    """A tiny Llama, or `base`, with MHR around every linear."""
    base = tiny_llama() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, config(**changes)).eval()


def tokens(rows: int = 3, length: int = 7, seed: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, input_ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **inputs).logits


def one_linear(size: int = 64, length: int = 16, **changes) -> tuple[nn.Module, Tensor]:
    """A linear in bf16, a batch of 8 rows, r = 8, S = 8, H = 8."""
    base = nn.Sequential(nn.Linear(size, size, bias=False)).to(torch.bfloat16)
    fields = {"r": 8, "n_tasks": 8, "n_skills": 8, "n_heads": 8, "target_modules": ["0"], **changes}
    model = get_peft_model(base, config(**fields)).train()
    return model, torch.randn(8, length, size, dtype=torch.bfloat16, requires_grad=True)
