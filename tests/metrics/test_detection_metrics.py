"""Detection metrics: COCO's published numbers, closed forms, and the same answer from two processes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.detections import NAMES, Annotated, detected, measure, random_set
from thawline.errors import DataError, MissingExtraError
from thawline.metrics import detection
from thawline.metrics.detection import STATISTICS, DetectionEvaluator, DetectionMetrics


def coco_sample(shared: Path) -> tuple[list[Annotated], list[dict], list[str], dict[str, float]]:
    """COCO's own sample: images, its fake detections, class names, and the twelve numbers expected."""
    folder = shared / "fixtures/coco_eval"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    label_of = {entry["id"]: i for i, entry in enumerate(truth["categories"])}
    images, detections = [], []
    for image in sorted(truth["images"], key=lambda entry: entry["id"]):
        own = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        found = [entry for entry in results if entry["image_id"] == image["id"]]
        images.append(
            Annotated(
                xyxy([entry["bbox"] for entry in own]),
                [label_of[entry["category_id"]] for entry in own],
                np.array([entry["iscrowd"] for entry in own], bool),
                np.array([entry["area"] for entry in own], float),
            )
        )
        detections.append(
            {
                "boxes": xyxy([entry["bbox"] for entry in found]),
                "scores": np.array([entry["score"] for entry in found], float),
                "labels": np.array([label_of[entry["category_id"]] for entry in found], int),
            }
        )
    names = [entry["name"] for entry in truth["categories"]]
    twelve = expected["instances_val2014_100 + fakebbox100 (bbox)"]
    return images, detections, names, dict(zip(STATISTICS, twelve, strict=True))


def xyxy(bboxes: list) -> np.ndarray:
    boxes = np.asarray(bboxes, float).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def test_the_twelve_numbers_are_cocos(shared: Path) -> None:
    images, detections, names, expected = coco_sample(shared)
    metrics = measure(images, detections, tuple(names))
    assert list(metrics.statistics) == list(STATISTICS)
    for key, value in expected.items():
        assert metrics.statistics[key] == pytest.approx(value, abs=1e-9), key
    # The means over classes of what is reported per class.
    for key in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100"):
        per_class = [getattr(entry, key) for entry in metrics.classes]
        assert np.nanmean(per_class) == pytest.approx(expected[key], abs=1e-9), key


def test_perfect_detections_score_one_everywhere() -> None:
    # One small, one medium, one large box; the class of each is another.
    image = Annotated([[0, 0, 10, 20], [50, 50, 100, 120], [200, 0, 400, 300]], [2, 0, 1])
    metrics = measure([image], [detected(image.boxes_xyxy.tolist(), [0.9, 0.8, 0.7], [2, 0, 1])])
    assert set(metrics.statistics.values()) == {1.0}
    assert [entry.AP for entry in metrics.classes] == [1, 1, 1]
    assert metrics.classes[0].AP_medium == 1
    assert math.isnan(metrics.classes[0].AP_small)
    assert (metrics.precision, metrics.recall, metrics.f1, metrics.threshold) == (1, 1, 1, pytest.approx(0.7))
    assert metrics.confusion == ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0))


def test_average_precision_in_closed_form() -> None:
    # Ranked: hit, false, hit. Precision is 1 up to recall ½ and ⅔ beyond; of 101 recalls 51 are ≤ ½.
    image = Annotated([[0, 0, 10, 10], [20, 20, 30, 30]], [1, 1])
    boxes = [[0, 0, 10, 10], [60, 60, 70, 70], [20, 20, 30, 30]]
    metrics = measure([image], [detected(boxes, [0.9, 0.8, 0.7], [1, 1, 1])])
    assert pytest.approx((51 + 50 * 2 / 3) / 101) == metrics.classes[1].AP50
    assert metrics.classes[1].precision_at_recall[50] == 1
    assert metrics.classes[1].precision_at_recall[51] == pytest.approx(2 / 3)
    assert math.isnan(metrics.classes[0].AP)


def test_ap_needs_overlap_at_every_threshold() -> None:
    # IoU exactly 0.8: seven of the ten thresholds .50 … .95 are met.
    image = Annotated([[0, 0, 100, 100]], [0])
    metrics = measure([image], [detected([[0, 0, 100, 80]], [0.5], [0])], ("ant",))
    assert metrics.statistics["AP"] == pytest.approx(0.7)
    assert metrics.statistics["AP75"] == 1
    assert metrics.statistics["AR1"] == pytest.approx(0.7)


