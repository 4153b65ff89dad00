"""Generated images of flowers in two domains: a classification task to pretrain on and one to adapt to.

An image shows one flower, radius 1 + 0.35·cos(petals · angle), of three to seven petals, filled or hollow:
ten classes. The *source* domain is bright flowers, nearly upright, on black. The *target* domain turns them
freely, inverts the contrast, puts coloured waves behind them, and names the classes in another order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thawline.bench.networks import N_CLASSES, SIZE

PETALS = (3, 4, 5, 6, 7)


def draw_flowers(n: int, generator: torch.Generator, *, target: bool = False) -> tuple[Tensor, Tensor]:
    """Draw `n` images of one domain.

    Args:
        generator: on the processor; the images are a function of its state.
        target: the domain to adapt to, instead of the source.
    Returns: pixel values (n, 3, 32, 32) of mean about 0 and deviation about 1; labels (n,) in 0 … 9.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.randint(0, N_CLASSES, (n,), generator=generator)
    petals, hollow = torch.tensor(PETALS)[labels % 5].view(n, 1, 1), (labels >= 5).view(n, 1, 1)
    axis = torch.linspace(-1, 1, SIZE)
    y = axis.view(1, SIZE, 1) - uniform(-0.25, 0.25, 1, 1)
    x = axis.view(1, 1, SIZE) - uniform(-0.25, 0.25, 1, 1)
    turn = uniform(-math.pi, math.pi, 1, 1) if target else uniform(-0.3, 0.3, 1, 1)
    edge = uniform(0.45, 0.65, 1, 1) * (1 + 0.35 * torch.cos(petals * (torch.atan2(y, x) + turn)))
    radius = (x.square() + y.square()).sqrt()
    inside = torch.sigmoid(30 * (edge - radius))  # a soft edge, about a pixel wide
    flower = inside - torch.sigmoid(30 * (0.55 * edge - radius)) * hollow

    flower = flower.unsqueeze(1) * uniform(0.6, 1.0, 3, 1, 1)
    if target:
        waves = torch.sin(
            6 * (uniform(-1, 1, 3, 1, 1) * x.unsqueeze(1) + uniform(-1, 1, 3, 1, 1) * y.unsqueeze(1))
        )
        flower = 0.8 + 0.35 * waves - flower
        labels = (7 * labels + 3) % N_CLASSES
    noise = 0.1 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    return (flower + noise - 0.3) / 0.4, labels
