"""The check of a dataset: every fault is found and named, and a repaired copy has none of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.detection_files import (
    NAMES,
    SETS,
    coco_content,
    save_json,
    save_yaml,
    write_coco,
    write_yolo,
)
from thawline.cli import main
from thawline.data.detection.check import check_detection, save_samples
from thawline.data.detection.dataset import DetectionDataset, load_detection
from thawline.data.detection.drawing import class_colours
from thawline.data.detection.duplicates import fingerprint, similar_pairs
from thawline.data.detection.records import DetectionSet
from thawline.data.detection.repair import write_repaired
from thawline.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "set")


def edit(root: Path, split: str, change) -> None:
    file = root / f"annotations/instances_{split}2017.json"
    content = json.loads(file.read_text())
    change(content)
    save_json(file, content)


def kinds(root: Path) -> Counter[str]:
    return Counter(problem.kind for problem in check_detection(root).problems)


def repaired(root: Path) -> DetectionSet:
    before = snapshot(root)
    copy = write_repaired(check_detection(root), root.parent / "repaired")
    assert snapshot(root) == before
    assert copy.errors == ()
    return copy


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()
    }


def boxes(data: DetectionSet, split: str, stem: str) -> list[tuple[str, list[float]]]:
    record = next(record for record in data.splits[split] if record.path.stem.startswith(stem))
    return [
        (data.class_names[label], box)
        for label, box in zip(record.labels.tolist(), record.boxes_xyxy.tolist(), strict=True)
    ]


def test_a_sound_set_is_counted_and_nothing_is_found(root: Path) -> None:
    check = check_detection(root)
    assert check.problems == ()
    assert check.is_trainable
    train = check.summaries["train"]
    assert (train.n_images, train.n_empty, train.n_boxes) == (3, 1, 3)
    assert train.boxes_per_class == {"ant": 1, "bee": 1, "cat": 1}
    assert (train.width, train.height) == ((32, 40, 50), (20, 30, 64))
    assert train.boxes_per_image == (0, 1, 2)
    assert (train.n_small, train.n_large, train.n_tiny) == (3, 0, 0)
    lines = check.lines()
    assert "No problems found." in lines
    assert "boxes                3    2" in lines
    assert json.loads(json.dumps(check.to_dict()))["splits"]["val"]["n_images"] == 2


def test_tiny_boxes_are_counted_at_the_input_size(root: Path) -> None:
    # 0.4 of 40 pixels is 6.4 at 640; 0.6 is 9.6.
    edit(root, "train", lambda content: content["annotations"][0].update(bbox=[1, 1, 0.4, 20]))
    edit(root, "train", lambda content: content["annotations"][1].update(bbox=[1, 1, 0.6, 20]))
    assert check_detection(root).summaries["train"].n_tiny == 1


def test_images_in_two_splits_are_a_leak_and_leave_training(root: Path) -> None:
    shutil.copy(root / "train2017/a.png", root / "val2017/f.png")
    edit(root, "val", lambda content: content["images"].append({"id": 50, "file_name": "f.png"}))
    check = check_detection(root)
    assert [str(problem) for problem in check.problems] == ["train: train2017/a.png: val: val2017/f.png"]
    assert check.is_trainable
    copy = repaired(root)
    assert [record.path.name for record in copy.splits["train"]] == ["b.png", "c.png"]
    assert len(copy.splits["val"]) == 3


def photo(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Smooth shades, as a photograph has them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def test_re_encoded_and_resized_copies_are_found_and_other_images_are_not(tmp_path: Path) -> None:
    originals, others = [], []
    for seed in range(6):
        originals.append(tmp_path / f"original{seed}.png")
        photo(seed).save(originals[-1])
    photo(0).save(tmp_path / "a.jpg", quality=60)
    photo(1).resize((80, 60)).save(tmp_path / "b.png")
    photo(2).point(lambda value: min(255, int(value * 1.1) + 5)).save(tmp_path / "c.png")
    shutil.copy(originals[3], tmp_path / "d.png")
    photo(99).save(tmp_path / "e.png")
    others = [tmp_path / name for name in ("a.jpg", "b.png", "c.png", "d.png", "e.png")]
    found = list(similar_pairs(fingerprint(originals), fingerprint(others)))
    assert found == [(0, 0, False), (1, 1, False), (2, 2, False), (3, 3, True)]
    assert list(similar_pairs(fingerprint(originals), fingerprint([]))) == []


def test_shapes_on_plain_ground_are_not_taken_for_one_image(tmp_path: Path) -> None:
    paths = []
    for i in range(12):
        pixels = np.full((96, 96, 3), 230, np.uint8)
        x, y = 10 + 20 * (i % 4), 10 + 25 * (i // 4)
        pixels[y : y + 14, x : x + 14] = (200, 30, 30)
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    assert list(similar_pairs(fingerprint(paths[:6]), fingerprint(paths[6:]))) == []


def test_real_splits_share_no_image_and_video_frames_look_alike(shared: Path) -> None:
    data = load_detection(shared / "data/detection/aerial_cars")
    train, val = (fingerprint([r.path for r in data.records(split)]) for split in ("train", "val"))
    assert list(similar_pairs(train, val)) == []
    frames = sorted(r.path for r in data.records("train") if r.path.name.startswith("MOS1"))
    found = list(similar_pairs(fingerprint(frames[::2]), fingerprint(frames[1::2])))
    assert len(found) == len(frames[::2])
    assert not any(is_exact for _, _, is_exact in found)


@pytest.mark.parametrize(("ids", "shift"), [((2, 3, 4), "-1"), ((0, 1, 2), "+1")])
def test_ids_shifted_by_one_are_recognised_and_shifted_back(
    root: Path, ids: tuple[int, int, int], shift: str
) -> None:
    for split in SETS:
        categories = coco_content(split, (1, 2, 3))["categories"]
        save_json(
            root / f"annotations/instances_{split}2017.json",
            coco_content(split, ids) | {"categories": categories},
        )
    check = check_detection(root)
    assert not check.is_trainable
    shifted = [str(problem) for problem in check.problems if problem.kind == "class-shift"]
    assert shifted == [
        f"class ids: boxes have {ids[0]}–{ids[2]}, the class list 1–3; all fit when {shift} is added"
    ]
    with pytest.raises(DataError, match="look shifted by one"):
        load_detection(root)
    copy = repaired(root)
    assert copy.class_ids == (1, 2, 3)
    assert boxes(copy, "train", "a") == [("bee", [4, 3, 24, 18]), ("cat", [10, 6, 30, 27])]


def test_yolo_labels_that_count_from_one_are_recognised(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    for path in root.rglob("labels/*/*.txt"):
        rows = [line.split() for line in path.read_text().splitlines()]
        path.write_text("".join(f"{int(row[0]) + 1} {' '.join(row[1:])}\n" for row in rows))
    assert kinds(root)["class-shift"] == 1
    copy = repaired(root)
    assert copy.class_names == NAMES
    assert [name for name, _ in boxes(copy, "train", "a")] == ["bee", "cat"]


def test_one_wrong_id_is_no_shift(root: Path) -> None:
    edit(root, "train", lambda content: content["annotations"][0].update(category_id=9))
    assert kinds(root) == {"class-id": 1, "class-unused": 1}
    assert boxes(repaired(root), "train", "a") == [("cat", [10, 6, 30, 27])]


def test_boxes_outside_without_area_or_twice_are_repaired(root: Path) -> None:
    def change(content: dict) -> None:
        own = {"image_id": 1, "category_id": 1, "iscrowd": 0}
        for i, bbox in enumerate(([45, 5, 20, 5], [9, 9, 0, 4], [60, 2, 4, 4], [1, 2, 8, 4], [1, 2, 8, 4])):
            content["annotations"].append(own | {"id": 90 + i, "bbox": bbox, "area": 32})

    edit(root, "train", change)
    assert kinds(root) == {"box-outside": 1, "box-degenerate": 2, "box-duplicate": 1}
    copy = repaired(root)
    assert boxes(copy, "train", "b") == [("ant", [45, 5, 50, 10]), ("ant", [1, 2, 9, 6])]
    assert copy.records("train")[1].area.tolist() == [25, 32]
    assert copy.warnings == ()


def test_bad_images_and_annotations_are_left_out(root: Path) -> None:
    def change(content: dict) -> None:
        content["images"].append({"id": 70, "file_name": "gone.png", "width": 5, "height": 5})
        content["annotations"] += [
            {"id": 100, "image_id": 999, "category_id": 1, "bbox": [1, 1, 2, 2]},
            {"id": 102, "image_id": 0, "category_id": 1, "bbox": [1, 1, 2]},
        ]

    edit(root, "train", change)
    (root / "train2017/c.png").write_bytes((root / "train2017/c.png").read_bytes()[:-500])
    assert set(kinds(root)) == {
        "missing-image", "corrupt-image", "unknown-image", "malformed", "class-unused",
    }  # fmt: skip
    copy = repaired(root)
    assert [record.path.name for record in copy.splits["train"]] == ["a.png", "b.png"]
    assert len(boxes(copy, "train", "a")) == 2
    changes = (root.parent / "repaired/changes.txt").read_text()
    assert "gone.png" in changes
    assert "→ leaves the images out" in changes


def test_boxes_of_resized_images_are_rescaled_and_those_of_other_images_left_out(root: Path) -> None:
    Image.open(root / "train2017/a.png").resize((20, 15)).save(root / "train2017/a.png")
    shutil.copy(root / "train2017/b.png", root / "train2017/c.png")
    assert kinds(root)["image-size"] == 2
    copy = repaired(root)
    assert boxes(copy, "train", "a") == [("bee", [2, 1.5, 12, 9]), ("cat", [5, 3, 15, 13.5])]
    assert copy.records("train")[0].area.tolist() == [75, 105]
    assert [record.path.name for record in copy.splits["train"]] == ["a.png", "b.png"]


def test_cards_own_xml_files_are_rescaled_to_the_shrunken_images(shared: Path, tmp_path: Path) -> None:
    origin = shared / "data/detection/cards"
    coco = load_detection(origin, format="coco")
    voc = write_repaired(check_detection(origin, format="voc"), tmp_path / "repaired")
    wanted = {r.path.name: r.boxes_xyxy for records in coco.splits.values() for r in records}
    got = {r.path.name: r.boxes_xyxy for r in voc.records("train")}
    assert got.keys() == wanted.keys()
    # Shrunken sides were rounded to whole pixels: up to half of one, in 512.
    for name in got:
        np.testing.assert_allclose(np.sort(got[name], 0), np.sort(wanted[name], 0), atol=0.51)


def test_two_entries_of_one_file_are_joined_and_files_of_one_id_left_out(root: Path) -> None:
    def join(content: dict) -> None:
        content["images"].append(content["images"][0] | {"id": 7})
        content["annotations"][1]["image_id"] = 7

    edit(root, "train", join)
    edit(root, "val", lambda content: content["images"][1].update(id=content["images"][0]["id"]))
    assert kinds(root)["duplicate-image"] == 4
    with pytest.raises(DataError, match="more than once"):
        load_detection(root)
    edit(root, "val", lambda content: content["images"][1].update(id=1))
    copy = repaired(root)
    assert boxes(copy, "train", "a") == [("bee", [4, 3, 24, 18]), ("cat", [10, 6, 30, 27])]


def test_images_of_one_name_in_different_folders_stay_apart(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set", images_first=False)
    for folder, suffix in (("images", ".png"), ("labels", ".txt")):
        (root / f"val/{folder}/d{suffix}").rename(root / f"val/{folder}/a{suffix}")
    copy = repaired(root)
    assert [record.path.name for record in copy.splits["val"]] == ["a_2.png", "e.png"]
    assert copy.splits["val"][0].width == 64
    assert copy.splits["train"][0].width == 40


@pytest.mark.parametrize("orientation", [3, 6])
def test_camera_tags_mean_the_same_in_the_copy(tmp_path: Path, orientation: int) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "images/train/a.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(0, (30, 40) if orientation == 6 else (40, 30)).save(root / "images/train/a.jpg", exif=exif)
    (root / "labels/train/b.txt").write_text("0 0.5 0.5 0 0\n")
    copy = repaired(root)
    image = DetectionDataset(copy.records("train"))[0][0].permute(1, 2, 0).numpy()
    wanted = DetectionDataset(load_detection(root).records("train"))[0][0].permute(1, 2, 0).numpy()
    assert np.array_equal(image, wanted)
    assert boxes(copy, "train", "a")[0] == ("bee", pytest.approx([4, 3, 24, 18]))


def test_a_copy_needs_a_folder_of_its_own(root: Path) -> None:
    check = check_detection(root)
    with pytest.raises(DataError, match="is inside the dataset"):
        write_repaired(check, root / "repaired")
    (root.parent / "used").mkdir()
    (root.parent / "used/file").touch()
    with pytest.raises(DataError, match="is in use"):
        write_repaired(check, root.parent / "used")


def test_a_contradictory_class_list_cannot_be_repaired(root: Path) -> None:
    for split in SETS:
        edit(root, split, lambda content: content["categories"][2].update(name="ant"))
    assert kinds(root)["class-list"] == 2
    with pytest.raises(DataError, match="only its owner knows(?s:.*)'ant' has the ids"):
        write_repaired(check_detection(root), root.parent / "repaired")


def test_unused_and_alike_classes_are_remarked(root: Path) -> None:
    for split in SETS:
        edit(root, split, lambda content: content["categories"].append({"id": 4, "name": "Ant "}))
    check = check_detection(root)
    assert [(problem.kind, problem.detail) for problem in check.problems] == [
        ("class-unused", "'Ant' (id 4)"),
        ("class-alike", "'ant', 'Ant'"),
    ]
    assert check.is_trainable


def test_nothing_left_is_said(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    save_yaml(root / "data.yaml", {"train": "images/train", "names": list(NAMES)})
    for path in (root / "images/train").iterdir():
        path.write_text("no image")
    with pytest.raises(DataError, match="no image is left"):
        write_repaired(check_detection(root), tmp_path / "repaired")


def test_samples_are_drawn_for_every_split(root: Path, tmp_path: Path) -> None:
    paths = save_samples(load_detection(root), tmp_path / "images", n_images=2)
    assert [path.name for path in paths] == ["samples_train.png", "samples_val.png"]
    image = np.asarray(Image.open(paths[0]))
    assert image.shape[1] == 2 * 366 + 6
    # Box lines of class "bee" in the second colour, on the image and in the legend.
    colour = class_colours().by_idx(1).as_rgb()
    assert (image == colour).all(-1).sum() > 300


def test_the_command_checks_draws_and_repairs(root: Path, tmp_path: Path, capsys) -> None:
    out, words = tmp_path / "out", ["data", "check", str(root), "--size", "64", "--out"]
    assert main([*words, str(out)]) == 0
    assert "No problems found." in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "augmented.png", "check.json", "samples_train.png", "samples_val.png",
    }  # fmt: skip
    (root / "train2017/c.png").unlink()
    assert main([*words, str(out), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"][0]["kind"] == "missing-image"
    assert main([*words, str(out), "--fix", str(tmp_path / "new")]) == 0
    assert "leaves the images out" in capsys.readouterr().out
    assert len(load_detection(tmp_path / "new").records("train")) == 2
    for size, message in (
        ("wide", "'size' takes int or list"),
        ("[64]", "expected a side, or [height, width]"),
    ):
        assert main([*words[:4], size, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert main([*words[:4], "[32, 128]", "--out", str(out)]) == 1  # an image is missing
    assert Image.open(out / "augmented.png").height < 366 // 2  # panels are 366 wide
    assert main([*words, str(out), "--format", "cocoo"]) == 2
    assert "Did you mean 'coco'" in capsys.readouterr().err
