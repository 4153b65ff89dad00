"""Boxes as distributions: W(n) by its closed form, distances there and back, bins against a slow loop."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from thawline.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from thawline.ops.distribution import (
    box_to_distance,
    distance_to_bins,
    distance_to_box,
    expected_distance,
    weighting_function,
)

UP, SCALE = torch.tensor([0.5], dtype=torch.float64), torch.tensor([4])


def test_weighting_function_is_odd_increasing_and_ends_where_the_paper_says() -> None:
    weights = weighting_function(32, UP, SCALE)
    assert weights.shape == (33,)
    assert weights.dtype == torch.float64
    assert_close(weights, -weights.flip(0))
    assert (weights.diff() > 0).all()
    for index, value in {0: -4, 1: -2, 2: -1.78813, 3: -1.59122, 15: -0.0759896, 16: 0, 31: 2, 32: 4}.items():
        assert_close(weights[index].item(), float(value), rtol=0, atol=5e-6)


@pytest.mark.parametrize(("reg_max", "up", "scale"), [(8, 0.5, 4.0), (16, 0.25, 8.0)])
def test_weighting_function_equals_its_formula(reg_max: int, up: float, scale: float) -> None:
    q = (up * scale + 1) ** (2 / (reg_max - 2))
    half = reg_max // 2
    expected = [-2 * up * scale]
    expected += [1 - q ** (half - n) for n in range(1, half)] + [0.0]
    expected += [q ** (n - half) - 1 for n in range(half + 1, reg_max)] + [2 * up * scale]
    weights = weighting_function(reg_max, torch.tensor(up, dtype=torch.float64), torch.tensor(scale))
    assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_zero_logits_give_the_reference_box() -> None:
    weights = weighting_function(32, UP, SCALE)
    distance = expected_distance(torch.zeros(2, 3, 132, dtype=torch.float64), weights)
    assert distance.shape == (2, 3, 4)
    reference = torch.rand(2, 3, 4, dtype=torch.float64)
    assert_close(distance_to_box(reference, distance, SCALE), reference)


def test_expected_distance_is_edge_major() -> None:
    weights = weighting_function(8, UP, SCALE)
    logits = torch.full((4, 9), -1e4, dtype=torch.float64)
    for edge, index in enumerate((1, 4, 6, 8)):
        logits[edge, index] = 0
    assert_close(expected_distance(logits.flatten(), weights), weights[[1, 4, 6, 8]])


def test_distance_to_box_and_back() -> None:
    reference = torch.rand(5, 4, dtype=torch.float64) * 0.5 + 0.2
    distance = torch.rand(5, 4, dtype=torch.float64) * 6 - 1.9
    corners = cxcywh_to_xyxy(distance_to_box(reference, distance, SCALE))
    assert_close(box_to_distance(reference, corners, SCALE), distance)


def test_each_edge_moves_by_its_own_distance() -> None:
    reference = torch.tensor([0.5, 0.4, 0.2, 0.4], dtype=torch.float64)
    for edge, (x1, y1, x2, y2) in enumerate(
        [(0.35, 0.2, 0.6, 0.6), (0.4, 0.1, 0.6, 0.6), (0.4, 0.2, 0.65, 0.6), (0.4, 0.2, 0.6, 0.7)]
    ):
        distance = torch.zeros(4, dtype=torch.float64)
        distance[edge] = 1.0
        expected = xyxy_to_cxcywh(torch.tensor([x1, y1, x2, y2], dtype=torch.float64))
        assert_close(distance_to_box(reference, distance, SCALE), expected)


def test_bins_equal_the_slow_loop_also_beyond_both_ends() -> None:
    weights = weighting_function(32, UP, SCALE)
    distance = torch.cat([torch.linspace(-5, 5, 83, dtype=torch.float64), weights])
    left, share = distance_to_bins(distance, weights)
    for d, k, r in zip(distance.tolist(), left.tolist(), share.tolist(), strict=True):
        slow = sum(w <= d for w in weights.tolist()) - 1
        if slow < 0:
            assert (k, r) == (0, 0.0)
        elif slow >= 32:
            assert (k, r) == (31, 1.0)
        else:
            assert k == slow
            low, high = weights[k].item(), weights[k + 1].item()
            assert r == pytest.approx((d - low) / (high - low))


def test_references_without_size_give_finite_distances_and_bins() -> None:
    weights = weighting_function(32, UP.float(), SCALE)
    distance = box_to_distance(torch.zeros(2, 4), torch.tensor([0.1, 0.2, 0.3, 0.4]), SCALE)
    left, share = distance_to_bins(distance, weights)
    assert left.min() >= 0
    assert left.max() <= 31
    assert share.isfinite().all()
