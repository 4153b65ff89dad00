"""Generated images and two small networks for them: vision cases that need neither data nor torchvision.

An image shows one flower, radius 1 + 0.35·cos(petals · angle), of three to seven petals, filled or hollow:
ten classes. The *source* domain is bright flowers, nearly upright, on black. The *target* domain turns them
freely, inverts the contrast, puts coloured waves behind them, and names the classes in another order.
"""

from __future__ import annotations

__all__ = ["ConvNet", "VisionTransformer", "draw_flowers"]

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 32
N_CLASSES = 10
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


class VisionTransformer(nn.Module):
    """A pre-norm vision transformer: patches of 4 × 4, width 64, three blocks."""

    targets = r"blocks\.\d+\.(q|k|v|out|up|down)"

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIZE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 3, 32, 32)."""
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class ConvNet(nn.Module):
    """A residual conv net: three stages of width 32, 64, 128, two convolutions each, group norm."""

    targets = r"stages\.\d+\.(first|second)"

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.Sequential(
            *(_Stage(a, b) for a, b in zip((widths[0], *widths[:-1]), widths, strict=True))
        )
        self.head = nn.Linear(widths[-1], N_CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 3, 32, 32)."""
        logits: Tensor = self.head(self.stages(F.relu(self.stem(pixel_values))).mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        normed = self.norm1(x)
        q, k, v = (
            part(normed).view(B, T, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Stage(nn.Module):
    """Halves the resolution, then adds one residual pair of convolutions."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride=2, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        return x + F.relu(self.norm2(self.second(x)))
