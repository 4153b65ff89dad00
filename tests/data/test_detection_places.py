"""Names and places of detection files: found however they are written, and never guessed."""

from __future__ import annotations

import shutil
import unicodedata
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
    write_voc_file,
    write_yolo,
)
from thawline.data.detection.check import check_detection
from thawline.data.detection.dataset import load_detection, read_detection
from thawline.data.detection.formats.places import Places, decode_text
from thawline.data.detection.records import DetectionSet
from thawline.errors import DataError
from thawline.inference.sources import open_source


def problems(data: DetectionSet) -> dict[str, str]:
    """Kind → its details, one after the other."""
    found: dict[str, str] = {}
    for problem in data.problems:
        found[problem.kind] = f"{found.get(problem.kind, '')} {problem}".strip()
    return found


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, name: str, split: str | None = None) -> list[str]:
    return [str(path.relative_to(root)) for path in Places([root / "images", root], split).find(name)]


# --- the resolver


@pytest.mark.parametrize(
    "name",
    [
        "cam1/a b.jpg",
        "cam1\\a b.jpg",
        "./cam1//a b.jpg",
        "cam1/a%20b.jpg",
        "CAM1/A B.JPG",
        "D:\\data\\images\\cam1\\a b.jpg",
        "/home/me/images/cam1/a b.jpg",
        " images/ cam1/a b.jpg ",
        "file:///data/images/cam1/a%20b.jpg",
        "https://host/images/cam1/a%20b.jpg",
        "images/cam1/a b",
    ],
)
def test_a_name_is_found_however_another_machine_wrote_it(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "images/cam1/a b.jpg", "images/cam2/a b.jpg", "a c.jpg")
    assert found(tmp_path, name) == ["images/cam1/a b.jpg"]


def test_both_unicode_forms_of_a_name_are_one(tmp_path: Path) -> None:
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        root = touch(tmp_path / form, f"images/{unicodedata.normalize(form, 'größe.png')}")
        assert len(found(root, unicodedata.normalize(other, "größe.png"))) == 1


