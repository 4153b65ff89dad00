"""Every router, side by side: which mixture of skills a task uses in each head.

| router  | weights of a row                         | trained | what for                              |
|---------|------------------------------------------|---------|---------------------------------------|
| learned | normalised sigmoids of a logit per skill | yes     | Poly and MHR                          |
| uniform | 1 / S                                    | no      | what the skills do without routing    |
| private | skill t for task t                       | no      | one adapter per task                  |
| random  | a random half of the skills, drawn once  | no      | the control: do learned routes matter |

Axes: K tasks, G rows asked for, H heads, S skills.

Source: Ponti et al. 2022 (arXiv 2202.13914) for the sigmoids, Caccia et al. 2023 (arXiv 2211.03831) for the
heads. Weights sum to one within each head. Differs from the authors' code in how, not in what, it computes:
softmax(log sigmoid(z)) is sigmoid(z) / Σ sigmoid(z) without their 1e-12, finite and with a gradient at any
logit, where torch's RelaxedBernoulli has none below -16 (-5 in bf16). Never below fp32.
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
    """Whether rows differ at all."""

    def __init__(self, n_tasks: int, n_heads: int, n_skills: int, spread: float = 1e-3) -> None:
        super().__init__()
        self.n_tasks, self.n_heads, self.n_skills, self.spread = n_tasks, n_heads, n_skills, spread
        self.temperature = 1.0
        self.uniform_mix = 0.0

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> Tensor | None:
        """Weights (G, H, S) of `rows` (G,), each head's summing to one; `None` for 1 / S everywhere."""
        raise NotImplementedError

    def set_rows(self, n_tasks: int, like: Tensor | None = None, keep: bool = False) -> None:
        """Give the table `n_tasks` new rows, after the old ones or in their place.

        Args:
            like: state (1, H, S) every new row starts from; `None` starts them fresh.
            keep: keep the old rows, bit by bit, and number the new ones after them.
        """
        self.n_tasks = n_tasks + (self.n_tasks if keep else 0)

    def state(self) -> tuple[Tensor, ...]:
        """The tensors that the weights come from."""
        return (*self.parameters(recurse=False), *self.buffers(recurse=False))

    def split_heads(self, n_heads: int) -> None:
        """Give every head's weights to the `n_heads` / H heads it falls into: routes stay as they are."""
        self.n_heads = n_heads


class LearnedRouter(Router):
    """Logits (K, H, S); weights are their sigmoids, normalised over the skills of a head."""

    def __init__(self, n_tasks: int, n_heads: int, n_skills: int, spread: float = 1e-3) -> None:
        super().__init__(n_tasks, n_heads, n_skills, spread)
        self.logits = nn.Parameter(self._fresh(n_tasks))

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """`skill_weights` of the rows' logits."""
        logits = self.logits.index_select(0, rows)
        return skill_weights(logits, noise, self.temperature, self.uniform_mix)

    def set_rows(self, n_tasks: int, like: Tensor | None = None, keep: bool = False) -> None:  # noqa: D102
        super().set_rows(n_tasks, like, keep)
        old = self.logits.detach()
        new = self._fresh(n_tasks) if like is None else like.expand(n_tasks, -1, -1)
        new = new.to(old)
        self._replace(torch.cat([old, new]) if keep else new.clone())

    def split_heads(self, n_heads: int) -> None:  # noqa: D102
        repeats = n_heads // self.n_heads
        super().split_heads(n_heads)
        self._replace(self.logits.detach().repeat_interleave(repeats, 1))

    def _replace(self, logits: Tensor) -> None:
        self.logits = nn.Parameter(logits, requires_grad=self.logits.requires_grad)

    def _fresh(self, n_tasks: int) -> Tensor:
        return torch.empty(n_tasks, self.n_heads, self.n_skills).uniform_(-self.spread, self.spread)


class UniformRouter(Router):
    """Every skill counts the same for every task, so no ids are needed."""

    needs_ids = False

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> None:
        """`None`: the average of the skills."""
        return


class PrivateRouter(Router):
    """Skill t for task t: S = K separate LoRAs."""

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """One-hot rows."""
        # Not F.one_hot: it reads the largest id back to the host.
        skills = torch.arange(self.n_skills, device=rows.device)
        return (rows[:, None] == skills).float()[:, None].expand(-1, self.n_heads, -1)

    def set_rows(self, n_tasks: int, like: Tensor | None = None, keep: bool = False) -> None:  # noqa: D102
        super().set_rows(n_tasks, like, keep)
        self.n_skills = self.n_tasks


class RandomRouter(Router):
    """A fixed table (K, H, S): each head of each task averages a random non-empty subset of the skills."""

    def __init__(self, n_tasks: int, n_heads: int, n_skills: int, spread: float = 1e-3) -> None:
        super().__init__(n_tasks, n_heads, n_skills, spread)
        self.table: Tensor
        self.register_buffer("table", self._fresh(n_tasks))

    def forward(self, rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """The rows of the table."""
        return self.table.index_select(0, rows)

    def set_rows(self, n_tasks: int, like: Tensor | None = None, keep: bool = False) -> None:  # noqa: D102
        super().set_rows(n_tasks, like, keep)
        new = self._fresh(n_tasks).to(self.table)
        self.table = torch.cat([self.table, new]) if keep else new

    def split_heads(self, n_heads: int) -> None:  # noqa: D102
        repeats = n_heads // self.n_heads
        super().split_heads(n_heads)
        self.table = self.table.repeat_interleave(repeats, 1)

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
    """Sigmoids of `logits` (..., S), normalised over the last axis, in fp32 or better.

    Args:
        noise: logistic noise of the same shape: the relaxed Bernoulli of Polytropon. Without it no
            temperature.
        temperature: of the relaxation, above 0; near 0 the skills are switched on or off.
        uniform_mix: share of 1 / S in the weights, 0 to 1; raised to 1 by uniform annealing.
    """
    logits = logits if logits.dtype is torch.float64 else logits.float()
    if noise is not None:
        logits = logits + noise
        logits = logits if temperature == 1 else logits / temperature
    # Along the first axis: along one as short as the skills, a processor takes several times as long.
    weights = F.logsigmoid(logits).movedim(-1, 0).softmax(0).movedim(0, -1)
    return (
        weights.lerp(torch.full_like(weights, 1 / weights.shape[-1]), uniform_mix) if uniform_mix else weights
    )


def logistic_noise(*shape: int, device: torch.device | None = None) -> Tensor:
    """log u − log(1 − u) for uniform u, fp32, from torch's generator."""
    return torch.rand(shape, device=device).logit_(SMALLEST_UNIFORM)
