"""Denoising queries: their number, mask, noise bounds and padding."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from thawline.models.deimv2.loss.denoising import build_denoising_queries, denoising_matches
from thawline.models.deimv2.loss.targets import PackedTargets, Target, pack_targets
from thawline.ops.boxes import cxcywh_to_xyxy

C, Q = 9, 6


def packed(*counts: int) -> PackedTargets:
    targets = [
        Target(
            labels=torch.randint(C, (count,)),
            boxes=torch.cat([torch.rand(count, 2) * 0.3 + 0.3, torch.rand(count, 2) * 0.2 + 0.1], dim=1),
        )
        for count in counts
    ]
    return pack_targets(targets, C)


@pytest.mark.parametrize(
    ("counts", "expected"), [((3, 1), 198), ((7, 0, 2), 196), ((120,), 240), ((0, 0), 2)]
)
def test_number_of_queries(counts: tuple[int, ...], expected: int) -> None:
    queries = build_denoising_queries(packed(*counts), num_classes=C, num_queries=Q, num_denoising=100)
    assert queries.n_queries == expected
    assert queries.labels.shape == (len(counts), expected)
    assert queries.reference_logits.shape == (len(counts), expected, 4)
    assert queries.reference_logits.isfinite().all()


def test_each_query_sees_its_group_and_the_matching_queries_only() -> None:
    queries = build_denoising_queries(packed(2, 3), num_classes=C, num_queries=Q, num_denoising=10)
    n_groups, group = 3, 6
    assert queries.n_groups == n_groups
    for row in range(n_groups * group + Q):
        for column in range(n_groups * group + Q):
            row_is_dn, column_is_dn = row < n_groups * group, column < n_groups * group
            may_see = not column_is_dn or (row_is_dn and row // group == column // group)
            assert queries.blocked[row, column].item() is not may_see


def test_positives_stay_near_and_negatives_move_away() -> None:
    targets = packed(4)
    queries = build_denoising_queries(targets, num_classes=C, num_queries=Q, num_denoising=400)
    shaken = cxcywh_to_xyxy(queries.reference_logits.sigmoid()).reshape(queries.n_groups, 2, 4, 4)
    boxes = targets.boxes[0]
    half = boxes[:, 2:].repeat(1, 2) / 2
    positive = (shaken[:, 0] - cxcywh_to_xyxy(boxes)).abs() / half
    assert positive.max() <= 1 + 1e-4
    assert positive.mean() == pytest.approx(0.5, abs=0.05)
    # Corners read from centre and |size| are sorted; only edges that did not cross can be compared.
    negative = shaken[:, 1] - cxcywh_to_xyxy(boxes)
    assert negative.abs().max() <= (2 * half).max() + 1e-4
    assert (negative.abs() / half).mean() > 0.9


def test_half_of_the_noisy_labels_change_and_padding_never_does() -> None:
    targets = packed(50, 20)
    queries = build_denoising_queries(
        targets, num_classes=C, num_queries=Q, num_denoising=1000, label_noise=0.5
    )
    original = targets.labels.repeat(1, 2 * queries.n_groups)
    real = original < C
    assert (queries.labels[~real] == C).all()
    assert queries.labels[real].max() < C
    changed = (queries.labels != original)[real].float().mean().item()
    assert changed == pytest.approx(0.25 * (C - 1) / C, abs=0.03)


def test_without_noise_every_query_is_its_box() -> None:
    targets = packed(2, 3)
    queries = build_denoising_queries(
        targets, num_classes=C, num_queries=Q, num_denoising=7, label_noise=0, box_noise=0
    )
    assert_close(queries.labels, targets.labels.repeat(1, 4))
    real = queries.labels < C
    assert_close(queries.reference_logits.sigmoid()[real], targets.boxes.repeat(1, 4, 1)[real])


def test_positive_k_of_each_group_answers_for_box_k() -> None:
    matches = denoising_matches((2, 0, 1), n_boxes=3, n_groups=2)
    pairs = set(
        zip(matches.image.tolist(), matches.query[0].tolist(), matches.target[0].tolist(), strict=True)
    )
    assert pairs == {(0, 0, 0), (0, 1, 1), (0, 6, 0), (0, 7, 1), (2, 0, 0), (2, 6, 0)}
    assert denoising_matches((0, 0), n_boxes=1, n_groups=1).query.shape == (1, 0)
