"""Values of detection files: types, units, keypoints, polygons, names; read as meant, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

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
    write_yolo,
)
from thawline.data.detection.check import check_detection
from thawline.data.detection.dataset import load_detection
from thawline.data.detection.formats.values import to_flag, to_id, to_number, to_size
from thawline.data.detection.records import DetectionSet
from thawline.data.detection.repair import write_repaired
from thawline.errors import DataError


def edit(root: Path, change: Callable[[dict], object]) -> Path:
    """Change the COCO files of a set."""
    for file in (root / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        change(content)
        save_json(file, content)
    return root


def boxes(data: DetectionSet, split: str = "train") -> list[list[float]]:
    return [box.round(6).tolist() for record in data.records(split) for box in record.boxes_xyxy]


WANTED = [list(map(float, box)) for _, found in SETS["train"].values() for _, box in found]


# --- one value, written in several ways


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (3, 3), (3.0, 3), ("3", 3), ("3.0", 3), (" 3 ", 3), (0, 0), ("-1", -1), ("007", "007"), ("a7", "a7"),
        (2**60, 2**60), (str(2**60), 2**60),
    ],
)  # fmt: skip
def test_ids_are_one_whatever_their_type(value: object, wanted: int | str) -> None:
    assert to_id(value) == wanted
    assert type(to_id(value)) is type(wanted)


@pytest.mark.parametrize(
    ("reader", "values"),
    [
        (to_id, [None, "", True, 1.5, [1], {}, float("nan"), float("inf")]),
        (to_number, [None, "", True, "1,5", "x", [1], float("nan"), "inf", 10**400]),
        (to_flag, ["yes", 2, -1, [0], 0.5]),
    ],
)
def test_other_values_are_refused_with_what_was_got(reader: Callable, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ValueError, match="must be .* got "):
            reader(value)


def test_flags_and_sizes() -> None:
    assert [to_flag(v) for v in (0, 1, "0", "1", 0.0, "1.0", True, "False", None, "")] == [
        False, True, False, True, False, True, True, False, False, False,
    ]  # fmt: skip
    assert to_size("96", 64.0) == (96, 64)
    assert to_size(None, 64) is to_size(0, 0) is to_size("", "") is None
    for width, height in ((-1, 4), (3.5, 4), ("wide", 4)):
        with pytest.raises(ValueError, match="must be"):
            to_size(width, height)


def as_text(content: dict) -> None:
    for entry in (*content["images"], *content["categories"]):
        entry["id"] = str(entry["id"])
    for entry in content["images"]:
        entry |= {"width": f"{entry['width']}.0", "height": str(entry["height"])}
    for entry in content["annotations"]:
        for key in ("image_id", "category_id", "iscrowd", "area"):
            entry[key] = str(entry[key])
        entry["bbox"] = [str(value) for value in entry["bbox"]]


def as_floats(content: dict) -> None:
    for entry in content["annotations"]:
        for key in ("image_id", "category_id", "iscrowd"):
            entry[key] = float(entry[key])


def half_text(content: dict) -> None:
    for entry in content["annotations"][::2]:
        entry |= {
            "image_id": str(entry["image_id"]),
            "category_id": f"{entry['category_id']}.0",
            "iscrowd": "",
            "area": "",
        }
    for entry in content["images"]:
        entry |= {"width": None, "height": None}


@pytest.mark.parametrize("change", [as_text, as_floats, half_text])
def test_coco_values_may_be_numbers_or_text(tmp_path: Path, change: Callable) -> None:
    data = load_detection(edit(write_coco(tmp_path / "set"), change))
    assert data.problems == ()
    assert (data.class_names, data.class_ids) == (NAMES, (1, 2, 3))
    assert boxes(data) == WANTED
    assert not any(record.iscrowd.any() for record in data.records("train"))
    assert [record.area.tolist() for record in data.records("train")] == [[300, 420], [], [512]]
    if change is as_text:  # the file's own ids stay as written
        assert [record.image_id for record in data.records("train")] == ["0", "1", "2"]


def test_a_box_to_ignore_is_a_crowd_and_names_have_no_outer_spaces(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["annotations"][0]["ignore"] = 1
        content["categories"][0]["name"] += " "

    data = load_detection(edit(write_coco(tmp_path / "set"), change))
    assert data.class_names == NAMES
    assert [record.iscrowd.tolist() for record in data.records("train")] == [[True, False], [], [False]]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_id", None, "image_id must be an integer or a name, got None"),
        ("image_id", [3], r"image_id must be an integer or a name, got \[3\]"),
        ("image_id", 77, "image_id 77"),
        ("category_id", None, "category_id must be an integer or a name, got None"),
        ("category_id", {"id": 1}, "category_id must be an integer or a name, got {'id': 1}"),
        ("iscrowd", "maybe", "iscrowd must be 0 or 1, got 'maybe'"),
        ("area", "large", "area must be a number, got 'large'"),
        ("area", float("nan"), "area must be a number, got nan"),
        ("bbox", "0 0 1 1", "bbox must be .x, y, width, height., got '0 0 1 1'"),
        ("bbox", [1, 2, 3], "bbox must be"),
        ("bbox", [1, 2, 3, "x"], "bbox must be"),
        ("bbox", [1, 2, None, 3], "bbox must be"),
        ("bbox", {"x": 1}, "bbox must be"),
    ],
)
def test_coco_values_that_cannot_be_read_are_named(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    root = edit(write_coco(tmp_path / "set"), lambda content: content["annotations"][0].update({key: value}))
    with pytest.raises(DataError, match=f"instances_train2017.json: annotation 0: {message}"):
        load_detection(root)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("images", {"id": None}, "entry 1 of 'images': id must be"),
        ("images", {"file_name": None}, "entry 1 of 'images': file_name must be text, got None"),
        ("images", {"width": "wide"}, "b.png: width and height must be a number, got 'wide'"),
        ("categories", {"id": [2]}, "entry 1 of 'categories': id or name must be"),
        ("categories", {"name": None}, "entry 1 of 'categories': id or name must be text, got None"),
        ("categories", {"id": "1"}, "two categories share an id"),
    ],
)
def test_coco_tables_that_cannot_be_read_are_named(
    tmp_path: Path, part: str, change: dict, message: str
) -> None:
    root = edit(write_coco(tmp_path / "set"), lambda content: content[part][1].update(change))
    with pytest.raises(DataError, match=message):
        load_detection(root, decode=False)


def test_two_images_of_one_id_are_found_across_types(tmp_path: Path) -> None:
    root = edit(write_coco(tmp_path / "set"), lambda content: content["images"][1].update(id="0"))
    with pytest.raises(DataError, match="b.png: id '0' more than once"):
        load_detection(root)


# --- boxes from polygons


def square(entry: dict) -> list[float]:
    x, y, w, h = entry["bbox"]
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def test_the_box_around_polygons_where_there_is_no_bbox(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        for i, entry in enumerate(content["annotations"]):
            points = square(entry)
            entry["segmentation"] = [points] if i else [points[:6], [*points[2:6], *points[6:]]]
            entry["bbox"] = [] if i else None
            del entry["area"]

    data = load_detection(edit(write_coco(tmp_path / "set"), change))
    assert boxes(data) == WANTED
    assert data.records("train")[0].area.tolist() == [300, 420]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "got None"),
        ([[1, 2, 3, 4]], "got None and polygons cannot be read"),
        ([["a", 2, 3, 4, 5, 6]], "got None and polygons cannot be read"),
        (
            {"counts": "abc", "size": [4, 4]},
            "got None; a mask as run lengths has no box of its own: write `bbox`",
        ),
    ],
)
def test_no_bbox_and_no_polygon_is_refused(tmp_path: Path, segmentation: object, message: str) -> None:
    def change(content: dict) -> None:
        content["annotations"][0] |= {"bbox": None, "segmentation": segmentation}

    with pytest.raises(DataError, match=message):
        load_detection(edit(write_coco(tmp_path / "set"), change))


ROBOFLOW = "<polygon><x1>4</x1><y1>3</y1><x2>24</x2><y2>3</y2><x3>10</x3><y3>18</y3></polygon>"
LABELME = "<polygon><pt><x>4</x><y>3</y></pt><pt><x>24</x><y>3</y></pt><pt><x>9</x><y>18</y></pt></polygon>"


@pytest.mark.parametrize("polygon", [ROBOFLOW, LABELME])
def test_the_box_around_a_polygon_of_voc(tmp_path: Path, polygon: str) -> None:
    root = write_voc(tmp_path)
    file = root / "Annotations/a.xml"
    text = file.read_text()
    start, end = text.index("<bndbox>"), text.index("</bndbox>") + len("</bndbox>")
    file.write_text(text[:start] + polygon + text[end:])
    assert boxes(load_detection(root))[0] == [4, 3, 24, 18]
    file.write_text(text[:start] + "<polygon><x1>4</x1></polygon>" + text[end:])
    with pytest.raises(DataError, match="a.xml: object 1: a polygon must have three corners or more"):
        load_detection(root)


# --- units


@pytest.mark.parametrize("format", ["coco", "voc"])
def test_fractions_in_a_format_of_pixels_are_an_error_that_a_copy_mends(tmp_path: Path, format: str) -> None:
    root = {"coco": write_coco, "voc": write_voc}[format](tmp_path / "set")
    if format == "coco":
        edit(root, to_fractions)
    else:
        for images in SETS.values():
            for name, ((width, height), found) in images.items():
                scaled = [
                    (label, (x1 / width, y1 / height, x2 / width, y2 / height))
                    for label, (x1, y1, x2, y2) in found
                ]
                text = (root / f"Annotations/{name}.xml").read_text()
                for (_, old), (_, new) in zip(found, scaled, strict=True):
                    for a, b, key in zip(old, new, ("xmin", "ymin", "xmax", "ymax"), strict=True):
                        text = text.replace(f"<{key}>{a}</{key}>", f"<{key}>{b!r}</{key}>", 1)
                (root / f"Annotations/{name}.xml").write_text(text)
    check = check_detection(root)
    assert {problem.kind for problem in check.problems} == {"box-units"}
    assert not check.is_trainable
    with pytest.raises(DataError, match="boxes in fractions of their size, where pixels are expected"):
        load_detection(root)
    copy = write_repaired(check, tmp_path / "copy")
    assert copy.problems == ()
    assert boxes(copy) == WANTED
    assert copy.records("train")[0].area.tolist() == pytest.approx([300, 420])


def to_fractions(content: dict) -> None:
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in content["images"]}
    for entry in content["annotations"]:
        width, height = sizes[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x / width, y / height, w / width, h / height]
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]


def test_one_tiny_box_in_a_corner_is_a_remark(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")
    edit(root, lambda content: content["annotations"][-1].update(bbox=[0, 0, 0.5, 0.25]))
    (root / "annotations/instances_val2017.json").write_text(json.dumps(coco_content("val")))
    data = load_detection(root)
    assert [problem.kind for problem in data.problems] == ["box-tiny"]


# --- YOLO's label lines


def pose_lines(points: int, values: int, split: str, name: str) -> str:
    (width, height), found = SETS[split][name]
    lines = []
    for label, (x1, y1, x2, y2) in found:
        cx, cy = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
        line = f"{NAMES.index(label)} {cx!r} {cy!r} {(x2 - x1) / width!r} {(y2 - y1) / height!r}"
        lines.append(line + " ".join(["", *([f"{cx!r} {cy!r}" + " 1" * (values - 2)] * points)]))
    return "".join(f"{line}\n" for line in lines)


def write_pose(root: Path, points: int, values: int, shape: object) -> Path:
    write_yolo(root)
    for split, images in SETS.items():
        for name in images:
            (root / f"labels/{split}/{name}.txt").write_text(pose_lines(points, values, split, name))
    content = {s: f"images/{s}" for s in SETS} | {"names": list(NAMES)}
    save_yaml(root / "data.yaml", content | ({"kpt_shape": shape} if shape else {}))
    return root


@pytest.mark.parametrize(("points", "values"), [(1, 2), (4, 2), (17, 3), (2, 3), (4, 3), (5, 2)])
def test_keypoints_after_a_box_are_not_its_polygon(tmp_path: Path, points: int, values: int) -> None:
    data = load_detection(write_pose(tmp_path / "set", points, values, [points, values]))
    assert boxes(data) == WANTED


def test_a_pose_set_may_have_boxes_alone_and_other_lines_are_refused(tmp_path: Path) -> None:
    root = write_pose(tmp_path / "set", 4, 3, ["4", "3"])
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    assert boxes(load_detection(root))[0] == [15, 7.5, 25, 22.5]
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.25 0.5 0.1 0.1\n")
    with pytest.raises(
        DataError, match="a.txt:1: expected `class cx cy w h` and 12 values of keypoints, got 7 numbers"
    ):
        load_detection(root)


@pytest.mark.parametrize("shape", [[4], [0, 3], [4, 5], "17", [[1, 2], 3], ["a", 2]])
def test_a_kpt_shape_that_is_none_is_refused(tmp_path: Path, shape: object) -> None:
    with pytest.raises(DataError, match="`kpt_shape` must be .number of keypoints, 2 or 3., got"):
        load_detection(write_pose(tmp_path / "set", 4, 3, shape))


@pytest.mark.parametrize("points", [2, 3, 4])
def test_keypoints_without_kpt_shape_are_not_read_as_polygons(tmp_path: Path, points: int) -> None:
    with pytest.raises(DataError, match="add `kpt_shape"):
        load_detection(write_pose(tmp_path / "set", points, 3, None))


def test_polygons_that_look_like_a_box_and_keypoints_are_remarked(tmp_path: Path) -> None:
    data = load_detection(write_pose(tmp_path / "set", 4, 2, None))
    (problem,) = [problem for problem in data.problems if problem.kind == "like-keypoints"]
    assert "add `kpt_shape: [number, 2]`" in str(problem)
    root = write_yolo(tmp_path / "polygons")
    (root / "labels/train/a.txt").write_text("1 0.7 0.8 0.9 0.8 0.9 0.95 0.7 0.95\n")
    assert load_detection(root).problems == ()


@pytest.mark.parametrize(
    "line", ["1 0.1 0.1 0.9 0.1 0.5 1.7", "1 0.1 0.1 -0.9 0.1 0.5 0.7", "1 0.5 0.5 1.6 0.5"]
)
def test_coordinates_far_outside_of_the_image_are_refused(tmp_path: Path, line: str) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "labels/train/a.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match="a.txt:1: expected fractions of the image, got pixels"):
        load_detection(root)


# --- names in YAML


@pytest.mark.parametrize("as_list", [True, False])
def test_words_and_numbers_in_names_stay_text(tmp_path: Path, as_list: bool) -> None:
    root = write_yolo(tmp_path / "set")
    names = ["on", "no", "010", "1e3", "null", "2020-01-01", "~", "0x1f", "1.0", "Yes", ".5", "1_000"]
    block = "".join(f"  - {n}\n" if as_list else f"  {i}: {n}\n" for i, n in enumerate(names))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnc: 12\nnames:\n{block}")
    assert load_detection(root).class_names == tuple(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("{0: ant, 0: bee}", "the key '0' is repeated line 3, column 17"),
        ("{0: ant, 00: bee}", "two names share an id"),
        ("{a: ant}", "the keys of `names` must be integers, got 'a'"),
        ("[ant, [bee]]", r"a name in `names` must be text, got \['bee'\]"),
        ("[ant, '']", "a name in `names` must be text, got ''"),
        ("[]", r"`names` must be a list or a mapping of id to name, got {}"),
        ("ant", "`names` must be a list or a mapping"),
        ("[ant, bee", "is not YAML: .*line 4, column 1"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path: Path, names: str, message: str) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    with pytest.raises(DataError, match=message):
        load_detection(root)


def test_keys_that_differ_in_capitals_alone_are_refused(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "data.yaml").write_text("train: images/train\nTrain: images/val\nnames: [ant]\n")
    with pytest.raises(DataError, match="differ in capitals alone: train, Train, names. Keep one"):
        load_detection(root)


# --- files that cannot be parsed, and splits without anything


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", ["cut", "cut-early", "list", "keys", "empty"])
@pytest.mark.parametrize("layout", ["coco", "roboflow", "plain"])
def test_a_coco_file_that_cannot_be_read_is_no_missing_split(
    tmp_path: Path, layout: str, damage: str, split: str
) -> None:
    for name in SETS:
        folder = tmp_path / name if layout == "roboflow" else tmp_path
        write_images(folder, name)
        file = {
            "coco": f"instances_{name}.json",
            "roboflow": "_annotations.coco.json",
            "plain": f"{name}.json",
        }
        save_json(folder / file[layout], coco_content(name))
    bad = (
        tmp_path / split / file["roboflow"]
        if layout == "roboflow"
        else tmp_path / file[layout].replace(name, split)
    )
    text = bad.read_text()
    bad.write_text(
        {
            "cut": text[:-20],
            "cut-early": text[: text.index("categories") - 20],
            "list": json.dumps([{"file": "a.png"}]),
            "keys": json.dumps({"images": [], "annotations": []}),
            "empty": "",
        }[damage]
    )
    place = rf"'.*{bad.name}' is not (JSON: .*line 1 column \d+|a COCO file: expected a list under)"
    with pytest.raises(DataError, match=place):
        load_detection(tmp_path)


def test_other_json_files_do_not_get_in_the_way(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")
    (root / "val_predictions.json").write_text(
        '[{"image_id": 1, "category_id": 1, "bbox": [], "score": 0.5}]'
    )
    (root / "package.json").write_text("{")
    (root / "annotations/captions_train2017.json").write_text('{"images": [], "annotations": [')
    assert load_detection(root).problems == ()
    root = write_yolo(tmp_path / "yolo")
    (root / "notes.json").write_text('{"categories": []}')
    (root / "train_log.json").write_text('{"step": 1}\n{"step": 2}\n')
    assert load_detection(root).format == "yolo"


def test_a_lone_file_that_cannot_be_read_says_where(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"images": [], "annotations": [}')
    with pytest.raises(DataError, match="labels.json' is not JSON: .*line 1 column 32"):
        load_detection(tmp_path / "labels.json")
    (tmp_path / "labels.json").unlink()
    (tmp_path / "data.yaml").write_text("names: [a\ntrain: images\n")
    with pytest.raises(DataError, match="data.yaml' is not YAML: .*line 2, column"):
        load_detection(tmp_path)


@pytest.mark.parametrize("format", ["coco", "yolo", "voc"])
def test_a_training_split_without_a_box_is_an_error_for_loader_and_check(tmp_path: Path, format: str) -> None:
    root = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}[format](tmp_path / "set")
    if format == "coco":
        edit(root, lambda content: content.update(annotations=[]))
    for label in (root / "labels").rglob("*.txt"):
        label.write_text("")
    for name in SETS["train"] if format == "voc" else ():
        file = root / f"Annotations/{name}.xml"
        file.write_text(
            file.read_text().partition("<object>")[0].removesuffix("</annotation>") + "</annotation>"
        )
    with pytest.raises(DataError, match="training splits have no box to learn from(?s:.*)train: 3 images"):
        load_detection(root)
    assert not check_detection(root).is_trainable


def test_a_training_split_without_an_image_is_an_error_for_loader_and_check(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "none.txt").write_text("")
    save_yaml(root / "data.yaml", {"train": "none.txt", "val": "images/val", "names": list(NAMES)})
    with pytest.raises(DataError, match="training splits have no box to learn from.*(?s:.*)train: 0 images"):
        load_detection(root)
    assert not check_detection(root).is_trainable


def test_crowds_and_boxes_without_area_are_nothing_to_learn_from(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        for i, entry in enumerate(content["annotations"]):
            entry |= {"iscrowd": 1} if i % 2 else {"bbox": [3, 3, 0, 5]}

    with pytest.raises(DataError, match="no box to learn from"):
        load_detection(edit(write_coco(tmp_path / "set"), change))


def test_a_set_of_test_images_alone_may_be_without_boxes(tmp_path: Path) -> None:
    write_images(tmp_path / "test", "train")
    save_json(tmp_path / "test/_annotations.coco.json", coco_content("train") | {"annotations": []})
    assert len(load_detection(tmp_path).records("test")) == 3


def test_images_with_more_boxes_than_queries_are_remarked_in_the_check(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        entry = content["annotations"][0]
        content["annotations"] += [
            entry | {"id": 100 + i, "bbox": [i % 20, i // 20, 9.5, 9.25]} for i in range(120)
        ]

    check = check_detection(edit(write_coco(tmp_path / "set"), change))
    assert [(p.kind, p.detail.partition(";")[0]) for p in check.problems] == [
        ("many-boxes", "1 of 3 images, with up to 122 boxes"),
        ("many-boxes", "1 of 2 images, with up to 121 boxes"),
    ]
    assert any("base.overrides.num_queries" in line for line in check.lines())


# --- two corners instead of a corner or center and a size


def yolo_corners(root: Path) -> Path:
    write_yolo(root)
    for split, images in SETS.items():
        for name, ((width, height), found) in images.items():
            lines = [
                f"{NAMES.index(label)} {x1 / width} {y1 / height} {x2 / width} {y2 / height}\n"
                for label, (x1, y1, x2, y2) in found
            ]
            (root / "labels" / split / f"{name}.txt").write_text("".join(lines))
    return root


def coco_corners(root: Path) -> Path:
    def change(content: dict) -> None:
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            entry["bbox"] = [x, y, x + w, y + h]

    return edit(write_coco(root), change)


@pytest.mark.parametrize("write", [coco_corners, yolo_corners])
def test_boxes_of_two_corners_are_refused(tmp_path: Path, write: Callable) -> None:
    with pytest.raises(
        DataError, match="train: . of . boxes leave their image; as x1 y1 x2 y2 all are inside"
    ):
        load_detection(write(tmp_path / "set"))
    assert "box-corners" in {problem.kind for problem in check_detection(tmp_path / "set").problems}


def test_boxes_that_leave_their_image_but_are_no_corners_are_remarked_alone(tmp_path: Path) -> None:
    def enlarge(content: dict) -> None:
        for entry in content["annotations"]:
            entry["bbox"][2:] = [200, 3]

    kinds = {one.kind for one in load_detection(edit(write_coco(tmp_path / "set"), enlarge)).problems}
    assert kinds == {"box-outside"}


# --- polygons and XML as other tools write them


@pytest.mark.parametrize("bbox", [None, [], [0, 0, 0, 0]])
@pytest.mark.parametrize("is_nested", [True, False])
def test_an_empty_box_gives_way_to_the_polygon_beside_it(tmp_path: Path, bbox, is_nested: bool) -> None:
    def change(content: dict) -> None:
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            entry |= {"bbox": bbox, "segmentation": [polygon] if is_nested else polygon}

    assert boxes(load_detection(edit(write_coco(tmp_path / "set"), change))) == WANTED


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<annotation>", '<annotation xmlns="http://example.org/voc">'),
        ("object>", "Object>"),
        ("<object>", "<objects><object>"),
    ],
)
def test_objects_of_xml_are_found_by_their_plain_tag(tmp_path: Path, old: str, new: str) -> None:
    for file in (write_voc(tmp_path / "set") / "Annotations").glob("*.xml"):
        text = file.read_text().replace(old, new)
        file.write_text(text.replace("</object>", "</object></objects>") if "objects" in new else text)
    assert boxes(load_detection(tmp_path / "set")) == WANTED


def test_images_of_two_splits_are_remarked_by_loader_and_check_alike(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    save_yaml(root / "data.yaml", {"train": "images", "val": "images/val", "names": list(NAMES)})
    for problems in (load_detection(root).problems, check_detection(root).problems):
        leaks = [str(problem) for problem in problems if problem.kind == "leak"]
        assert leaks == [f"train: images/val/{name}.png: val: images/val/{name}.png" for name in "de"]


@pytest.mark.parametrize("suffix", [".gz", ".zip"])
def test_a_compressed_annotation_file_is_no_missing_split(tmp_path: Path, suffix: str) -> None:
    root = write_coco(tmp_path / "set")
    file = root / "annotations" / "instances_train2017.json"
    file.rename(file.with_name(file.name + suffix))
    with pytest.raises(DataError, match=f"instances_train2017.json{suffix}' is compressed. Unpack it"):
        load_detection(root)
    shutil.copy(file.with_name(file.name + suffix), file)
    assert load_detection(root).records("train")
