"""A tiny net, three tasks with data, and MHR around it, for the tests of alignment."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from thawline import MHRConfig

TASKS, ROWS, I, M, O = 3, 5, 12, 8, 4  # noqa: E741


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(I, M), nn.Linear(M, O)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.first(x).relu()))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(n: int = TASKS) -> dict[int, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return {task: (torch.randn(ROWS, I), torch.randn(ROWS, O)) for task in range(n)}


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def mhr(**changes: Any) -> nn.Module:
    fields = {"r": 2, "alpha": 3, "n_tasks": TASKS, "n_skills": 5, "n_heads": 4, "routing_init": 2.0}
    config = MHRConfig(**{**fields, "target_modules": ["first", "second"], "init_weights": False, **changes})
    return get_peft_model(net(), config)
