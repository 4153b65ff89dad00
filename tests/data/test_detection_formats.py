"""Detection formats: the same set, whatever its files look like; everything wrong in them named at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.detection_files import (
    NAMES,
    SETS,
    coco_content,
    save_json,
    save_yaml,
    write_coco,
    write_images,
    write_voc,
    write_voc_file,
    write_yolo,
)
from thawline.data.detection.dataset import load_detection, read_detection
from thawline.data.detection.formats import FORMATS
from thawline.data.detection.records import DetectionSet
from thawline.errors import ConfigError, DataError


def assert_is_the_set(data: DetectionSet, order: tuple[str, ...] = NAMES) -> None:
    """The set of `SETS`, to 1e-9 pixels: YOLO's fractions cost a rounding."""
    assert data.class_names == order
    assert list(data.splits) == ["train", "val"]
    for split, images in SETS.items():
        assert [record.path.stem for record in data.splits[split]] == list(images)
        for record, ((width, height), boxes) in zip(data.splits[split], images.values(), strict=True):
            assert (record.width, record.height) == (width, height)
            assert [data.class_names[label] for label in record.labels] == [name for name, _ in boxes]
            wanted = np.array([box for _, box in boxes], float).reshape(-1, 4)
            np.testing.assert_allclose(record.boxes_xyxy, wanted, atol=1e-9)
            sides = wanted[:, 2:] - wanted[:, :2]
            np.testing.assert_allclose(record.area, sides.prod(1), atol=1e-9)
            assert not record.iscrowd.any()


def kinds(data: DetectionSet) -> list[str]:
    return [problem.kind for problem in data.problems]


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_set_is_read_from_every_format_found_by_looking(tmp_path: Path, name: str) -> None:
    write = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}[name]
    data = load_detection(write(tmp_path / "set"))
    assert data.format == name
    assert data.problems == ()
    assert_is_the_set(data)


# --- COCO


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 3), (7, 18, 90)])
def test_category_ids_are_mapped_by_the_file(tmp_path: Path, ids: tuple[int, int, int]) -> None:
    data = load_detection(write_coco(tmp_path / "set", ids))
    assert data.class_ids == ids
    assert_is_the_set(data)


def test_labels_follow_sorted_ids_not_the_order_in_the_file(tmp_path: Path) -> None:
    assert_is_the_set(load_detection(write_coco(tmp_path / "set", (9, 4, 6))), order=("bee", "cat", "ant"))


def test_roboflows_layout_loses_its_unused_root_category(tmp_path: Path) -> None:
    for split, folder in (("train", "train"), ("val", "valid")):
        write_images(tmp_path / folder, split)
        content = coco_content(split)
        content["categories"] = [{"id": 0, "name": "animals", "supercategory": "none"}] + [
            entry | {"supercategory": "animals"} for entry in content["categories"]
        ]
        save_json(tmp_path / folder / "_annotations.coco.json", content)
    data = load_detection(tmp_path)
    assert kinds(data) == ["class-note", "class-note"]
    assert_is_the_set(data)


def test_another_splits_ids_are_joined_by_name(tmp_path: Path) -> None:
    write_coco(tmp_path / "set", (1, 2, 3))
    save_json(tmp_path / "set/annotations/instances_val2017.json", coco_content("val", (0, 1, 2)))
    data = load_detection(tmp_path / "set")
    assert kinds(data) == ["class-note"]
    assert_is_the_set(data)


def test_a_class_that_only_another_split_has_is_an_error(tmp_path: Path) -> None:
    write_coco(tmp_path / "set")
    content = coco_content("val")
    content["categories"][0]["name"] = "dog"
    save_json(tmp_path / "set/annotations/instances_val2017.json", content)
    with pytest.raises(DataError, match="'dog' is not among the classes of 'train'"):
        load_detection(tmp_path / "set")


