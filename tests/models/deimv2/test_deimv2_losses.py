"""The loss formulas against slow loops in float64 and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from thawline.models.deimv2.loss.losses import (
    CLASS_LOSSES,
    box_losses,
    ddf_balance,
    ddf_loss,
    fgl_loss,
    focal_loss,
    mal_loss,
    vfl_loss,
)
from thawline.ops.boxes import box_giou, cxcywh_to_xyxy
from thawline.ops.distribution import distance_to_bins, weighting_function

S, B, Q, C, N, BINS = 2, 3, 5, 4, 6, 9
STAGE = torch.arange(S)[:, None]
IMAGE = torch.tensor([0, 0, 1, 2, 2, 2])
QUERY = torch.tensor([[0, 4, 1, 3, 0, 2], [2, 3, 0, 1, 4, 0]])
LABEL = torch.tensor([[1, 3, 0, 2, 2, 1], [1, 3, 0, 2, 2, 1]])


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def slow_class_loss(kind: str, logits: Tensor, iou: Tensor, gamma: float) -> Tensor:
    total = []
    for s in range(S):
        y, quality = torch.zeros(B, Q, C, dtype=torch.float64), torch.zeros(B, Q, C, dtype=torch.float64)
        for n in range(N):
            y[IMAGE[n], QUERY[s, n], LABEL[s, n]] = 1
            quality[IMAGE[n], QUERY[s, n], LABEL[s, n]] = iou[s, n]
        x = logits[s]
        p = x.sigmoid()
        if kind == "mal":
            target, weight = y * quality**gamma, p.detach() ** gamma * (1 - y) + y
        elif kind == "vfl":
            target = y * quality
            weight = 0.75 * p.detach() ** gamma * (1 - y) + target
        else:
            target, weight = y, (0.75 * y + 0.25 * (1 - y)) * (y * (1 - p) + (1 - y) * p) ** gamma
        total.append((weight * F.binary_cross_entropy_with_logits(x, target, reduction="none")).sum())
    return torch.stack(total)


@pytest.mark.parametrize("kind", sorted(CLASS_LOSSES))
def test_class_loss_and_its_gradient_equal_the_dense_formula(kind: str) -> None:
    logits, iou = (doubles(S, B, Q, C) * 2).requires_grad_(), torch.rand(S, N, dtype=torch.float64)
    fast = CLASS_LOSSES[kind](logits, (STAGE, IMAGE, QUERY, LABEL), iou, 1.5)
    slow = slow_class_loss(kind, logits, iou, 1.5)
    assert_close(fast, slow)
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert_close(
        torch.autograd.grad((fast * weight).sum(), logits), torch.autograd.grad((slow * weight).sum(), logits)
    )


def test_mal_with_gamma_zero_is_plain_cross_entropy() -> None:
    logits, iou = doubles(S, B, Q, C), torch.rand(S, N, dtype=torch.float64)
    y = torch.zeros_like(logits)
    y[STAGE, IMAGE, QUERY, LABEL] = 1
    plain = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(dim=(1, 2, 3))
    assert_close(mal_loss(logits, (STAGE, IMAGE, QUERY, LABEL), iou, 0.0), plain)


def test_class_losses_without_a_match_are_background_alone() -> None:
    none = torch.zeros(S, 0, dtype=torch.int64)
    for loss in (mal_loss, vfl_loss, focal_loss):
        value = loss(doubles(S, B, Q, C), (STAGE, none[0], none, none), none.double(), 1.5)
        assert value.shape == (S,)
        assert (value > 0).all()


def test_box_losses_equal_the_loop() -> None:
    boxes, targets = torch.rand(S, N, 4, dtype=torch.float64), torch.rand(S, N, 4, dtype=torch.float64)
    l1, giou = box_losses(boxes, targets)
    for s in range(S):
        pairs = list(zip(boxes[s], targets[s], strict=True))
        assert_close(l1[s], sum((a - b).abs().sum() for a, b in pairs))
        assert_close(giou[s], sum(1 - box_giou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)) for a, b in pairs))


def test_fgl_equals_the_loop_also_beyond_both_ends() -> None:
    weights = weighting_function(BINS - 1, torch.tensor(0.5, dtype=torch.float64), torch.tensor(4))
    distance = doubles(S, N, 4) * 3
    distance[0, 0], distance[0, 1] = -7.0, 7.0
    corners, iou = doubles(S, N, 4 * BINS), torch.rand(S, N, dtype=torch.float64)
    left, share = distance_to_bins(distance, weights)
    fast = fgl_loss(corners, left, share, iou)
    w = weights.tolist()
    for s in range(S):
        total = 0.0
        for n in range(N):
            for edge in range(4):
                d, logits = distance[s, n, edge].item(), corners[s, n, edge * BINS : (edge + 1) * BINS]
                k = sum(value <= d for value in w) - 1
                if k < 0:
                    k, r = 0, 0.0
                elif k >= BINS - 1:
                    k, r = BINS - 2, 1.0
                else:
                    r = (d - w[k]) / (w[k + 1] - w[k])
                log_p = logits.log_softmax(0)
                total -= iou[s, n] * ((1 - r) * log_p[k] + r * log_p[k + 1])
        assert_close(fast[s], total)


def slow_ddf(student: Tensor, teacher: Tensor, confidence: Tensor, iou: Tensor, s: int) -> Tensor:
    matched = {(IMAGE[n].item(), QUERY[s, n].item()): iou[s, n] for n in range(N)}
    on, off = [], []
    for b in range(B):
        for q in range(Q):
            for edge in range(4):
                part = slice(edge * BINS, (edge + 1) * BINS)
                p = (teacher[b, q, part] / 5).softmax(0)
                kl = (p * (p.log() - (student[s, b, q, part] / 5).log_softmax(0))).sum()
                weight = matched.get((b, q), confidence[b, q])
                (on if (b, q) in matched else off).append(25 * weight * kl)
    root_on, root_off = math.sqrt(len(on) * 8 / B), math.sqrt(len(off) * 8 / B)
    return (sum(on) / len(on) * root_on + sum(off) / len(off) * root_off) / (root_on + root_off)


def test_ddf_equals_the_loop() -> None:
    student, teacher = doubles(S, B, Q, 4 * BINS), doubles(B, Q, 4 * BINS)
    confidence, iou = torch.rand(B, Q, dtype=torch.float64), torch.rand(S, N, dtype=torch.float64)
    fast = ddf_loss(student, teacher, confidence, (STAGE, IMAGE, QUERY), iou, ddf_balance(N, B * Q - N, B))
    for s in range(S):
        assert_close(fast[s], slow_ddf(student, teacher, confidence, iou, s))


def test_ddf_is_zero_at_the_teacher_and_the_teacher_learns_nothing() -> None:
    teacher = doubles(B, Q, 4 * BINS).requires_grad_()
    student = teacher.detach().expand(S, -1, -1, -1).clone().requires_grad_()
    confidence, iou = torch.rand(B, Q, dtype=torch.float64), torch.rand(S, N, dtype=torch.float64)
    loss = ddf_loss(student, teacher, confidence, (STAGE, IMAGE, QUERY), iou, (1.0, 2.0))
    assert (loss == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.abs().max() < 1e-12
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(
            ddf_loss(student, teacher, confidence, (STAGE, IMAGE, QUERY), iou, (1.0, 2.0)).sum(), teacher
        )
