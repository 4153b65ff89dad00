"""Images to train on and to judge by: what is held out, what cannot be learned, evaluation on other data."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.detection_files import (
    NAMES,
    SETS,
    coco_content,
    save_json,
    save_yaml,
    write_coco,
    write_images,
    write_voc,
    write_yolo,
)
from tests.support.detection_runs import TINY
from thawline.cli import main
from thawline.data.detection.dataset import load_detection
from thawline.errors import ConfigError, DataError
from thawline.metrics.detection import DetectionEvaluator
from thawline.models.deimv2.model import DEIMv2
from thawline.recipe import RunConfig
from thawline.run import evaluate, run, saved_config
from thawline.training.detection.objective import DetectionObjective
from thawline.training.objective import build_objective


def recipe(
    root: Path, data: dict | None = None, objective: dict | None = None, **training: object
) -> RunConfig:
    return RunConfig.from_mapping(
        {
            "objective": {"kind": "detection", **(objective or {})},
            "name": "run",
            "folder": str(root.parent / "runs"),
            "base": {"variant": "atto", "size": 64, "overrides": TINY},
            "tuner": "none",
            "data": {"path": str(root), **(data or {})},
            "training": {"epochs": 1, "batch_size": 2, "max_steps": 1, **training},
        }
    )


def counts(root: Path, **data: object) -> tuple[int, int]:
    """Images to train on, and held out."""
    objective = build_objective(recipe(root, data))
    assert isinstance(objective, DetectionObjective)
    return len(objective.records), len(objective.held_out_rows)


def without_val(root: Path, format: str) -> Path:
    """A set with training images alone: no val, or val without an image."""
    if format == "coco":
        write_coco(root)
        (root / "annotations/instances_val2017.json").unlink()
    elif format == "empty-coco":
        write_coco(root)
        empty = coco_content("val") | {"images": [], "annotations": []}
        save_json(root / "annotations/instances_val2017.json", empty)
    elif format == "empty-yolo":
        write_yolo(root)
        for path in (root / "images/val").iterdir():
            path.unlink()
        shutil.rmtree(root / "labels/val")
    elif format == "yolo":
        write_yolo(root)
        save_yaml(root / "data.yaml", {"train": "images/train", "val": None, "names": list(NAMES)})
    else:
        write_voc(root)
        (root / "ImageSets/Main/val.txt").write_text("\n")
    return root


# --- held-out images


@pytest.mark.parametrize("format", ["coco", "empty-coco", "yolo", "empty-yolo", "empty-voc"])
def test_a_tenth_is_held_out_at_least_one_image_where_no_split_has_any(
    tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "thawline")
    assert counts(without_val(tmp_path / "set", format)) == (2, 1)
    reason = "has no images in 'val'" if format.startswith("empty") else "has no evaluation split"
    assert f"{reason}: 1 of 3 images are held out." in caplog.text


def test_no_image_is_held_out_of_one_or_where_the_recipe_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = without_val(tmp_path / "set", "coco")
    assert counts(root, eval_fraction=0) == (3, 0)
    assert "no image is held out: the run is not evaluated" in caplog.text
    content = coco_content("train")
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:2]
    save_json(root / "annotations/instances_train2017.json", content)
    assert counts(root) == (1, 0)


@pytest.mark.parametrize("eval_every", ["epoch", 1])
def test_a_run_without_held_out_images_trains_and_says_so(tmp_path: Path, eval_every: object) -> None:
    root = without_val(tmp_path / "set", "yolo")
    result = run(recipe(root, {"eval_fraction": 0}, eval_every=eval_every))
    assert (result.status, result.metrics) == ("finished", {})
    assert (result.folder / "model/config.json").is_file()


def test_a_published_run_needs_held_out_images(tmp_path: Path) -> None:
    root = without_val(tmp_path / "set", "yolo")
    with pytest.raises(ConfigError, match="published` chooses its best epoch by held-out images"):
        run(recipe(root, {"eval_fraction": 0}, {"preset": "published"}, epochs=None), dry_run=True)


def test_a_split_that_is_asked_for_must_have_images(tmp_path: Path) -> None:
    root = without_val(tmp_path / "set", "empty-coco")
    with pytest.raises(DataError, match="the split 'val' has no images"):
        counts(root, eval_split="val")
    with pytest.raises(DataError, match="has no split 'test'. Available: train, val"):
        counts(root, eval_split="test")
    with pytest.raises(DataError, match="the split 'val' has no images"):
        counts(root, train_split="val", eval_split="train")


def test_the_first_evaluation_split_with_images_counts(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    content = {"train": "images/train", "val": "images/empty", "test": "images/val", "names": list(NAMES)}
    (root / "images/empty").mkdir()
    save_yaml(root / "data.yaml", content)
    assert counts(root) == (3, 2)


# --- nothing, or too much, to learn


def test_images_without_a_box_cannot_be_trained_on(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    for name in ("a", "c"):
        (root / f"labels/train/{name}.txt").write_text("")
    with pytest.raises(DataError, match="no box to learn from"):
        counts(root)
    root = write_coco(tmp_path / "other")
    content = coco_content("val") | {"annotations": []}
    save_json(root / "annotations/instances_val2017.json", content)
    with pytest.raises(DataError, match="no box to learn from in the images that are trained on"):
        counts(root, train_split="val", eval_split="train")


def test_held_out_images_without_a_box_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_yolo(tmp_path / "set")
    counts(root)
    assert "nothing to score" not in caplog.text
    for file in (root / "labels/val").iterdir():
        file.write_text("")
    assert counts(root) == (3, 2)
    assert "None of the 2 held-out images has a box: there is nothing to score." in caplog.text


def test_more_boxes_than_queries_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_coco(tmp_path / "set")
    content = coco_content("train")
    box = content["annotations"][0]
    content["annotations"] += [box | {"id": 100 + i, "bbox": [i, i, 9, 9]} for i in range(12)]
    save_json(root / "annotations/instances_train2017.json", content)
    build_objective(recipe(root)).load_base()
    assert "1 of 3 training images have more than 12 boxes, up to 14" in caplog.text
    assert "Set `base.overrides.num_queries`" in caplog.text


# --- evaluation on other data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    root = write_coco(tmp_path_factory.mktemp("trained") / "set")
    return run(recipe(root)).folder


def other(root: Path, kind: str) -> Path:
    """A set of the three training images for evaluation alone. Returns: its path."""
    if kind == "test-folder":
        write_images(root / "test", "train")
        save_json(root / "test/_annotations.coco.json", coco_content("train", first_image=70))
        return root
    if kind == "lone-json":
        write_images(root / "images", "train")
        save_json(root / "labels.json", coco_content("train", first_image=70))
        return root / "labels.json"
    if kind == "yolo-test":
        write_yolo(root)
        shutil.rmtree(root / "images/val")
        save_yaml(
            root / "data.yaml",
            {"train": "../absent", "val": "images/val", "test": "images/train", "names": list(NAMES)},
        )
        return root / "data.yaml"
    write_voc(root)
    shutil.rmtree(root / "ImageSets")
    for name in SETS["val"]:
        (root / f"Annotations/{name}.xml").unlink()
        (root / f"JPEGImages/{name}.png").unlink()
    return root


def judged(trained: Path, data: Path, *options: str) -> tuple[dict, list[dict]]:
    """Evaluate by the command line. Returns: the metrics and the predictions that it wrote."""
    assert main(["eval", str(trained), "--data", str(data), *options]) == 0
    folder = trained / f"eval-{data.stem}"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    metrics = json.loads((folder / "detection_metrics.json").read_text())
    shutil.rmtree(folder)
    return metrics, rows


@pytest.mark.parametrize("kind", ["test-folder", "lone-json", "yolo-test", "voc"])
def test_everything_given_is_judged(trained: Path, tmp_path: Path, kind: str) -> None:
    metrics, rows = judged(trained, other(tmp_path / "other", kind))
    assert metrics["n_images"] == len(rows) == 3
    assert metrics["n_boxes"] == 3
    ids = [70, 71, 72] if kind in ("test-folder", "lone-json") else [0, 1, 2]
    assert [row["image_id"] for row in rows] == ids


def test_settings_of_the_runs_own_data_say_nothing_about_others(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")
    (root / "annotations/instances_val2017.json").rename(root / "annotations/instances_test.json")
    (root / "val2017").rename(root / "test")
    own = {"format": "coco", "images": None, "eval_split": "test", "max_eval_images": 1}
    folder = run(recipe(root, own)).folder
    metrics, _ = judged(folder, other(tmp_path / "other", "voc"))
    assert metrics["n_images"] == 3
    metrics, _ = judged(folder, root)
    assert metrics["n_images"] == 1
    metrics, _ = judged(folder, other(tmp_path / "more", "voc"), "--data.max_eval_images", "2")
    assert metrics["n_images"] == 2


def test_of_several_splits_one_is_judged_and_the_others_named(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "thawline")
    metrics, _ = judged(trained, write_yolo(tmp_path / "other"))
    assert metrics["n_images"] == 2
    assert "judged on val, 2 images; not on train (`data.eval_split`)" in caplog.text
    metrics, _ = judged(trained, write_yolo(tmp_path / "more"), "--data.eval_split", "train")
    assert metrics["n_images"] == 3


@pytest.mark.parametrize("names", [("cat", "ant", "bee"), ("cat", "bee"), ("yak", "cat", "bee", "ant")])
def test_classes_are_joined_by_name(trained: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    content = coco_content("train", first_image=5)
    ids = {"ant": 40, "bee": 7, "cat": 3, "yak": 1}
    old = dict(zip((1, 2, 3), NAMES, strict=True))
    content["annotations"] = [
        entry | {"category_id": ids[old[entry["category_id"]]]}
        for entry in content["annotations"]
        if old[entry["category_id"]] in names
    ]
    content["categories"] = [{"id": ids[name], "name": name} for name in names]
    write_images(tmp_path, "train")
    save_json(tmp_path / "labels.json", content)
    config = RunConfig.from_mapping(
        saved_config(trained).to_mapping() | {"data": {"path": str(tmp_path), "eval_fraction": 1}}
    )
    objective = build_objective(config, read="held-out", described={"class_names": list(NAMES)})
    assert objective.datasets[0].class_names == NAMES
    wanted = [[label for label, _ in boxes if label in names] for _, boxes in SETS["train"].values()]
    found = [[NAMES[label] for label in record.labels] for record in objective.held_out_rows]
    assert found == wanted
    metrics, rows = judged(trained, tmp_path / "labels.json")
    assert [entry["name"] for entry in metrics["classes"]] == list(NAMES)
    written = {(d["class"], d["category_id"]) for row in rows for d in row["detections"]}
    assert written <= {(name, ids[name] if name in names else None) for name in NAMES}


def test_boxes_of_a_class_that_the_detector_lacks_are_refused_by_name(trained: Path, tmp_path: Path) -> None:
    content = coco_content("train")
    content["categories"][0]["name"] = "wasp"
    write_images(tmp_path, "train")
    save_json(tmp_path / "labels.json", content)
    config = RunConfig.from_mapping(saved_config(trained).to_mapping() | {"data": str(tmp_path)})
    with pytest.raises(DataError, match="boxes of wasp, and the detector was trained on ant, bee, cat"):
        evaluate(trained, config=config)


def test_ids_of_the_users_file_are_written(trained: Path, tmp_path: Path) -> None:
    content = coco_content("train", ids=(11, 22, 33))
    for entry in (*content["images"], *content["annotations"]):
        key = "image_id" if "image_id" in entry else "id"
        entry[key] = f"scan-{entry[key]}"
    write_images(tmp_path, "train")
    save_json(tmp_path / "labels.json", content)
    _, rows = judged(trained, tmp_path / "labels.json")
    assert [row["image_id"] for row in rows] == ["scan-0", "scan-1", "scan-2"]


# --- many boxes in an image


def crowded(n: int) -> tuple[list, list]:
    """An image of `n` boxes, and detections that are all right."""
    boxes = np.array(
        [[20 * (i % 30), 20 * (i // 30), 20 * (i % 30) + 9, 20 * (i // 30) + 9] for i in range(n)]
    )
    root = type("Image", (), {})()
    root.boxes_xyxy, root.labels = boxes.astype(float), np.zeros(n, int)
    root.iscrowd, root.area = np.zeros(n, bool), np.full(n, 81.0)
    found = {"boxes": torch.tensor(boxes), "scores": torch.linspace(0.9, 0.1, n), "labels": torch.zeros(n)}
    return [root], [found]


@pytest.mark.parametrize(("max_dets", "ap"), [(100, 0.257), (400, 1.0), (1000, 1.0), (200, 0.5)])
def test_max_dets_decides_how_many_detections_count(
    max_dets: int, ap: float, caplog: pytest.LogCaptureFixture
) -> None:
    images, found = crowded(400)
    evaluator = DetectionEvaluator(images, ("cell",), max_dets)
    evaluator.update([0], found)
    metrics = evaluator.compute()
    assert metrics.statistics["AP"] == pytest.approx(ap, abs=0.01)
    assert pytest.approx(ap, abs=0.01) == metrics.classes[0].AP
    assert metrics.statistics["AR100"] == pytest.approx(0.25)
    assert metrics.statistics["AR_small"] == pytest.approx(min(1, max_dets / 400))
    assert ("1 of 1 images hold more than" in caplog.text) == (max_dets < 400)


def test_max_dets_is_a_setting_of_the_objective(trained: Path, tmp_path: Path) -> None:
    content = coco_content("train")
    box = content["annotations"][0]
    content["annotations"] += [box | {"id": 100 + i, "bbox": [i % 30, i // 30, 9, 9]} for i in range(150)]
    write_images(tmp_path, "train")
    save_json(tmp_path / "labels.json", content)
    metrics, _ = judged(trained, tmp_path / "labels.json", "--objective.max_dets", "300")
    assert metrics["n_boxes"] == 153
    with pytest.raises(ConfigError, match="`objective.max_dets` must be a number of at least 100, got 50"):
        recipe(tmp_path, objective={"max_dets": 50})


def test_the_loader_and_training_read_the_same_set(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    objective = build_objective(recipe(root))
    assert [r.path for r in objective.records] == [r.path for r in load_detection(root).records("train")]
    assert DEIMv2.from_variant("atto", **TINY).config.decoder.num_queries == 12
