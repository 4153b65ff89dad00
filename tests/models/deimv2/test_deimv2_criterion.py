"""The whole criterion: against a loop over stages and images, on odd batches, and over two processes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from thawline.errors import ConfigError, DataError
from thawline.models.deimv2.config import CriterionConfig
from thawline.models.deimv2.loss.criterion import Criterion
from thawline.models.deimv2.loss.denoising import build_denoising_queries
from thawline.models.deimv2.loss.matcher import match_queries, matching_cost, union_of_matches
from thawline.models.deimv2.loss.targets import Target, pack_targets
from thawline.models.deimv2.outputs import (
    DenoisingOutput,
    DetectionOutput,
    LayerPredictions,
    Predictions,
    TrainingOutput,
)
from thawline.ops.boxes import box_giou, box_iou, cxcywh_to_xyxy
from thawline.ops.distribution import weighting_function

C, Q, R = 5, 7, 8
FULL = CriterionConfig()
LITE = CriterionConfig(local=False, union_set=False)


def criterion(config: CriterionConfig = FULL) -> Criterion:
    return Criterion(SimpleNamespace(criterion=config))


def some_targets(*counts: int) -> list[Target]:
    return [Target(labels=torch.randint(C, (n,)), boxes=torch.rand(n, 4) * 0.4 + 0.2) for n in counts]


def leaf(*shape: int, positive: bool = False) -> Tensor:
    value = torch.rand(*shape, dtype=torch.float64) * 0.5 + 0.2 if positive else torch.randn(*shape).double()
    return value.requires_grad_()


def layers(n_layers: int, batch: int, queries: int) -> LayerPredictions:
    return LayerPredictions(
        logits=leaf(n_layers, batch, queries, C),
        boxes=leaf(n_layers, batch, queries, 4, positive=True),
        corner_logits=leaf(n_layers, batch, queries, 4 * (R + 1)),
    )


def plain(batch: int, queries: int) -> Predictions:
    return Predictions(logits=leaf(batch, queries, C), boxes=leaf(batch, queries, 4, positive=True))


def an_output(targets: list[Target], n_layers: int = 3, num_denoising: int = 0) -> DetectionOutput:
    """A possible output of the network; every tensor is a leaf of its own."""
    batch, denoising = len(targets), None
    if num_denoising:
        queries = build_denoising_queries(
            pack_targets(targets, C), num_classes=C, num_queries=Q, num_denoising=num_denoising
        )
        denoising = DenoisingOutput(
            layers=layers(n_layers, batch, queries.n_queries),
            pre=plain(batch, queries.n_queries),
            reference_boxes=torch.rand(batch, queries.n_queries, 4, dtype=torch.float64) * 0.4 + 0.2,
            queries=queries,
        )
    training = TrainingOutput(
        layers=layers(n_layers, batch, Q),
        pre=plain(batch, Q),
        encoder=plain(batch, Q),
        reference_boxes=torch.rand(batch, Q, 4, dtype=torch.float64) * 0.4 + 0.2,
        up=torch.tensor([0.5], dtype=torch.float64),
        reg_scale=torch.tensor([4.0], dtype=torch.float64),
        denoising=denoising,
    )
    return DetectionOutput(
        logits=training.layers.logits[-1], pred_boxes=training.layers.boxes[-1], training=training
    )


def leaves(output: DetectionOutput) -> list[Tensor]:
    parts: list[Any] = [output.training.layers, output.training.pre, output.training.encoder]
    if output.training.denoising is not None:
        parts += [output.training.denoising.layers, output.training.denoising.pre]
    return [value for part in parts for value in vars(part).values()]


# The oracle: one stage, one image, one pair at a time, as the formulas are written.

Pairs = list[tuple[int, int, int]]


def slow_stage(
    logits: Tensor,
    boxes: Tensor,
    own: Pairs,
    shared: Pairs,
    targets: list[Target],
    n_own: float,
    n_shared: float,
) -> dict[str, Tensor]:
    quality = torch.zeros_like(logits)
    hit = torch.zeros_like(logits)
    for b, q, g in own:
        label, target = targets[b]["labels"][g], cxcywh_to_xyxy(targets[b]["boxes"][g].double())
        quality[b, q, label] = box_iou(cxcywh_to_xyxy(boxes[b, q]), target).detach() ** 1.5
        hit[b, q, label] = 1
    weight = logits.sigmoid().detach() ** 1.5 * (1 - hit) + hit
    mal = (weight * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")).sum() / n_own
    bbox = giou = torch.zeros((), dtype=torch.float64)
    for b, q, g in shared:
        target = targets[b]["boxes"][g].double()
        bbox = bbox + (boxes[b, q] - target).abs().sum() / n_shared
        giou = giou + (1 - box_giou(cxcywh_to_xyxy(boxes[b, q]), cxcywh_to_xyxy(target))) / n_shared
    return {"mal": mal, "bbox": 5 * bbox, "giou": 2 * giou}


def slow_fgl(
    corners: Tensor, boxes: Tensor, references: Tensor, shared: Pairs, targets: list[Target], n_shared: float
) -> Tensor:
    bins = weighting_function(R, torch.tensor(0.5, dtype=torch.float64), torch.tensor(4.0)).tolist()
    total = torch.zeros((), dtype=torch.float64)
    for b, q, g in shared:
        target = cxcywh_to_xyxy(targets[b]["boxes"][g].double())
        iou = box_iou(cxcywh_to_xyxy(boxes[b, q]), target).detach()
        cx, cy, w, h = references[b, q].tolist()
        x1, y1, x2, y2 = target.tolist()
        wanted = [
            (cx - x1) / (w / 4) - 2,
            (cy - y1) / (h / 4) - 2,
            (x2 - cx) / (w / 4) - 2,
            (y2 - cy) / (h / 4) - 2,
        ]
        for edge, d in enumerate(wanted):
            k = sum(value <= d for value in bins) - 1
            k, r = (
                (0, 0.0)
                if k < 0
                else (R - 1, 1.0)
                if k >= R
                else (k, (d - bins[k]) / (bins[k + 1] - bins[k]))
            )
            log_p = corners[b, q].unflatten(0, (4, R + 1))[edge].log_softmax(0)
            total = total - iou * ((1 - r) * log_p[k] + r * log_p[k + 1])
    return 0.15 * total / n_shared


def slow_ddf(
    student: Tensor, teacher: Tensor, boxes: Tensor, confidence: Tensor, shared: Pairs, targets: list[Target],
    balance: tuple[float, float],
) -> Tensor:  # fmt: skip
    matched = {(b, q): g for b, q, g in shared}
    on, off = [], []
    for b in range(student.shape[0]):
        for q in range(student.shape[1]):
            weight = confidence[b, q]
            if (b, q) in matched:
                target = cxcywh_to_xyxy(targets[b]["boxes"][matched[b, q]].double())
                weight = box_iou(cxcywh_to_xyxy(boxes[b, q]), target)
            for edge in range(4):
                s, t = (x[b, q].unflatten(0, (4, R + 1))[edge] / 5 for x in (student, teacher))
                kl = F.kl_div(s.log_softmax(0), t.detach().softmax(0), reduction="sum")
                (on if (b, q) in matched else off).append(25 * weight.detach() * kl)
    means = [torch.stack(x).mean() if x else torch.zeros(()) for x in (on, off)]
    return 1.5 * (means[0] * balance[0] + means[1] * balance[1]) / sum(balance)


def slow_criterion(
    output: DetectionOutput, targets: list[Target], config: CriterionConfig
) -> dict[str, Tensor]:
    training, batch = output.training, len(targets)
    stages = [*zip(training.layers.logits, training.layers.boxes, strict=True)]
    stages += [(training.pre.logits, training.pre.boxes), (training.encoder.logits, training.encoder.boxes)]
    packed = pack_targets(targets, C)
    logits, boxes = (torch.stack(column) for column in zip(*stages, strict=True))
    matches = match_queries(matching_cost(logits, boxes, packed, overlap_only=False), packed.counts)
    own = [
        list(zip(matches.image, q, t, strict=True))
        for q, t in zip(matches.query, matches.target, strict=True)
    ]
    union = union_of_matches(matches, Q)
    shared = [list(zip(union.image, union.query[0], union.target[0], strict=True))] * len(stages)
    if not config.union_set:
        shared = own
    n_own, n_shared = max(1, packed.n_boxes), max(1, len(shared[0]))
    n_shared = n_shared if config.union_set else n_own
    balance = tuple(math.sqrt(4 * n * 8 / batch) for n in (len(shared[0]), batch * Q - len(shared[0])))
    confidence = training.layers.logits[-1].sigmoid().amax(-1)

    losses, last = {}, len(training.layers.logits) - 1
    names = [f"_aux_{i}" for i in range(last)] + ["", "_pre", "_enc_0"]
    for s, name in enumerate(names):
        terms = slow_stage(logits[s], boxes[s], own[s], shared[s], targets, n_own, n_shared)
        if config.local and s <= last:
            corners = training.layers.corner_logits
            terms["fgl"] = slow_fgl(
                corners[s], boxes[s], training.reference_boxes, shared[s], targets, n_shared
            )
            if s < last:
                terms["ddf"] = slow_ddf(
                    corners[s], corners[-1], boxes[s], confidence, shared[s], targets, balance
                )
        losses |= {f"loss_{kind}{name}": term for kind, term in terms.items()}

    if training.denoising is not None:
        dn, groups = training.denoising, training.denoising.queries.n_groups
        pairs = [
            (b, group * 2 * packed.labels.shape[1] + g, g)
            for b, target in enumerate(targets)
            for group in range(groups)
            for g in range(len(target["labels"]))
        ]
        stages = [*zip(dn.layers.logits, dn.layers.boxes, strict=True), (dn.pre.logits, dn.pre.boxes)]
        confidence = dn.layers.logits[-1].sigmoid().amax(-1)
        for s, (stage_logits, stage_boxes) in enumerate(stages):
            name = f"_dn_{s}" if s <= last else "_dn_pre"
            n = n_own * groups
            terms = slow_stage(stage_logits, stage_boxes, pairs, pairs, targets, n, n)
            if config.local and s <= last:
                corners = dn.layers.corner_logits
                terms["fgl"] = slow_fgl(corners[s], stage_boxes, dn.reference_boxes, pairs, targets, n)
                if s < last:
                    terms["ddf"] = slow_ddf(
                        corners[s], corners[-1], stage_boxes, confidence, pairs, targets, balance
                    )
            losses |= {f"loss_{kind}{name}": term for kind, term in terms.items()}
    return losses


@pytest.mark.parametrize("config", [FULL, LITE], ids=["full", "lite"])
@pytest.mark.parametrize("counts", [(3, 0, 2), (9, 1)], ids=["one_empty_image", "more_boxes_than_queries"])
def test_every_term_and_its_gradient_equal_the_loop(config: CriterionConfig, counts: tuple[int, ...]) -> None:
    targets = some_targets(*counts)
    output = an_output(targets, num_denoising=4)
    fast, slow = criterion(config)(output, targets), slow_criterion(output, targets, config)
    assert fast.keys() == slow.keys()
    for name, term in fast.items():
        assert_close(term, slow[name], msg=lambda text, name=name: f"{name}: {text}")
    weights = torch.rand(len(fast), dtype=torch.float64)
    totals = [sum(w * terms[name] for w, name in zip(weights, fast, strict=True)) for terms in (fast, slow)]
    gradients = [torch.autograd.grad(t, leaves(output), materialize_grads=True) for t in totals]
    assert_close(*gradients)


@pytest.mark.parametrize(
    ("n_layers", "config", "n_terms"),
    [(4, FULL, 47), (6, FULL, 67), (3, FULL, 37), (3, LITE, 27)],
    ids=["s", "x", "n", "lite"],
)
def test_terms_are_the_same_on_every_batch(n_layers: int, config: CriterionConfig, n_terms: int) -> None:
    names = []
    for counts in ((2, 1), (0, 3), (0, 0), (1,), (40,)):
        targets = some_targets(*counts)
        terms = criterion(config)(an_output(targets, n_layers, num_denoising=4), targets)
        assert all(term.isfinite() for term in terms.values())
        names.append(list(terms))
    assert len(names[0]) == n_terms
    assert all(other == names[0] for other in names)
    assert f"loss_ddf_dn_{n_layers - 1}" not in names[0]


def test_a_batch_without_boxes_teaches_background_alone_and_reaches_every_output() -> None:
    targets = some_targets(0, 0)
    output = an_output(targets, num_denoising=4)
    terms = criterion()(output, targets)
    assert terms["loss_mal"] > 0
    assert terms["loss_bbox"] == terms["loss_giou"] == terms["loss_fgl"] == 0
    assert all(term == 0 for name, term in terms.items() if "_dn_" in name)
    for gradient in torch.autograd.grad(sum(terms.values()), leaves(output)):
        assert gradient.isfinite().all()


def test_matcher_changes_at_its_epoch() -> None:
    targets = some_targets(3, 2)
    output = an_output(targets)
    change = criterion(CriterionConfig(matcher_change_epoch=5))
    before, at, after = (change(output, targets, epoch=epoch)["loss_mal"] for epoch in (4, 5, 6))
    assert before != at
    assert at == after
    always, never = criterion(CriterionConfig(matcher_change_epoch=0)), criterion()
    assert always(output, targets)["loss_mal"] == at
    assert never(output, targets)["loss_mal"] == before


def test_order_of_boxes_and_of_images_does_not_matter() -> None:
    targets = some_targets(3, 4)
    output = an_output(targets)
    shuffled = [Target(labels=t["labels"].flip(0), boxes=t["boxes"].flip(0)) for t in targets]
    # With the union set the order of boxes decides ties, as published.
    assert_close(criterion(LITE)(output, shuffled), criterion(LITE)(output, targets))

    turned = replace(
        output.training,
        layers=LayerPredictions(**{k: v.flip(1) for k, v in vars(output.training.layers).items()}),
        pre=Predictions(**{k: v.flip(0) for k, v in vars(output.training.pre).items()}),
        encoder=Predictions(**{k: v.flip(0) for k, v in vars(output.training.encoder).items()}),
        reference_boxes=output.training.reference_boxes.flip(0),
    )
    expected = criterion()(output, targets)
    assert_close(criterion()(replace(output, training=turned), targets[::-1]), expected)


@pytest.mark.parametrize("class_loss", ["vfl", "focal"])
def test_another_class_loss_takes_the_place_and_the_name(class_loss: str) -> None:
    targets = some_targets(2, 1)
    terms = criterion(CriterionConfig(class_loss=class_loss))(an_output(targets), targets)
    assert f"loss_{class_loss}_aux_0" in terms
    assert not any("mal" in name for name in terms)


def test_weights_scale_their_terms() -> None:
    targets = some_targets(2, 1)
    output = an_output(targets)
    once = criterion()(output, targets)
    names = ("class_weight", "bbox_weight", "giou_weight", "fgl_weight", "ddf_weight")
    doubled = replace(FULL, **{name: 2 * getattr(FULL, name) for name in names})
    assert_close(criterion(doubled)(output, targets), {name: 2 * term for name, term in once.items()})


def test_one_copy_to_the_host_and_no_other_question_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these operators would wait for it."""
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name().removeprefix("aten::").split(".")[0]
            if name in waiting:
                seen.append(name)
            return func(*args, **(kwargs or {}))

    copies = []
    original = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.shape) or original(self))
    targets = some_targets(3, 0, 2)
    with Watch():
        output = an_output(targets, num_denoising=4)
        sum(criterion()(output, targets).values()).backward()
    assert seen == []
    assert copies == [(5, 3, Q, 3)]


