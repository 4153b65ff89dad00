"""Matching against brute force over all assignments, and the union set against a loop over pairs."""

from __future__ import annotations

import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from thawline.errors import DataError, MissingExtraError
from thawline.models.deimv2.loss.matcher import Matches, match_queries, matching_cost, union_of_matches
from thawline.models.deimv2.loss.targets import Target, pack_targets

S, C = 3, 7


def some_targets(*counts: int) -> list[Target]:
    return [
        Target(labels=torch.randint(C, (count,)), boxes=torch.rand(count, 4) * 0.4 + 0.1) for count in counts
    ]


def slow_cost(logit: Tensor, box: Tensor, label: int, target: Tensor, overlap_only: bool) -> float:
    """One query, one box, in plain floats."""
    p = 1 / (1 + np.exp(-float(logit[label])))
    (cx, cy, w, h), (tx, ty, tw, th) = box.tolist(), target.tolist()
    w, h = max(w, 0), max(h, 0)
    x1, y1, x2, y2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    u1, v1, u2, v2 = tx - tw / 2, ty - th / 2, tx + tw / 2, ty + th / 2
    inner = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
    union = w * h + tw * th - inner
    iou = inner / union
    if overlap_only:
        return -p * iou**4
    hull = (max(x2, u2) - min(x1, u1)) * (max(y2, v2) - min(y1, v1))
    giou = iou - (hull - union) / hull
    classification = 0.25 * (1 - p) ** 2 * -np.log(p + 1e-8) - 0.75 * p**2 * -np.log(1 - p + 1e-8)
    l1 = sum(abs(a - b) for a, b in zip(box.tolist(), target.tolist(), strict=True))
    return 2 * classification + 5 * l1 - 2 * giou


@pytest.mark.parametrize("overlap_only", [False, True])
def test_assignment_is_the_cheapest_of_all(overlap_only: bool) -> None:
    targets = some_targets(3, 0, 5)
    logits, boxes = torch.randn(S, 3, 5, C) * 2, torch.rand(S, 3, 5, 4) * 0.5 + 0.1
    boxes[0, 0, 0, 2] = -0.1  # an untrained decoder makes such widths
    packed = pack_targets(targets, C)
    cost = matching_cost(logits, boxes, packed, overlap_only=overlap_only)
    assert cost.shape == (S, 3, 5, 5)
    matches = match_queries(cost, packed.counts)
    assert matches.query.shape == (S, 8)
    for stage in range(S):
        for image, target in enumerate(targets):
            labels, wanted = target["labels"].tolist(), target["boxes"]
            table = [
                [
                    slow_cost(logits[stage, image, q], boxes[stage, image, q], label, box, overlap_only)
                    for label, box in zip(labels, wanted, strict=True)
                ]
                for q in range(5)
            ]
            best = min(
                sum(table[q][g] for g, q in enumerate(chosen))
                for chosen in permutations(range(5), len(labels))
            )
            here = matches.image == image
            pairs = list(zip(matches.query[stage, here], matches.target[stage, here], strict=True))
            assert sorted(g for _, g in pairs) == list(range(len(labels)))
            assert sum(table[q][g] for q, g in pairs) == pytest.approx(best, abs=1e-4)


def test_more_boxes_than_queries_leave_boxes_over() -> None:
    packed = pack_targets(some_targets(6, 2), C)
    cost = matching_cost(torch.randn(S, 2, 4, C), torch.rand(S, 2, 4, 4), packed, overlap_only=False)
    matches = match_queries(cost, packed.counts)
    assert matches.query.shape == (S, 4 + 2)
    for stage in range(S):
        assert sorted(matches.query[stage, :4]) == [0, 1, 2, 3]
        assert len(set(matches.target[stage, :4])) == 4


def test_a_batch_without_boxes_matches_nothing() -> None:
    packed = pack_targets(some_targets(0, 0), C)
    assert packed.boxes.shape == (2, 1, 4)
    assert (packed.labels == C).all()
    cost = matching_cost(torch.randn(S, 2, 4, C), torch.rand(S, 2, 4, 4), packed, overlap_only=True)
    matches = match_queries(cost, packed.counts)
    assert matches.query.shape == (S, 0)
    assert union_of_matches(matches, 4).query.shape == (1, 0)


def test_numbers_that_are_none_do_not_stop_the_matcher() -> None:
    packed = pack_targets(some_targets(2), C)
    logits = torch.full((1, 1, 4, C), torch.nan)
    boxes = torch.rand(1, 1, 4, 4)
    boxes[..., 0] = torch.inf
    for overlap_only in (False, True):
        cost = matching_cost(logits, boxes, packed, overlap_only=overlap_only)
        assert cost.isfinite().all()
        assert match_queries(cost, packed.counts).query.shape == (1, 2)


def slow_union(matches: Matches, n_images: int) -> list[tuple[int, int, int]]:
    """The authors' procedure: count equal pairs, sort by count, walk."""
    chosen = []
    for image in range(n_images):
        here = matches.image == image
        pairs = np.stack([matches.query[:, here].ravel(), matches.target[:, here].ravel()], axis=1)
        unique, votes = torch.unique(torch.from_numpy(pairs), return_counts=True, dim=0)
        taken: dict[int, int] = {}
        for query, target in unique[votes.argsort(descending=True)].tolist():
            taken.setdefault(query, target)
        chosen += [(image, query, target) for query, target in sorted(taken.items())]
    return chosen


def test_union_equals_the_loop_over_pairs() -> None:
    generator = np.random.default_rng(0)
    image = np.repeat([0, 2], [4, 3])
    for _ in range(20):
        query = np.stack(
            [np.r_[generator.permutation(6)[:4], generator.permutation(6)[:3]] for _ in range(5)]
        )
        target = np.stack([np.r_[generator.permutation(4), generator.permutation(3)] for _ in range(5)])
        matches = Matches(image, query, target)
        union = union_of_matches(matches, 6)
        pairs = list(zip(union.image, union.query[0], union.target[0], strict=True))
        assert pairs == slow_union(matches, 3)
        assert len({(i, q) for i, q, _ in pairs}) == len(pairs)


def test_union_keeps_the_majority_whatever_the_order_of_stages() -> None:
    query = np.array([[0, 1], [0, 1], [1, 0], [2, 0]])
    target = np.array([[0, 1], [0, 1], [0, 1], [0, 1]])
    for order in permutations(range(4)):
        union = union_of_matches(Matches(np.zeros(2, int), query[list(order)], target[list(order)]), 3)
        # Query 0: both boxes twice, a tie. Query 1: box 1 twice, box 0 once. Query 2: box 0.
        assert union.query.tolist() == [[0, 1, 2]]
        assert union.target[0, 1:].tolist() == [1, 0]


def test_misshapen_targets_are_named() -> None:
    targets = some_targets(1)
    targets.append(Target(labels=torch.tensor([1, 2]), boxes=torch.rand(1, 4)))
    with pytest.raises(DataError, match=r"targets\[1\].*\(2,\) and \(1, 4\)"):
        pack_targets(targets, C)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match=r"thawline\[detect\]"):
        match_queries(torch.zeros(1, 1, 2, 1), (1,))


def test_matching_cost_gives_no_gradient() -> None:
    packed = pack_targets(some_targets(2), C)
    logits = torch.randn(1, 1, 3, C, requires_grad=True)
    cost = matching_cost(logits, torch.rand(1, 1, 3, 4), packed, overlap_only=False)
    assert not cost.requires_grad
