"""Small models and steps that PaCA's tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig

from tests.support.models import VOCAB
from thawline import PacaConfig

B, T, IN, OUT = 2, 5, 12, 10


class Net(nn.Module):
    """Two linears, a bias on one, a nonlinearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, OUT)
        self.second = nn.Linear(OUT, 7, bias=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def wrap(model: nn.Module, **fields: Any) -> PeftModel:
    fields = {
        "r": 4,
        "target_modules": ["first", "second"] if isinstance(model, Net) else "all-linear",
    } | fields
    return get_peft_model(model, PacaConfig(**fields))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return copy.deepcopy(dict(model.state_dict()))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, steps: int = 3, lr: float = 0.05) -> None:
    """A few steps of fused AdamW, transformers' default."""
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, fused=True)
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    if isinstance(getattr(model, "config", None), LlamaConfig):
        ids = tokens(seed)
        return model(input_ids=ids, labels=ids).loss
    x = torch.randn(B, T, IN, generator=torch.Generator().manual_seed(seed))
    return model(x.to(next(model.parameters()).dtype)).square().mean()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bitwise equality of two state dicts, the sign of zero included."""
    return first.keys() == second.keys() and all(
        torch.equal(bits(a), bits(second[name])) for name, a in first.items()
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def train_step(model: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward of a plain loss; the caller steps."""
    loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach()
