"""Made-up multi-task worlds in which the skills are known: who can find them, and what is it worth?

A frozen random net of two linears, and an inventory of rank-1 skills for each. A task's teacher is the net
with, in each linear, the average of some of the skills; which ones is all that tells tasks apart. In the
*head* family the subset is drawn for every block of features by itself, as MHR with that many heads can say;
in the *layer* family once per linear, a world made for Poly. Inputs are normal, targets the teacher's output.

The update of a teacher has about the size of what it is added to: scores are errors relative to those of the
frozen net, which knows no task.
"""

from __future__ import annotations

__all__ = ["FAMILIES", "LAYERS", "Net", "Size", "World", "mean_squared_error"]

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.ops.mixing import mix_skills

FAMILIES = {
    "head": "each task draws its skills block by block: the world of MHR",
    "layer": "each task draws its skills once per layer: the world of Poly",
}
LAYERS = ("first", "second")


class Net(nn.Module):
    """linear → ReLU → linear, all of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        return self.second(F.relu(self.first(x)))


@dataclass(frozen=True)
class Size:
    """Dimensions of a world."""

    width: int = 32
    n_skills: int = 4
    n_heads: int = 4
    n_train: int = 24
    n_held_out: int = 8


class World:
    """One world: the frozen net, its tasks and their data. Everything follows from `seed`.

    Tasks are numbered; the first `size.n_train` are for training, the rest is held out: new combinations of
    the same skills.
    """

    def __init__(self, family: str, seed: int, size: Size | None = None) -> None:
        self.size = size = size or Size()
        self.seed = seed
        random = torch.Generator().manual_seed(10_000 + seed)
        n_tasks = size.n_train + size.n_held_out
        n_heads = size.n_heads if family == "head" else 1
        with torch.random.fork_rng():
            torch.manual_seed(20_000 + seed)
            self._net = Net(size.width)
        self.routes: dict[str, Tensor] = {}
        """By layer, how each task's teacher mixes the skills, (tasks, H, S)."""
        self._weights: dict[str, Tensor] = {}
        """Of each task's teacher, (tasks, O, I)."""
        for name in LAYERS:
            chosen = _subsets((n_tasks, n_heads, size.n_skills), random)
            A = torch.randn(size.n_skills, size.width, 1, generator=random) / size.width**0.5
            B = torch.randn(size.n_skills, size.width, 1, generator=random)
            self.routes[name] = chosen / chosen.sum(-1, keepdim=True)
            update = mix_skills(self.routes[name], B) @ mix_skills(self.routes[name], A).mT
            self._weights[name] = self._net.get_submodule(name).weight.detach() + update

    def net(self) -> Net:
        """A copy of the frozen net."""
        copy = Net(self.size.width)
        copy.load_state_dict(self._net.state_dict())
        return copy.requires_grad_(False)

    @property
    def train_tasks(self) -> range:
        """Their numbers."""
        return range(self.size.n_train)

    @property
    def held_out_tasks(self) -> range:
        """Their numbers."""
        return range(self.size.n_train, self.size.n_train + self.size.n_held_out)

    @torch.no_grad()
    def draw(self, tasks: range, n: int, draw: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (tasks · n, width), n rows of each task after another.

        Args:
            draw: which draw: the same number gives the same rows.
        """
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        x = torch.randn(len(tasks), n, self.size.width, generator=random)
        y = x
        for name in LAYERS:
            weight = self._weights[name][tasks.start : tasks.stop]
            y = y @ weight.mT + self._net.get_submodule(name).bias
            y = F.relu(y) if name == LAYERS[0] else y
        return x.flatten(0, 1), y.flatten(0, 1)


def mean_squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of a model on inputs and targets."""
    x, y = batch
    return F.mse_loss(model(x), y)


def _subsets(shape: tuple[int, int, int], random: torch.Generator) -> Tensor:
    """0 and 1, each row a random subset of the last axis, never empty."""
    *rows, n = shape
    number = torch.randint(1, 2**n, rows, generator=random)
    return (number[..., None] >> torch.arange(n) & 1).float()
