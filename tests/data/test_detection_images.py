"""Image files: check, loader and training see the same size, orientation and faults."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.support.detection_files import NAMES, save_yaml, write_yolo
from thawline.data.detection import images
from thawline.data.detection.check import check_detection
from thawline.data.detection.dataset import DetectionDataset, load_detection, read_detection
from thawline.data.detection.drawing import save_image
from thawline.data.detection.images import decode_image, probe_image, read_image
from thawline.errors import DataError
from thawline.inference.images import to_rgb


def encoded(image: Image.Image, format: str, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict = {"save_all": True, "append_images": [image.resize((6, 4))]} if format == "MPO" else {}
    options |= {"lossless": True} if format == "WEBP" else {}
    stream = io.BytesIO()
    image.save(stream, format=format, exif=exif, **options)
    return stream.getvalue()


def noise(size: tuple[int, int] = (24, 16)) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.NEAREST)


def one_image(root: Path, data: bytes, suffix: str) -> Path:
    """A set whose training split has one image, a, of these bytes."""
    write_yolo(root)
    for path in (root / "images/train").iterdir():
        path.unlink()
    for name in ("b", "c"):
        (root / f"labels/train/{name}.txt").unlink()
    (root / f"images/train/a{suffix}").write_bytes(data)
    return root


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_format_is_turned_upright_as_pillow_does(tmp_path: Path, format: str, orientation: int) -> None:
    try:
        data = encoded(noise(), format, orientation)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {format}")
    if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is None:
        pytest.skip(f"this OpenCV does not read {format}")
    path = tmp_path / "image.bin"
    path.write_bytes(data)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), np.int16)
    assert np.abs(read_image(path) - wanted).mean() < (4 if format in ("JPEG", "MPO", "AVIF") else 0.1)
    for decode in (False, True):
        probe = probe_image(path, decode)
        assert probe.fault == ""
        assert probe.upright_size == read_image(path).shape[1::-1]
        assert (probe.width, probe.height) == read_image(path, oriented=False).shape[1::-1]


@pytest.mark.parametrize(("format", "suffix"), [("MPO", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")])
def test_labels_of_a_turned_image_fit_it_in_training(tmp_path: Path, format: str, suffix: str) -> None:
    root = one_image(tmp_path / "set", encoded(noise(), format, 6), suffix)
    (record,) = load_detection(root).records("train")
    assert (record.width, record.height, record.oriented) == (16, 24, True)
    assert DetectionDataset([record])[0][0].shape == (3, 24, 16)
    assert check_detection(root).data.problems == ()


def test_an_upright_image_is_not_looked_at_again_for_its_tag(tmp_path: Path) -> None:
    root = one_image(tmp_path / "set", encoded(noise(), "JPEG", 1), ".jpg")
    assert not load_detection(root).records("train")[0].oriented


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0", b"Exif\0\0" + bytes(30), b"no EXIF"])
def test_broken_camera_data_do_not_make_an_image_unreadable(tmp_path: Path, exif: bytes) -> None:
    noise().save(tmp_path / "image.jpg", exif=exif)
    for decode in (False, True):
        assert probe_image(tmp_path / "image.jpg", decode) == images.ImageProbe(width=24, height=16)
    assert read_image(tmp_path / "image.jpg").shape == (16, 24, 3)


def unusual(kind: str) -> tuple[bytes, str]:
    image, grey = noise(), np.asarray(noise().convert("L"))
    if kind in ("GIF", "ICO", "TGA", "PCX", "PPM", "JPEG2000", "AVIF", "WEBP", "DDS"):
        return encoded_as(image, kind), ".jpg"
    pixels = {
        "float": Image.fromarray(grey.astype(np.float32) / 255),
        "int32": Image.fromarray(grey.astype(np.int32)),
        "bilevel": image.convert("1"),
        "cmyk": image.convert("CMYK"),
        "grey-alpha": image.convert("LA"),
    }[kind]
    return encoded_as(pixels, "TIFF"), ".tif"


def encoded_as(image: Image.Image, format: str) -> bytes:
    stream = io.BytesIO()
    try:
        image.save(stream, format=format)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {format}")
    return stream.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["GIF", "ICO", "TGA", "PCX", "PPM", "JPEG2000", "AVIF", "WEBP", "DDS",
     "float", "int32", "bilevel", "cmyk", "grey-alpha"],
)  # fmt: skip
def test_what_the_loader_accepts_the_check_accepts_and_training_decodes(tmp_path: Path, kind: str) -> None:
    data, suffix = unusual(kind)
    root = one_image(tmp_path / "set", data, suffix)
    loaded, checked = read_detection(root), check_detection(root)
    assert [str(p) for p in loaded.errors] == [str(p) for p in checked.data.errors]
    if not loaded.errors:
        image = DetectionDataset(loaded.records("train"))[0][0].numpy()
        wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16).transpose(2, 0, 1)
        assert np.abs(image - wanted).mean() < 8
    else:
        assert loaded.errors[0].kind == "corrupt-image"
        assert "OpenCV does not support" in loaded.errors[0].detail


def test_float_pixels_are_refused_with_what_to_do(tmp_path: Path) -> None:
    root = one_image(tmp_path / "set", *unusual("float"))
    with pytest.raises(DataError, match="OpenCV does not support TIFF of mode F; convert it to PNG or JPEG"):
        load_detection(root)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("top", "is_low"), [(255, True), (1023, True), (4095, True), (8191, False), (0, False)]
)
def test_sixteen_bits_of_which_few_are_used_are_remarked(
    tmp_path: Path, suffix: str, channels: int, top: int, is_low: bool
) -> None:
    pixels = np.linspace(0, top, 24 * 16 * channels).reshape(16, 24, channels).astype(np.uint16)
    root = one_image(tmp_path / "set", cv2.imencode(suffix, pixels.squeeze())[1].tobytes(), suffix)
    kinds = ["low-range"] if is_low else []
    assert [problem.kind for problem in load_detection(root).problems] == kinds
    assert [
        problem.kind for problem in check_detection(root).problems if problem.kind != "class-unused"
    ] == kinds


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_frames_behind_the_first_are_said(tmp_path: Path, format: str, caplog) -> None:
    stream = io.BytesIO()
    noise().save(stream, format=format, save_all=True, append_images=[noise().rotate(180)])
    root = one_image(tmp_path / "set", stream.getvalue(), ".png")
    kinds = [] if format == "MPO" else ["frames"]  # a camera's two sizes of one picture
    assert [problem.kind for problem in load_detection(root).problems] == kinds
    found = [problem.kind for problem in check_detection(root).problems]
    assert [kind for kind in found if kind != "class-unused"] == kinds
    caplog.clear()
    to_rgb(root / "images/train/a.png")
    assert ("the first is used" in caplog.text) == bool(kinds)


def test_a_dark_image_of_eight_bits_is_not_remarked(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 24, 3), 9, np.uint8)).save(tmp_path / "a.png")
    assert not probe_image(tmp_path / "a.png", decode=True).is_low_range


def test_an_image_larger_than_pillows_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of which Pillow refuses the double
    root = one_image(tmp_path / "set", encoded(noise((40, 30)), "PNG"), ".png")
    assert load_detection(root).problems == ()
    assert [p.kind for p in check_detection(root).problems if p.kind != "class-unused"] == []
    assert Image.MAX_IMAGE_PIXELS == 100


def test_an_image_larger_than_opencvs_limit_is_refused_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    root = one_image(tmp_path / "set", encoded(noise((40, 30)), "PNG"), ".png")
    for errors in (read_detection(root).errors, check_detection(root).data.errors):
        assert "40×30 pixels are more than OpenCV decodes, 1,000; cut the image" in errors[0].detail


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8", b"\x89PNG", b"\x89PNG\r\n\x1a\n", b"II*\0"])
def test_what_is_no_image_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    for decode in (False, True):
        fault = probe_image(tmp_path / "a.png", decode).fault
        assert fault
        assert "\n" not in fault
        assert "BytesIO" not in fault
    with pytest.raises(DataError, match="a.png': cannot be decoded"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["BMP", "WEBP", "TIFF", "GIF", "JPEG2000"])
def test_cut_files_of_other_formats_are_refused(format: str) -> None:
    data = encoded_as(noise((80, 60)), format)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(data[: len(data) * 2 // 3])


def test_a_jfif_name_is_written_as_jpeg(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jfif", np.zeros((8, 8, 3), np.uint8))
    assert Image.open(tmp_path / "a.jfif").format == "JPEG"


def test_a_folder_of_one_name_is_no_image(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "images/train/deep.png").mkdir()
    save_yaml(root / "data.yaml", {"train": "images/train", "names": list(NAMES)})
    assert load_detection(root).problems == ()