def test_the_exact_name_goes_before_all_others(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/A.jpg", "images/sub/a.jpg", "images/a%20b.jpg", "images/a b.jpg")
    assert found(tmp_path, "A.jpg") == ["images/A.jpg"]
    assert found(tmp_path, "a%20b.jpg") == ["images/a%20b.jpg"]


def test_equally_good_files_are_all_returned_and_links_to_one_file_are_one(tmp_path: Path) -> None:
    touch(tmp_path, "images/x/a.jpg", "images/y/a.jpg", "images/b.jpg", "images/b.png")
    assert found(tmp_path, "a.jpg") == ["images/x/a.jpg", "images/y/a.jpg"]
    assert found(tmp_path, "b") == ["images/b.jpg", "images/b.png"]
    (tmp_path / "images/y/a.jpg").unlink()
    (tmp_path / "images/y/a.jpg").symlink_to(tmp_path / "images/x/a.jpg")
    assert len(found(tmp_path, "a.jpg")) == 1


def test_an_image_of_another_folder_or_split_is_not_taken(tmp_path: Path) -> None:
    touch(tmp_path, "images/cam1/a.jpg", "images/val/b.jpg")
    assert found(tmp_path, "cam2/a.jpg") == []
    assert found(tmp_path, "b.jpg", split="train") == []
    assert found(tmp_path, "b.jpg", split="val") == ["images/val/b.jpg"]
    assert found(tmp_path, "val\\b.jpg", split="train") == ["images/val/b.jpg"]


@pytest.mark.parametrize("name", ["a\0b.jpg", "x" * 5000, "", "/", "..", "a.jpg/b.jpg"])
def test_a_name_that_no_file_can_have_is_not_found(tmp_path: Path, name: str) -> None:
    assert found(touch(tmp_path, "images/a.jpg"), name) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_text_is_decoded_whatever_wrote_it(encoding: str) -> None:
    assert decode_text("größe.png\r\n".encode(encoding)) == ("größe.png\r\n", encoding != "cp1252")


# --- every format


@pytest.mark.parametrize("change", ["backslash", "percent", "case", "absolute", "nfd"])
@pytest.mark.parametrize("format", ["coco", "yolo", "voc"])
def test_every_format_finds_images_by_changed_names(tmp_path: Path, format: str, change: str) -> None:
    folder, file = ("cam 1", "ä b.png")
    name = {
        "backslash": f"{folder}\\{file}",
        "percent": "cam%201/%C3%A4%20b.png",
        "case": f"{folder}/{file}".upper(),
        "absolute": f"C:\\Users\\me\\{folder}\\{file}",
        "nfd": unicodedata.normalize("NFD", f"{folder}/{file}"),
    }[change]
    write_images(tmp_path / "images", "train")
    for place in (folder, "cam 2"):
        (tmp_path / "images" / place).mkdir()
        shutil.copy(tmp_path / "images/a.png", tmp_path / "images" / place / file)
    if format == "coco":
        content = coco_content("train")
        content["images"][0]["file_name"] = name
        save_json(tmp_path / "train.json", content)
    elif format == "voc":
        (tmp_path / "Annotations").mkdir()
        write_voc_file(tmp_path / "Annotations", "train", "a", filename=name)
        (tmp_path / "Annotations/a.xml").rename(tmp_path / "Annotations/renamed.xml")
    else:
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels" / folder).mkdir()
        (tmp_path / "labels" / folder / unicodedata.normalize("NFD", "ä b.txt")).write_text("1 .5 .5 .5 .5\n")
        save_yaml(tmp_path / "data.yaml", {"train": "train.txt", "names": list(NAMES)})
        (tmp_path / "train.txt").write_text(f"{name}\n")
    data = read_detection(tmp_path, format)
    assert data.errors == ()
    (record,) = [one for one in data.records("train") if one.path.name == file]
    assert record.path.parent.name == folder
    assert len(record.labels) > 0


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "__MACOSX", ".cache/deep"])
@pytest.mark.parametrize("format", ["coco", "yolo", "voc"])
def test_hidden_folders_and_files_are_no_data_and_their_images_are_counted(
    tmp_path: Path, format: str, folder: str
) -> None:
    root = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}[format](tmp_path / "set")
    images = next(path for path in root.rglob("a.png")).parent
    for path in [*root.rglob("*")]:
        if path.is_file() and path.suffix != ".png":
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7 not text \xff")
    shutil.copytree(images, images / folder)
    shutil.copy(images / "a.png", images / "._a.png")
    data = load_detection(root)
    assert {split: len(records) for split, records in data.splits.items()} == {"train": 3, "val": 2}
    n = len([*images.glob("*.png")]) - 1
    assert list(problems(data)) == ["left-out"]
    assert f"{n + 1} hidden images (._a.png, " in problems(data)["left-out"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    for kind in ("images", "labels"):
        (root / kind / "train").rename(tmp_path / kind)
        (root / kind / "train").mkdir()
        (root / kind / "train" / "part").symlink_to(tmp_path / kind, target_is_directory=True)
    (tmp_path / "images" / "round").symlink_to(root / "images" / "train", target_is_directory=True)
    data = load_detection(root)
    assert [len(record.labels) for record in data.records("train")] == [2, 0, 1]
    assert data.problems == ()


def test_images_in_a_folder_under_test_are_predicted_without_hidden_ones(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "train")
    shutil.copytree(tmp_path / "images", tmp_path / "images/.ipynb_checkpoints")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/part").symlink_to(tmp_path / "images", target_is_directory=True)
    assert open_source(tmp_path / "images").total == 3
    assert open_source(tmp_path / "linked").total == 3


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".JFIF"])
def test_every_suffix_of_a_jpeg_is_an_image(tmp_path: Path, suffix: str) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "images/train/a.png").unlink()
    write_images(tmp_path / "jpegs", "train", suffix=".jpg")
    (tmp_path / "jpegs/a.jpg").rename(root / f"images/train/a{suffix}")
    assert [len(record.labels) for record in load_detection(root).records("train")] == [2, 0, 1]


