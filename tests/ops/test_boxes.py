"""Boxes: both ways of writing them, and overlaps, against closed forms, a slow loop and pixel counting."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from thawline.ops.boxes import (
    box_giou,
    box_iou,
    cxcywh_to_xyxy,
    inverse_sigmoid,
    pairwise_giou,
    pairwise_iou,
    xyxy_to_cxcywh,
)


def random_boxes(*shape: int) -> Tensor:
    corners = torch.rand(*shape, 2, 2, dtype=torch.float64).sort(dim=-2).values
    return corners.flatten(-2)


def test_corners_and_centres_are_inverse() -> None:
    boxes = random_boxes(3, 5)
    assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    assert_close(xyxy_to_cxcywh(torch.tensor([0.1, 0.2, 0.5, 1.0])), torch.tensor([0.3, 0.6, 0.4, 0.8]))


def test_negative_size_counts_as_zero_where_asked() -> None:
    box = torch.tensor([0.5, 0.5, -0.2, 0.4])
    assert_close(cxcywh_to_xyxy(box, clamp_size=True), torch.tensor([0.5, 0.3, 0.5, 0.7]))
    assert_close(cxcywh_to_xyxy(box), torch.tensor([0.6, 0.3, 0.4, 0.7]))


def test_overlap_equals_counted_pixels() -> None:
    a, b = torch.tensor([2.0, 1.0, 7.0, 6.0]), torch.tensor([4.0, 3.0, 9.0, 10.0])
    grid_y, grid_x = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")

    def mask(box: Tensor) -> Tensor:
        x1, y1, x2, y2 = box
        return (grid_x >= x1) & (grid_x < x2) & (grid_y >= y1) & (grid_y < y2)

    both, either = (mask(a) & mask(b)).sum(), (mask(a) | mask(b)).sum()
    hull = mask(torch.tensor([2.0, 1.0, 9.0, 10.0])).sum()
    assert_close(box_iou(a, b), both / either)
    assert_close(box_giou(a, b), both / either - (hull - either) / hull)


def test_pairwise_equals_elementwise_in_a_loop() -> None:
    a, b = random_boxes(2, 3), random_boxes(2, 5)
    for pairwise, elementwise in ((pairwise_iou, box_iou), (pairwise_giou, box_giou)):
        table = pairwise(a, b)
        assert table.shape == (2, 3, 5)
        for i in range(2):
            for j in range(3):
                for k in range(5):
                    assert_close(table[i, j, k], elementwise(a[i, j], b[i, k]))


def test_giou_is_iou_inside_and_falls_to_minus_one_far_away() -> None:
    whole, part = torch.tensor([0.0, 0.0, 4.0, 4.0]), torch.tensor([1.0, 1.0, 2.0, 3.0])
    assert_close(box_giou(whole, part), box_iou(whole, part))
    far = torch.tensor([1e4, 1e4, 1e4 + 1, 1e4 + 1])
    assert box_giou(part, far) < -0.999


def test_empty_boxes_give_finite_overlap_and_gradient() -> None:
    boxes = torch.zeros(2, 4, requires_grad=True)
    other = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.3, 0.3]])
    for overlap in (box_iou, box_giou):
        value = overlap(boxes, other)
        assert value.isfinite().all()
        (gradient,) = torch.autograd.grad(value.sum(), boxes)
        assert gradient.isfinite().all()


def test_overlaps_pass_gradcheck() -> None:
    a, b = random_boxes(4).requires_grad_(), random_boxes(4)
    assert torch.autograd.gradcheck(lambda x: box_giou(x, b), (a,))
    assert torch.autograd.gradcheck(lambda x: box_iou(x, b), (a,))


def test_inverse_sigmoid_undoes_sigmoid_and_is_finite_at_and_beyond_the_borders() -> None:
    x = torch.rand(7, dtype=torch.float64)
    assert_close(inverse_sigmoid(x).sigmoid(), x)
    borders = inverse_sigmoid(torch.tensor([-0.5, 0.0, 1.0, 1.5]))
    limit = torch.tensor(1e5).log()
    assert_close(borders, torch.stack([-limit, -limit, limit, limit]))
