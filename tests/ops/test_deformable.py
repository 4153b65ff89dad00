"""Deformable sampling against a loop, and at places where the answer is plain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from thawline.ops.deformable import deformable_sample

B, D, H, Q, POINTS = 2, 6, 3, 5, (2, 1)
SIZES = [(4, 7), (2, 3)]


def inputs() -> tuple[list[Tensor], Tensor, Tensor]:
    maps = [torch.randn(B, D, h, w, dtype=torch.float64, requires_grad=True) for h, w in SIZES]
    locations = (torch.rand(B, Q, H, sum(POINTS), 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(B, Q, H, sum(POINTS), dtype=torch.float64, requires_grad=True)
    return maps, locations, weights


def slow(maps: list[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """One image, query, head, point and corner at a time."""
    maps, locations, weights = [level.detach() for level in maps], locations.detach(), weights.detach()
    out = torch.zeros(B, Q, D, dtype=torch.float64)
    width = D // H
    for b in range(B):
        for q in range(Q):
            for head in range(H):
                for point in range(sum(POINTS)):
                    level = maps[0 if point < POINTS[0] else 1][b, head * width : (head + 1) * width]
                    h, w = level.shape[-2:]
                    x = float(locations[b, q, head, point, 0]) * w - 0.5
                    y = float(locations[b, q, head, point, 1]) * h - 0.5
                    for dy in (0, 1):
                        for dx in (0, 1):
                            column, row = int(x // 1) + dx, int(y // 1) + dy
                            if 0 <= column < w and 0 <= row < h:
                                share = (1 - abs(x - column)) * (1 - abs(y - row))
                                value = level[:, row, column] * share * weights[b, q, head, point]
                                out[b, q, head * width : (head + 1) * width] += value
    return out


def test_sampling_equals_the_loop() -> None:
    maps, locations, weights = inputs()
    assert_close(deformable_sample(maps, locations, weights, POINTS), slow(maps, locations, weights))


def test_channels_last_maps_give_the_same() -> None:
    maps, locations, weights = inputs()
    last = [level.detach().contiguous(memory_format=torch.channels_last) for level in maps]
    assert_close(
        deformable_sample(last, locations, weights, POINTS),
        deformable_sample(maps, locations, weights, POINTS),
    )


def test_gradients_are_right() -> None:
    maps, locations, weights = inputs()
    assert torch.autograd.gradcheck(
        lambda *args: deformable_sample(args[:2], args[2], args[3], POINTS), (*maps, locations, weights)
    )


def test_one_full_weight_at_a_cells_centre_reads_that_cell() -> None:
    maps, locations, weights = inputs()
    row, column = 2, 5
    centre = torch.tensor([(column + 0.5) / 7, (row + 0.5) / 4], dtype=torch.float64)
    one_hot = torch.zeros_like(weights)
    one_hot[..., 1] = 1
    read = deformable_sample(maps, centre.expand_as(locations), one_hot, POINTS)
    assert_close(read, maps[0][:, None, :, row, column].expand(B, Q, D))
