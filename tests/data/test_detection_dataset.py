"""The torch dataset: pixels as in the file, boxes clipped, negatives kept; image files of every make."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.support.detection_files import write_coco, write_yolo
from thawline.data.detection import DetectionDataset, Sample, load_detection
from thawline.data.detection.images import probe_image, read_image
from thawline.errors import DataError, MissingExtraError


def test_items_are_the_files_pixels_and_their_boxes(tmp_path: Path) -> None:
    records = load_detection(write_coco(tmp_path / "set")).records("train")
    image, target = DetectionDataset(records)[0]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 30, 40))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(records[0].path)))
    assert target["boxes_xyxy"].tolist() == [[4, 3, 24, 18], [10, 6, 30, 27]]
    assert target["labels"].tolist() == [1, 2]
    assert target["area"].tolist() == [300, 420]
    assert target["index"].item() == 0
    assert target["orig_size"].tolist() == [40, 30]


def test_images_without_boxes_stay_as_negatives(tmp_path: Path) -> None:
    data = DetectionDataset(load_detection(write_coco(tmp_path / "set")).records("train"))
    image, target = data[1]
    assert len(data) == 3
    assert tuple(image.shape) == (3, 20, 50)
    assert {key: tuple(value.shape) for key, value in target.items()} == {
        "boxes_xyxy": (0, 4),
        "labels": (0,),
        "area": (0,),
        "iscrowd": (0,),
        "index": (),
        "orig_size": (2,),
    }


def test_training_boxes_are_clipped_and_crowds_and_empty_boxes_left_out(tmp_path: Path) -> None:
    record = load_detection(write_coco(tmp_path / "set")).records("train")[0]
    record = dataclasses.replace(
        record,
        boxes_xyxy=np.array([[-5.0, 10, 20, 99], [3, 3, 3, 9], [1, 1, 9, 9]]),
        labels=np.array([0, 1, 2]),
        area=np.array([1.0, 2, 3]),
        iscrowd=np.array([False, False, True]),
    )
    target = DetectionDataset([record])[0][1]
    assert target["boxes_xyxy"].tolist() == [[0, 10, 20, 30]]
    assert target["labels"].tolist() == [0]
    target = DetectionDataset([record], keep_crowd=True)[0][1]
    assert target["iscrowd"].tolist() == [False, True]


def test_a_transform_sees_the_sample_and_workers_may_load_it(tmp_path: Path) -> None:
    records = load_detection(write_coco(tmp_path / "set")).records("val")
    data = DetectionDataset(records, transform=mirrored)
    plain = DetectionDataset(records)[0]
    loaded = next(iter(DataLoader(data, batch_size=None, num_workers=1)))
    assert torch.equal(loaded[0], plain[0].flip(-1))
    assert loaded[1]["boxes_xyxy"].tolist() == [[64 - 40, 12, 64 - 8, 36]]


def mirrored(sample: Sample) -> Sample:
    width = sample.image.shape[1]
    boxes = sample.boxes_xyxy.copy()
    boxes[:, [0, 2]] = width - sample.boxes_xyxy[:, [2, 0]]
    return dataclasses.replace(sample, image=sample.image[:, ::-1], boxes_xyxy=boxes)


def test_an_image_changed_under_training_is_named(tmp_path: Path) -> None:
    data = DetectionDataset(load_detection(write_coco(tmp_path / "set")).records("train"))
    Image.new("RGB", (9, 9)).save(data.records[0].path)
    with pytest.raises(DataError, match="a.png' was 40×30 when the dataset was read, now 9×9"):
        data[0]


# --- image files


FILES = [(".jpg", mode) for mode in ("RGB", "L", "CMYK")]
FILES += [(suffix, mode) for suffix in (".png", ".tif") for mode in ("RGB", "L", "RGBA", "P", "1")]
FILES += [(".bmp", "RGB"), (".bmp", "L"), (".webp", "RGB"), (".webp", "RGBA")]


@pytest.mark.parametrize(("suffix", "mode"), FILES)
def test_every_make_of_file_becomes_rgb_as_pillow_sees_it(tmp_path: Path, suffix: str, mode: str) -> None:
    ramp = np.linspace(0, 255, 24 * 16).reshape(16, 24).astype(np.uint8)
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], 2)).convert(mode).save(path)
    image = read_image(path)
    assert image.dtype == np.uint8
    wanted = np.asarray(Image.open(path).convert("RGB"), np.int16)
    # The two libraries turn YCbCr and CMYK to RGB with differently rounded integers.
    assert np.abs(image.astype(np.int16) - wanted).max() <= (3 if suffix in (".jpg", ".webp") else 0)
    assert (probe_image(path).width, probe_image(path).height) == (24, 16)


def test_sixteen_bits_keep_their_upper_byte(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 911, np.uint16)[:70].reshape(7, 10)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.abs(read_image(tmp_path / "deep.png")[..., 0] - (values / 257.0)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_tag_turns_the_image_only_where_the_annotation_means_it(
    tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (24, 16), (200, 10, 10)).save(tmp_path / "a.jpg", exif=exif)
    probe = probe_image(tmp_path / "a.jpg")
    upright = (16, 24) if orientation >= 5 else (24, 16)
    assert probe.orientation == orientation
    assert probe.upright_size == upright
    assert read_image(tmp_path / "a.jpg").shape[1::-1] == upright
    assert read_image(tmp_path / "a.jpg", oriented=False).shape[1::-1] == (24, 16)


@pytest.mark.parametrize(("size", "oriented"), [((40, 30), False), ((30, 40), True)])
def test_the_annotated_size_says_which_way_up(tmp_path: Path, size: tuple[int, int], oriented: bool) -> None:
    root = write_coco(tmp_path / "set")
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"][0] |= {"file_name": "a.jpg", "width": size[0], "height": size[1]}
    file.write_text(json.dumps(content))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(root / "train2017/a.jpg", exif=exif)
    record = load_detection(root).records("train")[0]
    assert record.oriented is oriented
    assert DetectionDataset([record])[0][0].shape == (3, size[1], size[0])


def test_yolo_labels_are_fractions_of_the_upright_image(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "images/train/a.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (30, 40)).save(root / "images/train/a.jpg", exif=exif)
    record = load_detection(root).records("train")[0]
    assert (record.width, record.height, record.oriented) == (40, 30, True)
    np.testing.assert_allclose(record.boxes_xyxy[0], [4, 3, 24, 18], atol=1e-9)
    assert DetectionDataset([record])[0][0].shape == (3, 30, 40)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_a_cut_file_is_refused_where_opencv_would_fill_it_with_grey(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / f"image{suffix}"
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    data = path.read_bytes()
    assert probe_image(path).fault == ""
    path.write_bytes(data[: len(data) * 2 // 3])
    assert probe_image(path).fault
    with pytest.raises(DataError, match=rf"image{suffix}': cannot be decoded"):
        read_image(path)


def test_a_jpeg_with_long_notes_after_its_end_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.new("RGB", (80, 60), (9, 99, 199)).save(path)
    path.write_bytes(path.read_bytes() + b"\0" * 100_000)
    assert probe_image(path).fault == ""
    assert read_image(path).shape == (60, 80, 3)


def test_full_decoding_finds_damage_inside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    path.write_bytes(bytes(data))
    assert probe_image(path).fault == ""
    assert probe_image(path, decode=True).fault


@pytest.mark.parametrize(("module", "call"), [("cv2", read_image), ("PIL.Image", probe_image)])
def test_a_missing_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, call
) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"thawline\[detect\]"):
        call(path)