def test_crowds_areas_and_string_ids_are_kept_as_annotated(tmp_path: Path) -> None:
    content = coco_content("train")
    for entry in content["images"]:
        entry["id"] = f"image-{entry['id']}"
    for entry in content["annotations"]:
        entry["image_id"] = f"image-{entry['image_id']}"
    content["annotations"][0] |= {"iscrowd": 1, "area": 7.5}
    del content["annotations"][1]["area"], content["annotations"][1]["iscrowd"]
    write_images(tmp_path, "train")
    save_json(tmp_path / "labels.json", content)
    record = load_detection(tmp_path / "labels.json").records("train")[0]
    assert record.image_id == "image-0"
    assert record.iscrowd.tolist() == [True, False]
    assert record.area.tolist() == [7.5, 20 * 21]


def test_captions_beside_instances_are_left_alone(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")
    shutil.copy(
        root / "annotations/instances_val2017.json", root / "annotations/person_keypoints_val2017.json"
    )
    save_json(root / "annotations/captions_train2017.json", {"images": [], "annotations": []})
    assert_is_the_set(load_detection(root))


def test_two_coco_files_of_one_split_are_not_chosen_between(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")
    shutil.copy(root / "annotations/instances_train2017.json", root / "annotations/instances_train_old.json")
    with pytest.raises(
        DataError, match="several COCO files for 'train'.*instances_train2017.*instances_train_old"
    ):
        load_detection(root)


# --- YOLO


@pytest.mark.parametrize("images_first", [True, False])
@pytest.mark.parametrize("names", [list(NAMES), dict(enumerate(NAMES))], ids=["list", "dict"])
def test_yolo_reads_both_folder_orders_and_both_kinds_of_names(
    tmp_path: Path, images_first: bool, names: object
) -> None:
    assert_is_the_set(load_detection(write_yolo(tmp_path / "set", images_first, names)))


def test_yolo_reads_lists_of_images_and_a_root(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "train.txt").write_text("".join(f"./images/train/{name}.png\n" for name in SETS["train"]))
    config = tmp_path / "elsewhere" / "custom.yaml"
    config.parent.mkdir()
    save_yaml(config, {"path": "../set", "train": "train.txt", "val": ["images/val"], "names": list(NAMES)})
    assert_is_the_set(load_detection(config))
    assert_is_the_set(load_detection(config.parent))


def test_yolo_understands_roboflows_paths_from_one_folder_up(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set", images_first=False)
    save_yaml(root / "data.yaml", {s: f"../{s}/images" for s in SETS} | {"nc": 3, "names": list(NAMES)})
    assert_is_the_set(load_detection(root))


def test_yolo_ids_with_gaps_become_contiguous_labels(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set", names={0: "ant", 1: "bee", 2: "cat", 9: "yak"})
    save_yaml(
        root / "data.yaml", {s: f"images/{s}" for s in SETS} | {"names": {0: "ant", 2: "cat", 9: "yak"}}
    )
    (root / "labels/train/a.txt").write_text("9 0.5 0.5 0.5 0.5\n2 0.5 0.5 0.25 0.25\n")
    data = load_detection(root)
    assert data.class_names == ("ant", "cat", "yak")
    assert data.records("train")[0].labels.tolist() == [2, 1]


def test_yolo_polygons_become_the_boxes_around_them(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "labels/train/a.txt").write_text("1 0.1 0.5 0.3 0.1 0.6 0.4 0.2 0.6\n")
    record = load_detection(root).records("train")[0]
    np.testing.assert_allclose(record.boxes_xyxy, [[4, 3, 24, 18]], atol=1e-9)


def test_yolo_names_every_bad_line_and_label_file_without_image(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "labels/train/a.txt").write_text(
        "0 0.5 0.5 0.5 0.5\n3 0.5 0.5 0.5 0.5\n0 12 8 20 20\n0 0.5\nant 0.5 0.5 0.5 0.5\n1.5 .5 .5 .5 .5\n"
        "0 nan 0.5 0.5 0.5\ninf 0.5 0.5 0.5 0.5\n"
    )
    (root / "labels/val/ghost.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "labels/val/classes.txt").write_text("ant\nbee\ncat\n")
    with pytest.raises(DataError) as caught:
        load_detection(root)
    message = str(caught.value)
    for part in (
        "class 3 of box 2; the list has 0–2",
        "a.txt:3: expected fractions of the image, got pixels",
        "a.txt:4: expected `class cx cy w h` or a polygon, got 2 numbers",
        "a.txt:5: expected numbers",
        "a.txt:6: the class must be an integer, got 1.5",
        "ghost.txt: no image 'ghost.*'",
    ):
        assert part in message
    assert kinds(read_detection(root)).count("malformed") == 6
    assert "classes.txt" not in message


def test_yolo_without_any_label_file_says_where_it_looked(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    shutil.rmtree(root / "labels/val")
    with pytest.raises(DataError, match="none of the 2 images of 'val' has a label file.*labels/val/d.txt"):
        load_detection(root)


def test_yolo_counts_names(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    save_yaml(root / "data.yaml", {s: f"images/{s}" for s in SETS} | {"nc": 4, "names": list(NAMES)})
    with pytest.raises(DataError, match="nc is 4, but there are 3 names"):
        load_detection(root)


# --- VOC


def test_voc_without_lists_is_all_training_data(tmp_path: Path) -> None:
    for split in SETS:
        write_images(tmp_path / "images", split)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        for name in SETS[split]:
            write_voc_file(tmp_path / "annotations", split, name)
    data = load_detection(tmp_path)
    assert {split: len(records) for split, records in data.splits.items()} == {"train": 5}


def test_voc_finds_the_image_by_the_xml_files_name_before_a_stale_filename(tmp_path: Path) -> None:
    write_voc(tmp_path)
    write_voc_file(tmp_path / "Annotations", "train", "a", filename="e.png")
    assert_is_the_set(load_detection(tmp_path))
    (tmp_path / "Annotations/a.xml").rename(tmp_path / "Annotations/renamed.xml")
    (tmp_path / "ImageSets/Main/train.txt").write_text("renamed\n")
    write_voc_file(tmp_path / "Annotations", "train", "a", filename="a.png")
    shutil.copy(tmp_path / "Annotations/a.xml", tmp_path / "Annotations/renamed.xml")
    assert load_detection(tmp_path).records("train")[0].path.name == "a.png"


def test_voc_challenge_files_count_pixels_from_one(tmp_path: Path) -> None:
    write_voc(tmp_path)
    write_voc_file(tmp_path / "Annotations", "train", "a", source="The VOC2007 Database")
    record = load_detection(tmp_path).records("train")[0]
    assert record.boxes_xyxy.tolist() == [[3, 2, 24, 18], [9, 5, 30, 27]]


def test_voc_trainval_is_the_training_data_of_a_set_without_its_halves(tmp_path: Path) -> None:
    write_voc(tmp_path)
    main = tmp_path / "ImageSets/Main"
    (main / "train.txt").rename(main / "trainval.txt")
    (main / "val.txt").rename(main / "test.txt")
    (main / "cat_train.txt").write_text("a 1\n")
    data = load_detection(tmp_path)
    assert {split: len(records) for split, records in data.splits.items()} == {"train": 3, "test": 2}


def test_voc_reads_roboflows_folders(tmp_path: Path) -> None:
    for split, folder in (("train", "train"), ("val", "valid")):
        write_images(tmp_path / folder, split)
        for name in SETS[split]:
            write_voc_file(tmp_path / folder, split, name)
    assert_is_the_set(load_detection(tmp_path))


def test_voc_names_broken_files_and_objects(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "Annotations/a.xml").write_text("<annotation><object>")
    (tmp_path / "Annotations/c.xml").write_text(
        "<annotation><size><width>32</width><height>64</height></size>"
        "<object><name>ant</name><bndbox><xmin>1</xmin></bndbox></object>"
        "<object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object>"
        "</annotation>"
    )
    (tmp_path / "Annotations/e.xml").unlink()
    with pytest.raises(DataError) as caught:
        load_detection(tmp_path)
    for part in ("a.xml: not XML", "c.xml: object 1: bndbox", "c.xml: object 2: no name", "e.xml: listed in"):
        assert part in str(caught.value)


# --- looking


def test_two_split_datasets_in_one_folder_need_a_format(tmp_path: Path) -> None:
    root = write_yolo(write_coco(tmp_path / "set"))
    with pytest.raises(
        DataError, match=r"coco \(train: annotations/instances_train2017.json.*yolo.*`format`"
    ):
        load_detection(root)
    assert load_detection(root, format="yolo").format == "yolo"
    assert load_detection(root, format="coco").format == "coco"
    assert load_detection(root / "data.yaml").format == "yolo"
    assert load_detection(root / "annotations/instances_val2017.json").format == "coco"


def test_a_split_set_goes_before_left_over_files_of_no_split(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")
    (root / "annotations/a.xml").write_text("<annotation/>")
    assert load_detection(root).format == "coco"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), r"there: nothing.*Expected coco: JSON.*yolo: a YAML.*voc: XML"),
        (lambda root: write_images(root / "images", "train"), "there: images"),
    ],
    ids=["missing", "empty", "images-only"],
)
def test_nothing_found_says_what_was_looked_for(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(DataError, match=message):
        load_detection(tmp_path / "set")


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown data format 'cocoo'.*Did you mean 'coco'"):
        load_detection(tmp_path, format="cocoo")


# --- what is wrong is named at the start, all together


def test_all_errors_are_named_at_once_with_what_to_do(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"].append({"id": 77, "file_name": "gone.png", "width": 5, "height": 5})
    content["annotations"] += [
        {"id": 100, "image_id": 999, "category_id": 1, "bbox": [1, 1, 2, 2]},
        {"id": 101, "image_id": 0, "category_id": 8, "bbox": [1, 1, 2, 2]},
        {"id": 102, "image_id": 0, "category_id": 1, "bbox": [1, 1, 2]},
        {"id": 103, "image_id": 0, "category_id": 1, "bbox": [1, 1, float("nan"), 2]},
        {"id": 104, "image_id": 0, "category_id": 1, "bbox": [39, 29, 9, 9]},
        {"id": 105, "image_id": 0, "category_id": 1, "bbox": [9, 9, 0, 5]},
    ]
    content["images"].append(content["images"][1] | {"id": 78})
    save_json(file, content)
    pixels = (root / "train2017/c.png").read_bytes()
    (root / "train2017/c.png").write_bytes(pixels[: len(pixels) // 2])
    (root / "val2017/d.png").write_text("not an image")
    write_images(root / "other", "val")
    shutil.copy(root / "other/d.png", root / "val2017/e.png")
    with pytest.raises(DataError) as caught:
        load_detection(root)
    message = str(caught.value)
    for part in (
        "annotated images are missing; add the files",
        "no file 'gone.png' in train2017",
        "c.png': OSError",
        "d.png': UnidentifiedImageError",
        "20×20 in the annotation, 64×48 in the file",
        "annotation 100: image_id 999",
        "class 8 of box 3; the list has 1–3",
        "bbox must be [x, y, width, height], got [1, 1, 2]",
        "file 'b.png' more than once",
        "--fix",
    ):
        assert part in message, part
    assert "no area" not in message
    assert {"box-outside", "box-degenerate"} <= set(kinds(read_detection(root)))


@pytest.mark.parametrize("what", ["missing", "corrupt"])
def test_annotations_of_an_image_that_cannot_be_used_are_looked_at_too(tmp_path: Path, what: str) -> None:
    root = write_coco(tmp_path / "set")
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    first = content["images"][0]
    content["annotations"] += [
        {"id": 100, "image_id": first["id"], "category_id": 8, "bbox": [1, 1, 2, 2]},
        {"id": 101, "image_id": first["id"], "category_id": 1, "bbox": [9, 9, 0, 5]},
        {"id": 102, "image_id": first["id"], "category_id": 1, "bbox": [39, 29, 900, 9]},
    ]
    save_json(file, content)
    image = root / "train2017" / first["file_name"]
    image.unlink() if what == "missing" else image.write_text("not an image")
    assert {f"{what}-image", "class-id", "box-degenerate", "box-outside"} <= set(kinds(read_detection(root)))


def test_a_missing_split_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'. Available: train, val."):
        load_detection(write_coco(tmp_path / "set")).records("test")
