"""Two small networks for images of 32 × 32: vision cases that need no torchvision."""

from __future__ import annotations

__all__ = ["N_CLASSES", "SIZE", "ConvNet", "VisionTransformer"]

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 32
N_CLASSES = 10


class VisionTransformer(nn.Module):
    """Pre-norm vision transformer: patches of 4 × 4, width 64, three blocks."""

    targets = r"blocks\.\d+\.(q|k|v|out|up|down)"

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIZE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 3, 32, 32)."""
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class ConvNet(nn.Module):
    """Residual conv net: three stages of width 32, 64, 128, two convolutions each, group norm."""

    targets = r"stages\.\d+\.(first|second)"

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.Sequential(
            *(_Stage(a, b) for a, b in zip((widths[0], *widths[:-1]), widths, strict=True))
        )
        self.head = nn.Linear(widths[-1], N_CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 3, 32, 32)."""
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
    """Convolution that halves the resolution, then a residual one."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride=2, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        return x + F.relu(self.norm2(self.second(x)))