def test_nothing_to_measure_is_nan_and_null_in_json() -> None:
    metrics = measure([Annotated([], [])], [detected()])
    assert all(math.isnan(value) for value in metrics.statistics.values())
    assert json.loads(json.dumps(metrics.to_dict()))["statistics"]["AP"] is None
    assert metrics.images[0].f1 == 1


def test_a_result_survives_json(shared: Path) -> None:
    images, detections, names, _ = coco_sample(shared)
    metrics = measure(images[:20], detections[:20], tuple(names))
    again = DetectionMetrics.from_dict(json.loads(json.dumps(metrics.to_dict())))
    assert again.to_dict() == metrics.to_dict()
    assert type(again.classes[0]) is type(metrics.classes[0])


# --- update and gathering


def test_an_image_given_twice_counts_once() -> None:
    image = Annotated([[0, 0, 10, 10]], [0])
    evaluator = DetectionEvaluator([image, Annotated([], [])], NAMES)
    evaluator.update([0, 1], [detected([[0, 0, 10, 10]], [0.9], [0]), detected()])
    evaluator.update(torch.tensor([0]), [detected([[0, 0, 10, 10]], [0.9], [0])])
    metrics = evaluator.compute()
    assert metrics.statistics["AP"] == 1
    assert metrics.confusion[0][0] == 1
    evaluator.reset()
    with pytest.raises(DataError, match="2 of 2 images were not evaluated"):
        evaluator.compute()


def test_an_image_never_evaluated_is_an_error() -> None:
    evaluator = DetectionEvaluator([Annotated([], []), Annotated([], [])], NAMES)
    evaluator.update([1], [detected()])
    with pytest.raises(DataError, match=r"1 of 2 images were not evaluated \(first: 0\)"):
        evaluator.compute()


@pytest.mark.parametrize(
    ("index", "found", "message"),
    [
        (2, detected(), "index must be in 0–1, got 2"),
        (0, detected([[0, 0, 1, 1]], [0.5], [3]), "labels must be in 0–2, got 3–3"),
        (0, detected([[0, 0, 1, 1]], [math.nan], [0]), "NaN or infinity"),
        (0, detected([[0, 0, 1, 1]], [0.5, 0.5], [0]), "1 boxes, 2 scores, 1 labels"),
    ],
)
def test_bad_detections_are_refused(index: int, found: dict, message: str) -> None:
    evaluator = DetectionEvaluator([Annotated([], [])] * 2, NAMES)
    with pytest.raises(DataError, match=message):
        evaluator.update([index], [found])


def test_labels_need_names() -> None:
    with pytest.raises(DataError, match="Label 3 has no name: 3 class names"):
        DetectionEvaluator([Annotated([[0, 0, 1, 1]], [3])], NAMES)


def evaluate_share(rank: int, folder: str, n_images: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, detections = random_set(n_images)
    evaluator = DetectionEvaluator(images, NAMES)
    # As a distributed sampler deals an odd number: every second image, the first one again at the end.
    share = [i % n_images for i in range(rank, n_images + n_images % 2, 2)]
    evaluator.update(share, [detections[i] for i in share])
    metrics = evaluator.compute()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(metrics.to_dict()))
    dist.destroy_process_group()


def test_two_processes_lose_and_double_nothing(tmp_path: Path) -> None:
    n_images = 7
    mp.start_processes(evaluate_share, (str(tmp_path), n_images), nprocs=2, start_method="fork")
    alone = json.loads(json.dumps(measure(*random_set(n_images)).to_dict()))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MissingExtraError, match=r"faster-coco-eval: `pip install 'thawline\[detect\]'`"):
        DetectionEvaluator([], NAMES)


def test_classes_evaluated_in_parts_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    images, detections = random_set(30)
    whole = measure(images, detections).to_dict()
    for cells, n_parts in ((1, 3), (60, 2), (90, 1)):
        parts = []
        evaluate = detection._evaluate_classes

        def spy(*args: object, parts: list = parts, evaluate: Callable = evaluate) -> object:
            parts.append(args[2])
            return evaluate(*args)

        with monkeypatch.context() as patch:
            patch.setattr(detection, "_evaluate_classes", spy)
            patch.setattr(detection, "MOST_CELLS", cells)
            assert measure(images, detections).to_dict() == whole
        assert len(parts) == n_parts
