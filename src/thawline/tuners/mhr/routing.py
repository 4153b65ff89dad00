"""Routers: the weights by which each task mixes the skills, head by head.

| router  | weights of a row                         | trained | what for                              |
|---------|------------------------------------------|---------|---------------------------------------|
| learned | normalised sigmoids of a logit per skill | yes     | Poly and MHR                          |
| uniform | 1 / S                                    | no      | what the skills do without routing    |
| private | skill t for task t                       | no      | one adapter per task                  |
| random  | a random half of the skills, drawn once  | no      | the control: do learned routes matter |

Axes: K tasks, G requested rows, H heads, S skills.

Source: Ponti et al. 2022 (arXiv 2202.13914) for the sigmoids, Caccia et al. 2023 (arXiv 2211.03831) for the
heads. Weights sum to one within each head. Differs from the authors' code in the form of the computation:
softmax(log sigmoid(z)) is sigmoid(z) / Σ sigmoid(z) without their 1e-12, finite and with a gradient at any
logit, where torch's RelaxedBernoulli has none below -16 (-5 in bf16). Always in fp32 or better.
"""

from __future__ import annotations

__all__ = [
    "ROUTERS",
    "LearnedRouter",
    "PrivateRouter",
    "RandomRouter",
    "Router",
    "UniformRouter",
    "logistic_noise",
    "skill_weights",
]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# torch.rand steps by 2^-24 and can return 0, whose logit is -inf.
SMALLEST_UNIFORM = 2.0**-25


class Router(nn.Module):
    """A routing table: one row of weights over the skills, for every head, per task.

    Args:
        n_tasks: rows K.    n_heads: H.    n_skills: S.
        spread: fresh logits are uniform in ±spread, so that a new row starts as the average of the skills.
    """

    needs_ids = True
    """True if tasks differ in their weights."""
    table_name = ""
    """Name of the parameter or buffer (K, H, S) that holds the rows, if any does."""

    def __init__(self, n_tasks: int, n_heads: int, n_skills: int, spread: float = 1e-3) -> None:
        super().__init__()
        self.n_tasks, self.n_heads, self.n_skills, self.spread = n_tasks, n_heads, n_skills, spread
        self.temperature = 1.0
        self.uniform_mix = 0.0

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> Tensor | None:
        """Return weights (G, H, S) of `rows` (G,), which sum to one per head; `None` for 1 / S everywhere."""
        raise NotImplementedError

    def set_rows(self, n_tasks: int, like: Tensor | None = None, keep: bool = False) -> None:
        """Add `n_tasks` new rows after the old ones, or replace the old ones by them.

        Args:
            like: values (1, H, S) that every new row starts from; `None` for fresh rows.
            keep: keep the old rows, bit-identical, and number the new ones after them.
        """
        self.n_tasks = n_tasks + (self.n_tasks if keep else 0)
        if self.table_name:
            old = getattr(self, self.table_name).detach()
            new = (self._fresh(n_tasks) if like is None else like.expand(n_tasks, -1, -1)).to(old)
            self._replace_table(torch.cat([old, new]) if keep else new.clone())

    def split_heads(self, n_heads: int) -> None:
        """Split every head into `n_heads` / H heads with its weights, which leaves the mixtures unchanged."""
        repeats = n_heads // self.n_heads
        self.n_heads = n_heads
        if self.table_name:
            self._replace_table(getattr(self, self.table_name).detach().repeat_interleave(repeats, 1))

    def _fresh(self, n_tasks: int) -> Tensor:
        raise NotImplementedError

    def _replace_table(self, table: Tensor) -> None:
        old = getattr(self, self.table_name)
        is_parameter = isinstance(old, nn.Parameter)
        setattr(self, self.table_name, nn.Parameter(table, old.requires_grad) if is_parameter else table)


class LearnedRouter(Router):
    """Logits (K, H, S); weights are their sigmoids, normalised over the skills of a head."""

    table_name = "logits"

    def __init__(self, n_tasks: int, n_heads: int, n_skills: int, spread: float = 1e-3) -> None:
        super().__init__(n_tasks, n_heads, n_skills, spread)
        self.logits = nn.Parameter(self._fresh(n_tasks))

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the `skill_weights` of the rows' logits."""
        logits = self.logits.index_select(0, rows)
        return skill_weights(logits, noise, self.temperature, self.uniform_mix)

    def _fresh(self, n_tasks: int) -> Tensor:
        return torch.empty(n_tasks, self.n_heads, self.n_skills).uniform_(-self.spread, self.spread)


class UniformRouter(Router):
    """Equal weights for all skills and tasks, so that no ids are needed."""

    needs_ids = False

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> None:
        """Return `None`: the average of the skills."""
        return


class PrivateRouter(Router):
    """Skill t for task t: S = K separate LoRAs."""

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return one-hot rows."""
        # Not F.one_hot: it reads the largest id back to the host.
        skills = torch.arange(self.n_skills, device=rows.device)
        return (rows[:, None] == skills).float()[:, None].expand(-1, self.n_heads, -1)

    def set_rows(self, n_tasks: int, like: Tensor | None = None, keep: bool = False) -> None:  # noqa: D102
        super().set_rows(n_tasks, like, keep)
        self.n_skills = self.n_tasks


class RandomRouter(Router):
    """A fixed table (K, H, S): each head of each task averages a random non-empty subset of the skills."""

    table_name = "table"

    def __init__(self, n_tasks: int, n_heads: int, n_skills: int, spread: float = 1e-3) -> None:
        super().__init__(n_tasks, n_heads, n_skills, spread)
        self.table: Tensor
        self.register_buffer("table", self._fresh(n_tasks))

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the rows of the table."""
        return self.table.index_select(0, rows)

    def _fresh(self, n_tasks: int) -> Tensor:
        shape = (n_tasks, self.n_heads, self.n_skills)
        chosen = torch.rand(shape) < 0.5
        one = torch.randint(self.n_skills, shape[:2])
        chosen |= (one[..., None] == torch.arange(self.n_skills)) & ~chosen.any(-1, keepdim=True)
        return chosen / chosen.sum(-1, keepdim=True)


ROUTERS: dict[str, type[Router]] = {
    "learned": LearnedRouter,
    "uniform": UniformRouter,
    "private": PrivateRouter,
    "random": RandomRouter,
}


def skill_weights(
    logits: Tensor, noise: Tensor | None = None, temperature: float = 1.0, uniform_mix: float = 0.0
) -> Tensor:
    """Return the sigmoids of `logits` (..., S), normalised over the last axis, in fp32 or better.

    Args:
        noise: logistic noise of the same shape: the relaxed Bernoulli of Polytropon.
        temperature: temperature of the noise, above 0; near 0 a skill is either on or off.
        uniform_mix: share of 1 / S in the weights, 0 to 1; raised to 1 by uniform annealing.
    """
    logits = logits if logits.dtype is torch.float64 else logits.float()
    if noise is not None:
        logits = logits + noise
        logits = logits if temperature == 1 else logits / temperature
    # Along the first axis: a CPU takes several times as long along a last axis as short as the skills.
    weights = F.logsigmoid(logits).movedim(-1, 0).softmax(0).movedim(0, -1)
    average = 1 / weights.shape[-1]
    return weights.lerp(torch.full_like(weights, average), uniform_mix) if uniform_mix else weights


def logistic_noise(*shape: int, device: torch.device | None = None) -> Tensor:
    """Draw log u − log(1 − u) for uniform u, fp32, from torch's generator."""
    return torch.rand(shape, device=device).logit_(SMALLEST_UNIFORM)