def test_detections_alone_cannot_be_trained_on() -> None:
    output = an_output(some_targets(1))
    with pytest.raises(ConfigError, match="detections only"):
        criterion()(replace(output, training=None), some_targets(1))


def test_a_class_the_model_does_not_have_is_named() -> None:
    targets = some_targets(2, 1)
    output = an_output(targets)
    targets[1]["labels"] += C
    with pytest.raises(DataError, match=rf"targets\[1\].*classes 0 to {C - 1}"):
        criterion()(output, targets)


def test_unknown_class_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="mal, vfl, focal"):
        CriterionConfig(class_loss="bce")
    with pytest.raises(ConfigError, match="gamma=-1"):
        CriterionConfig(gamma=-1)


def halves(output: DetectionOutput, rank: int) -> DetectionOutput:
    part = slice(rank, rank + 1)
    training = replace(
        output.training,
        layers=LayerPredictions(**{k: v[:, part] for k, v in vars(output.training.layers).items()}),
        pre=Predictions(**{k: v[part] for k, v in vars(output.training.pre).items()}),
        encoder=Predictions(**{k: v[part] for k, v in vars(output.training.encoder).items()}),
        reference_boxes=output.training.reference_boxes[part],
    )
    return DetectionOutput(logits=output.logits[part], pred_boxes=output.pred_boxes[part], training=training)


def on_one_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    output, targets = torch.load(f"{folder}/batch.pt", weights_only=False)
    terms = criterion()(halves(output, rank), targets[rank : rank + 1])
    torch.save({name: term.detach() for name, term in terms.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_one_without_boxes_equal_one_process(tmp_path: Path) -> None:
    targets = some_targets(4, 0)
    output = an_output(targets)
    torch.save((output, targets), tmp_path / "batch.pt")
    multiprocessing.start_processes(on_one_process, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    together = criterion()(output, targets)
    assert list(first) == list(second) == list(together)
    for name, term in together.items():
        if "ddf" not in name:  # a mean over the local batch, as published
            assert_close((first[name] + second[name]) / 2, term.detach())
