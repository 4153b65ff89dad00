"""Mistakes: hand-made scenes, a slow search for the best score, and another library's confusion matrix."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest

from tests.support.detections import Annotated, detected, measure, random_set
from thawline.metrics.detection import DetectionEvaluator, DetectionMetrics
from thawline.metrics.mistakes import MOST_CONFUSIONS, best_threshold, count_mistakes, match_image

HERE, THERE, ELSEWHERE = [0, 0, 10, 10], [20, 20, 40, 40], [70, 70, 90, 90]


def test_hits_confusions_false_positives_and_misses_are_counted_separately() -> None:
    images = [Annotated([HERE, THERE, ELSEWHERE], [0, 1, 2]), Annotated([HERE], [0]), Annotated([], [])]
    detections = [
        detected([HERE, THERE, HERE], [0.9, 0.9, 0.9], [0, 2, 0]),  # a hit, a confusion, the same hit again
        detected([HERE], [0.9], [0]),
        detected([ELSEWHERE], [0.9], [1]),
    ]
    metrics = measure(images, detections)
    assert metrics.threshold == pytest.approx(0.9)
    assert metrics.confusion == (
        (2, 0, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (1, 1, 0, 0),
    )
    worst = metrics.images
    assert [image.index for image in worst] == [2, 0, 1]
    first = worst[1]
    assert (first.n_hits, first.n_confused, first.n_false, first.n_missed) == (1, 1, 1, 1)
    assert first.f1 == pytest.approx(2 / 6)
    assert (metrics.precision, metrics.recall) == (pytest.approx(2 / 5), pytest.approx(2 / 4))
    assert math.isnan(metrics.classes[2].recall) is False
    assert metrics.classes[2].precision == 0


def test_the_better_overlap_is_taken_and_each_box_once() -> None:
    near = [1, 1, 11, 11]
    images = [Annotated([HERE, near], [0, 0])]
    metrics = measure(images, [detected([near, near], [0.9, 0.8], [0, 0])])
    assert metrics.images[0].n_hits == 2
    metrics = measure(images[:1], [detected([near, near, near], [0.9, 0.8, 0.7], [0, 0, 0])])
    assert metrics.threshold == pytest.approx(0.8)


def test_detections_inside_a_crowd_are_neither_hits_nor_false_positives() -> None:
    crowd = Annotated([[0, 0, 100, 100], HERE], [0, 0], np.array([True, False]))
    metrics = measure([crowd], [detected([HERE, THERE, ELSEWHERE], [0.9, 0.8, 0.7], [0, 0, 1])])
    assert metrics.n_boxes == 1
    assert metrics.confusion[0][0] == 1
    assert metrics.threshold == pytest.approx(0.9)
    metrics = measure([crowd], [detected([HERE, THERE, ELSEWHERE], [0.7, 0.8, 0.9], [0, 0, 1])])
    assert metrics.confusion[3] == (0, 1, 0, 0)


def test_the_best_score_is_that_of_a_slow_search() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        scores = rng.integers(1, 8, rng.integers(1, 12)) / 10  # with ties
        is_hit = rng.random(len(scores)) < 0.5
        n_boxes = int(is_hit.sum() + rng.integers(0, 4))
        if not is_hit.any():
            assert best_threshold(scores, is_hit, n_boxes) == 0
            continue
        f1 = {t: 2 * is_hit[scores >= t].sum() / ((scores >= t).sum() + n_boxes) for t in sorted(scores)}
        got = best_threshold(scores, is_hit, n_boxes)
        assert f1[got] == pytest.approx(max(f1.values()))
        assert got == max(t for t in f1 if f1[t] == pytest.approx(max(f1.values())))


def test_rows_count_boxes_and_columns_count_detections() -> None:
    images, detections = random_set(30)
    metrics = measure(images, detections)
    confusion = np.array(metrics.confusion)
    n_boxes = np.bincount(np.concatenate([i.labels[~i.iscrowd] for i in images]), minlength=3)
    assert confusion[:3].sum(1).tolist() == n_boxes.tolist() == [entry.n_boxes for entry in metrics.classes]
    assert confusion.trace() == sum(image.n_hits for image in metrics.images)
    for k, entry in enumerate(metrics.classes):
        assert entry.precision == pytest.approx(confusion[k, k] / confusion[:, k].sum())
        assert entry.recall == pytest.approx(confusion[k, k] / confusion[k].sum())


def test_the_confusion_matrix_is_supervisions_where_boxes_stand_apart() -> None:
    sv_metrics = pytest.importorskip("supervision.metrics.detection")
    sv = pytest.importorskip("supervision")
    rng = np.random.default_rng(2)
    images, detections = [], []
    for _ in range(12):
        cells = rng.permutation(9)[:6]
        corners = np.stack([cells % 3, cells // 3], 1) * 50.0
        boxes = np.concatenate([corners, corners + rng.uniform(20, 40, (6, 2))], 1)
        labels = rng.integers(0, 3, 6)
        images.append(Annotated(boxes[:4], labels[:4]))
        guesses = np.where(rng.random(6) < 0.6, labels, rng.integers(0, 3, 6))
        detections.append(detected((boxes[1:] + 1).tolist(), [0.9] * 5, guesses[1:].tolist()))
    metrics = measure(images, detections)
    theirs = sv_metrics.ConfusionMatrix.from_detections(
        predictions=[
            sv.Detections(
                found["boxes"].numpy(), confidence=found["scores"].numpy(), class_id=found["labels"].numpy()
            )
            for found in detections
        ],
        targets=[sv.Detections(image.boxes_xyxy, class_id=image.labels) for image in images],
        classes=["ant", "bee", "cat"],
        conf_threshold=0.5,
        iou_threshold=0.5,
    )
    assert np.array(metrics.confusion).tolist() == theirs.matrix.astype(int).tolist()


def test_confusions_are_listed_by_frequency_with_nothing_as_a_class() -> None:
    images, detections = random_set(40)
    metrics = measure(images, detections)
    matrix = np.array(metrics.confusion)
    np.fill_diagonal(matrix, 0)
    assert sum(c.count for c in metrics.confusions) == matrix.sum() > 0
    for confusion in metrics.confusions:
        assert matrix[confusion.true, confusion.detected] == confusion.count
    counts = [c.count for c in metrics.confusions]
    assert counts == sorted(counts, reverse=True)
    again = DetectionMetrics.from_dict(json.loads(json.dumps(metrics.to_dict())))
    assert again.confusions == metrics.confusions


def test_many_classes_take_no_matrix_and_little_room() -> None:
    """LVIS has 1,203 classes: a matrix would have 1.4 million cells, and the file of metrics 15 MB."""
    n = 1203
    rng = np.random.default_rng(0)
    images, detections = [], []
    for _ in range(6):
        corners = rng.uniform(0, 400, (20, 2))
        boxes = np.concatenate([corners, corners + 60], 1)
        labels = rng.integers(0, n, 20)
        images.append(Annotated(boxes, labels))
        confused = np.where(np.arange(20) < 3, 7, labels)  # three of an image are taken for class 7
        detections.append(detected(boxes.tolist(), rng.uniform(0.5, 1, 20).tolist(), confused.tolist()))
    names = tuple(f"thing {i}" for i in range(n))
    evaluator = DetectionEvaluator(images, names)
    evaluator.update(range(6), detections)
    tracemalloc.start()
    matched = [
        match_image(i.boxes_xyxy, i.labels, i.iscrowd, d.boxes_xyxy, d.scores, d.labels)
        for i, d in zip(images, map(evaluator.detections, range(6)), strict=True)
    ]
    count_mistakes(matched, 0.0, n)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    metrics = evaluator.compute()
    assert metrics.confusion == ()
    assert len(metrics.confusions) == 18 <= MOST_CONFUSIONS
    assert {c.detected for c in metrics.confusions} == {7}
    without_curves = {key: value for key, value in metrics.to_dict().items() if key != "classes"}
    assert len(json.dumps(without_curves)) < 10_000