def test_an_image_of_a_format_that_is_not_read_is_named_beside_its_label(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "images/train/a.png").rename(root / "images/train/a.heic")
    with pytest.raises(DataError, match="a.txt: no image 'a.*', and 'a.heic' is of no format that is read"):
        load_detection(root)


# --- more than one file fits


def test_images_of_one_stem_are_told_apart_by_the_name_in_the_xml_file(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    for name in SETS["train"]:
        shutil.copy(root / f"JPEGImages/{name}.png", root / f"JPEGImages/{name}.jpg")
    data = load_detection(root)
    assert [record.path.name for record in data.records("train")] == ["a.png", "b.png", "c.png"]
    assert problems(data)["unused-image"] == "JPEGImages: 3 images (a.jpg, b.jpg, c.jpg)"
    write_voc_file(root / "Annotations", "train", "a", filename="renamed.png")
    with pytest.raises(DataError, match=r"fit several images(?s:.*)'renamed.png' may be JPEGImages/a.jpg, "):
        load_detection(root)


def test_two_images_of_one_label_file_are_an_error_unless_a_list_chooses(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    shutil.copy(root / "images/train/a.png", root / "images/train/a.jpg")
    data = read_detection(root)
    assert [problem.kind for problem in data.errors] == ["ambiguous-image"]
    assert "may be the labels of images/train/a.jpg, images/train/a.png" in str(data.errors[0])
    assert [record.path.name for record in data.records("train")] == ["b.png", "c.png"]
    (root / "train.txt").write_text("".join(f"./images/train/{name}.png\n" for name in SETS["train"]))
    save_yaml(root / "data.yaml", {"train": "train.txt", "val": "images/val", "names": list(NAMES)})
    assert list(problems(load_detection(root))) == ["unused-image"]


def test_a_coco_name_in_two_folders_is_an_error(tmp_path: Path) -> None:
    for folder in ("cam1", "cam2"):
        write_images(tmp_path / "images" / folder, "train")
    save_json(tmp_path / "train.json", coco_content("train"))
    data = read_detection(tmp_path)
    assert [problem.kind for problem in data.errors] == ["ambiguous-image"] * 3
    assert "'a.png' may be images/cam1/a.png, images/cam2/a.png" in str(data.errors[0])


# --- what is left out is said


@pytest.mark.parametrize("format", ["coco", "yolo", "voc"])
def test_images_that_no_annotation_names_are_counted(tmp_path: Path, format: str) -> None:
    root = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}[format](tmp_path / "set")
    images = next(path for path in root.rglob("a.png")).parent
    for name in ("x", "y", "z", "zz"):
        shutil.copy(images / "a.png", images / f"{name}.png")
    data = load_detection(root)
    if format == "yolo":
        assert problems(data) == {
            "unlabelled": "train: 4 of 7 images "
            "(images/train/x.png, images/train/y.png, images/train/z.png, …)"
        }
        assert len(data.records("train")) == 7
    else:
        assert problems(data) == {"unused-image": f"{images.name}: 4 images (x.png, y.png, z.png, …)"}
        assert len(data.records("train")) == 3


def test_a_coco_file_that_names_no_split_beside_others_is_said(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")
    shutil.copy(root / "annotations/instances_val2017.json", root / "annotations/instances_all.json")
    data = load_detection(root)
    assert problems(data) == {"left-out": "annotations/instances_all.json: names no split, as others do"}


def test_other_yaml_files_beside_data_yaml_are_said(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    shutil.copy(root / "data.yaml", root / "copy.yaml")
    (root / "hyp.yaml").write_text("lr0: 0.01\n")
    assert problems(load_detection(root)) == {"left-out": "copy.yaml: 'data.yaml' is read"}


# --- YOLO's YAML


def test_labels_may_be_beside_images_in_a_folder_called_images(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    for path in (root / "labels").rglob("*.txt"):
        path.rename(root / "images" / path.relative_to(root / "labels"))
    (root / "images/val/ghost.txt").write_text("0 .5 .5 .5 .5\n")
    data = read_detection(root)
    assert [len(record.labels) for record in data.records("train")] == [2, 0, 1]
    assert problems(data) == {"unknown-image": "ghost.txt: no image 'ghost.*'"}


@pytest.mark.parametrize(("images", "labels"), [("Images", "Labels"), ("JPEGImages", "labels")])
def test_folders_of_images_and_labels_in_another_case_belong_together(
    tmp_path: Path, images: str, labels: str
) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "images").rename(root / images)
    (root / "labels").rename(root / labels)
    save_yaml(root / "data.yaml", {s: f"{images}/{s}" for s in SETS} | {"names": list(NAMES)})
    assert load_detection(root).problems == ()


@pytest.mark.parametrize(
    "written", ["images\\train", "Images/Train", "../images/train", ".\\images\\train\\", "images/./train"]
)
def test_folders_in_the_yaml_are_found_however_they_are_written(tmp_path: Path, written: str) -> None:
    root = write_yolo(tmp_path / "set")
    save_yaml(root / "data.yaml", {"train": written, "val": "images/val", "names": list(NAMES)})
    assert load_detection(root).problems == ()


@pytest.mark.parametrize("train", ["D:\\set\\images\\train", "/content/set/images/train"])
def test_an_absolute_path_of_another_machine_is_read_by_its_end_and_said(tmp_path: Path, train: str) -> None:
    root = write_yolo(tmp_path / "set")
    save_yaml(root / "data.yaml", {"train": train, "val": "images/val", "names": list(NAMES)})
    data = load_detection(root)
    assert len(data.records("train")) == 3
    assert list(problems(data)) == ["place-note"]
    assert f"`train: {train}` does not exist; read from" in problems(data)["place-note"]


def test_the_last_folder_alone_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    for name in ("/content/images", "../train/images"):
        save_yaml(root / "data.yaml", {"train": name, "val": "images/val", "names": list(NAMES)})
        with pytest.raises(DataError, match="splits are missing.*(?s:.*)neither a folder nor a .txt list"):
            load_detection(root)


def test_a_wrong_path_in_the_yaml_is_said(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    rest = {"train": "images/train", "val": "images/val", "names": list(NAMES)}
    save_yaml(root / "data.yaml", {"path": "../datasets/set", **rest})
    assert (
        "`path: ../datasets/set` is no folder; paths start from"
        in problems(load_detection(root))["place-note"]
    )
    (tmp_path / "datasets/set").mkdir(parents=True)
    note = problems(load_detection(root))["place-note"]
    assert "`train: images/train` is not in `path`; read from" in note
    for value in (".", str(root), None):
        save_yaml(root / "data.yaml", {"path": value, **rest})
        assert load_detection(root).problems == ()


def test_an_absent_test_folder_is_left_out_and_an_absent_val_folder_is_an_error(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set", images_first=False)
    rest = {"train": "../train/images", "names": list(NAMES)}
    save_yaml(root / "data.yaml", {"val": "../val/images", "test": "../test/images", **rest})
    data = load_detection(root)
    assert list(data.splits) == ["train", "val"]
    assert "test: '" in problems(data)["left-out"]
    save_yaml(root / "data.yaml", {"val": "../valid/images", "test": None, **rest})
    with pytest.raises(DataError, match=r"splits are missing(?s:.*)val: '.*valid/images'"):
        load_detection(root)


@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Val"), ("train", "validation"), ("training", "dev"), ("train", "eval")]
)
def test_splits_in_the_yaml_have_several_names(tmp_path: Path, train: str, val: str) -> None:
    root = write_yolo(tmp_path / "set")
    rest = {"Names": list(NAMES), train: "images/train", val: "images/val"}
    save_yaml(root / "data.yaml", rest)
    assert list(load_detection(root).splits) == ["train", "val"]
    save_yaml(root / "data.yaml", rest | {"valid": "images/train"})
    assert "is left out: the images of 'val' are given above" in problems(load_detection(root))["place-note"]


@pytest.mark.parametrize("key", ["path", "train", "val"])
def test_a_url_in_the_yaml_is_refused_by_name(tmp_path: Path, key: str) -> None:
    root = write_yolo(tmp_path / "set")
    content = {"train": "images/train", "val": "images/val", "names": list(NAMES)}
    save_yaml(root / "data.yaml", content | {key: "https://host/set.zip"})
    with pytest.raises(DataError, match=f"`{key}: https://host/set.zip` is a URL. Download the images"):
        load_detection(root)


# --- the path of a dataset


@pytest.mark.parametrize("url", ["https://host/set.zip", "s3://bucket/set", "hf://datasets/a/b"])
def test_a_url_is_no_dataset(url: str) -> None:
    for path in (url, Path(url)):
        with pytest.raises(DataError, match="is a URL. Download the dataset"):
            load_detection(path)


def test_several_datasets_in_one_folder_are_listed(tmp_path: Path) -> None:
    write_yolo(tmp_path / "cars")
    write_coco(tmp_path / "birds")
    write_voc(tmp_path / "cells")
    with pytest.raises(
        DataError, match=r"holds '.*birds' \(coco\), '.*cars' \(yolo\), '.*cells' \(voc\). Give one of them"
    ):
        load_detection(tmp_path)


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is an archive. Unpack it"):
        load_detection(tmp_path / "set.zip")


# --- lists and text files


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("format", ["coco", "yolo", "voc"])
def test_files_of_any_encoding_are_read(tmp_path: Path, format: str, encoding: str) -> None:
    root = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}[format](tmp_path / "set")
    for path in sorted(path for path in root.rglob("a.*")):
        path.rename(path.with_stem("größe"))
    if format == "yolo":
        (root / "train.txt").write_text("".join(f"images/train/{name}.png\n" for name in ("größe", "b", "c")))
        names = ["ameise", "bär", "katze"]
        save_yaml(root / "data.yaml", {"train": "train.txt", "val": "images/val", "names": names})
    for path in [*root.rglob("*.txt"), *root.rglob("*.json"), *root.rglob("*.xml"), *root.rglob("*.yaml")]:
        text = path.read_text().replace('"a.png"', '"größe.png"').replace(">a.png<", ">größe.png<")
        text = "\r\n".join("größe" if line == "a" else line for line in text.splitlines()) + "\r\n"
        path.write_bytes(text.encode(encoding))
    data = load_detection(root)
    assert sorted(record.path.stem for record in data.records("train")) == ["b", "c", "größe"]
    assert sum(len(record.labels) for record in data.records("train")) == 3
    assert set(problems(data)) == ({"encoding"} if encoding == "cp1252" else set())
    if format == "yolo":
        assert data.class_names == ("ameise", "bär", "katze")


def test_an_xml_file_in_the_encoding_that_it_names_is_read(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    file = root / "Annotations/a.xml"
    for encoding, name in (("gb2312", "猫"), ("windows-1251", "кот")):
        text = file.read_text().partition("?>")[2] or file.read_text()
        text = text.replace("bee", name)
        file.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>{text}'.encode(encoding))
        data = load_detection(root)
        assert name in data.class_names
        assert data.problems == ()
        file.write_bytes(text.replace(name, "bee").encode())


@pytest.mark.parametrize("place", ["ImageSets/Main", "ImageSets", "."])
def test_names_with_spaces_and_class_numbers_in_image_sets(tmp_path: Path, place: str) -> None:
    root = write_voc(tmp_path)
    for path in (root / "JPEGImages/a.png", root / "Annotations/a.xml"):
        path.rename(path.with_stem("my image 1"))
    write_voc_file(root / "Annotations", "train", "a", filename="my image 1.png")
    (root / "Annotations/a.xml").replace(root / "Annotations/my image 1.xml")
    (root / "ImageSets/Main/train.txt").write_text("my image 1\nJPEGImages/b.png\nc  -1\n")
    for file in sorted((root / "ImageSets/Main").iterdir()):
        file.rename(root / place / file.name)
    data = load_detection(root)
    assert [record.path.stem for record in data.records("train")] == ["my image 1", "b", "c"]


def test_the_check_sees_what_the_loader_sees(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    shutil.copytree(root / "images/train", root / "images/train/.ipynb_checkpoints")
    (root / "labels/train/b.txt").unlink()
    kinds = {problem.kind for problem in load_detection(root).problems}
    assert kinds == {"left-out", "unlabelled"}
    assert kinds <= {problem.kind for problem in check_detection(root).problems}
