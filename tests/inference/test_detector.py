"""The detector on images of every kind, whole folders, videos; and its commands."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path

import cv2
import numpy as np
import pytest
import supervision
import torch
from PIL import Image
from torch.testing import assert_close

from thawline.cli import main
from thawline.errors import CheckpointError, ConfigError, DataError
from thawline.inference import Detector
from thawline.inference.files import predict_files
from thawline.inference.images import to_rgb
from thawline.inference.torch_network import _resize
from thawline.models.deimv2 import DEIMv2

NAMES = ("disc", "square", "cross")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = DEIMv2.from_variant("atto", class_names=NAMES, image_size=(64, 96), num_queries=9)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def detector(folder: Path) -> Detector:
    return Detector.from_pretrained(folder, device="cpu", threshold=0.0)


def sample_image(height: int = 40, width: int = 70) -> np.ndarray:
    """A gradient with a disc and a square, so that turning or swapping channels shows."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, width, dtype=np.uint8)
    image[..., 1] = np.linspace(0, 200, height, dtype=np.uint8)[:, None]
    cv2.circle(image, (width // 3, height // 2), height // 4, (250, 40, 10), -1)
    cv2.rectangle(image, (width // 2, 2), (width - 5, height // 2), (10, 60, 240), -1)
    return image


def same(a: supervision.Detections, b: supervision.Detections, atol: float = 1e-3) -> None:
    np.testing.assert_allclose(a.confidence, b.confidence, atol=1e-5)
    np.testing.assert_array_equal(a.class_id, b.class_id)
    np.testing.assert_allclose(a.xyxy, b.xyxy, atol=atol)


def test_one_image_gives_named_detections_in_its_own_pixels(detector: Detector) -> None:
    found = detector(sample_image())
    assert isinstance(found, supervision.Detections)
    assert len(found) > 0
    assert (np.diff(found.confidence) <= 0).all()
    assert [NAMES[i] for i in found.class_id] == found.data["class_name"].tolist()
    assert (found.xyxy >= 0).all()
    assert (found.xyxy[:, [0, 2]] <= 70).all()
    assert (found.xyxy[:, [1, 3]] <= 40).all()


def test_numbers_are_those_of_the_network_on_a_plainly_resized_image(
    folder: Path, detector: Detector
) -> None:
    model = DEIMv2.from_pretrained(folder)
    resized = np.asarray(Image.fromarray(sample_image()).resize((96, 64), Image.Resampling.BILINEAR))
    assert_close(
        _resize(sample_image(), (64, 96)).permute(1, 2, 0), torch.from_numpy(resized.copy()), rtol=0, atol=0
    )
    with torch.no_grad():
        output = model(torch.from_numpy(resized.copy()).permute(2, 0, 1)[None] / 255)
    (expected,) = model.postprocess(output, [(40, 70)])
    found = detector(sample_image())
    kept = len(found)
    assert_close(torch.from_numpy(found.confidence), expected["scores"][:kept], rtol=1e-4, atol=1e-5)


def test_kinds_of_images_in_memory_agree(detector: Detector, tmp_path: Path) -> None:
    image = sample_image()
    cv2.imwrite(str(tmp_path / "x.png"), image[..., ::-1])
    expected = detector(image)
    for other in (
        str(tmp_path / "x.png"),
        tmp_path / "x.png",
        Image.fromarray(image),
        Image.fromarray(image).convert("RGBA"),
        np.dstack([image, np.full(image.shape[:2], 9, np.uint8)]),
        image.astype(np.uint16) * 257,
        image.astype(np.float32) / 255,
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(image).permute(2, 0, 1) / 255,
    ):
        same(detector(other), expected)


def test_a_list_gives_what_each_gives_alone(detector: Detector) -> None:
    images = [sample_image(), sample_image(30, 33), sample_image(90, 20)]
    together = detector(images, batch_size=2)
    for found, image in zip(together, images, strict=True):
        same(found, detector(image), atol=1e-2)
    batch = torch.stack([torch.from_numpy(images[0]).permute(2, 0, 1)] * 2)
    for found in detector(batch):
        same(found, detector(images[0]))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def test_files_of_every_kind_are_read_right_side_up(tmp_path: Path) -> None:
    image = Image.fromarray(sample_image())
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    grey = np.asarray(image.convert("L"))
    sixteen = cv2.imencode(".png", grey.astype(np.uint16) * 257)[1].tobytes()
    files = {
        "grey.png": (encoded(image.convert("L"), "PNG"), np.dstack([grey] * 3), 0),
        "rgba.png": (encoded(image.convert("RGBA"), "PNG"), sample_image(), 0),
        "sixteen.png": (sixteen, np.dstack([grey] * 3), 1),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG", quality=100), sample_image(), 12),
        "turned.jpg": (
            encoded(image.rotate(90, expand=True), "JPEG", quality=100, exif=exif), sample_image(), 12
        ),
        "dot.png": (encoded(image.resize((1, 1)), "PNG"), np.asarray(image.resize((1, 1))), 0),
    }  # fmt: skip
    for name, (data, expected, tolerance) in files.items():
        (tmp_path / name).write_bytes(data)
        pixels = to_rgb(tmp_path / name)
        assert pixels.shape == expected.shape, name
        assert np.abs(pixels.astype(int) - expected).mean() <= tolerance, name
    same_by_pillow = to_rgb(Image.open(tmp_path / "turned.jpg"))
    assert same_by_pillow.shape == (40, 70, 3)
    assert (
        np.abs(to_rgb(Image.open(tmp_path / "sixteen.png")).astype(int) - files["sixteen.png"][1]).max() <= 1
    )


def test_images_that_make_no_sense_are_refused(detector: Detector) -> None:
    for source, text in (
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.full((4, 4, 3), 200.0), "run from 200 to 200"),
        (np.zeros((4, 4), np.int64), "not int64"),
        (torch.zeros(5, 4, 4), r"\(5, 4, 4\)"),
        (object(), "got object"),
    ):
        with pytest.raises(DataError, match=text):
            detector(source)


def test_one_pixel_and_long_thin_images_are_images(detector: Detector) -> None:
    for height, width in ((1, 1), (1, 900), (700, 2)):
        found = detector(np.full((height, width, 3), 90, np.uint8))
        assert (found.xyxy <= [width, height, width, height]).all()


def test_broken_files_do_not_stop_the_rest(detector: Detector, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.jpg"), sample_image())
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_text("not a image")
    (tmp_path / "notes.txt").write_text("no image at all")
    first, second, third = detector(tmp_path)
    assert len(first) > 0
    for found, name in ((second, "b.jpg"), (third, "c.png")):
        assert len(found) == 0
        assert name in found.metadata["error"]
    with pytest.raises(DataError, match=r"b\.jpg.*cannot be decoded"):
        detector(tmp_path / "b.jpg")
    with pytest.raises(DataError, match="Nothing matches"):
        detector(str(tmp_path / "*.webp"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"No images in"):
        detector(tmp_path / "empty")


def test_threshold_classes_and_number_narrow_what_comes_back(detector: Detector) -> None:
    everything = detector(sample_image())
    cut = float(np.median(everything.confidence))
    assert (detector(sample_image(), threshold=cut).confidence >= cut).all()
    assert set(detector(sample_image(), classes=["disc", 2]).class_id.tolist()) <= {0, 2}
    best = detector(sample_image(), max_detections=3)
    np.testing.assert_array_equal(best.confidence, everything.confidence[:3])
    with pytest.raises(ConfigError, match="Did you mean 'square'"):
        detector(sample_image(), classes=["sqare"])
    with pytest.raises(ConfigError, match="classes 0 to 2"):
        detector(sample_image(), classes=[3])


def test_tiles_cover_a_large_image(detector: Detector) -> None:
    image = np.tile(sample_image(60, 60), (2, 3, 1))
    found = detector(image, tile=60)
    assert found.xyxy[:, 2].max() > 120
    assert found.xyxy[:, 3].max() > 60
    assert set(found.data["class_name"]) <= set(NAMES)


def sample_video(path: Path, n: int = 5) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for _ in range(n):
        writer.write(sample_image(48, 64)[..., ::-1].copy())
    writer.release()
    return path


def test_a_video_gives_its_frames_one_by_one(detector: Detector, tmp_path: Path) -> None:
    frames = detector(sample_video(tmp_path / "x.mp4"))
    assert next(frames).xyxy.shape[1] == 4
    assert len(list(frames)) == 4
    with pytest.raises(DataError, match=r"No video"):
        list(detector(tmp_path / "y.mp4"))


def test_random_weights_come_only_by_name(tmp_path: Path) -> None:
    model = DEIMv2.from_variant("s")
    torch.save(model.backbone.vit.state_dict(), tmp_path / "vit.pt")
    with pytest.raises(CheckpointError, match="would be random"):
        Detector.from_pretrained(tmp_path / "vit.pt", "s")
    random = Detector.from_pretrained("atto", weights="random", class_names=NAMES, device="cpu")
    assert random.class_names == NAMES
    torch.save(DEIMv2.from_variant("atto").state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="has 80 classes, but 3"):
        Detector.from_pretrained(tmp_path / "x.pth", class_names=NAMES)


def test_predict_draws_writes_and_names_what_it_could_not_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    cv2.imwrite(str(source / "000012.png"), sample_image())
    cv2.imwrite(str(source / "deep" / "b.jpg"), sample_image(50, 30))
    (source / "bad.jpg").write_bytes(b"no")
    words = ["predict", "--model", str(folder), "--threshold", "0", "--device", "cpu"]
    assert main([*words, "--source", str(source), "--out", str(out), "--json"]) == 1
    assert "not read" in (text := capsys.readouterr().err)
    assert "bad.jpg" in text
    drawn = cv2.imread(str(out / "000012.png"))
    assert drawn.shape == (40, 70, 3)
    assert (drawn[..., ::-1] != sample_image()).any()
    assert (out / "deep" / "b.jpg").is_file()
    results = json.loads((out / "predictions.json").read_text())
    assert {entry["image_id"]: Path(entry["file_name"]).name for entry in results} == {
        0: "000012.png", 2: "b.jpg"
    }  # fmt: skip
    assert all(len(entry["bbox"]) == 4 and entry["category_name"] in NAMES for entry in results)

    assert main([*words, "--source", str(sample_video(tmp_path / "x.mp4")), "--out", str(out)]) == 0
    assert cv2.VideoCapture(str(out / "x.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 5
    capsys.readouterr()
    at_first = ["predict", str(folder), *words[3:]]  # the model, as in every other command
    assert main([*at_first, "--source", str(source / "000012.png"), "--max_detections", "1"]) == 0
    assert "000012.png: " in capsys.readouterr().out


def test_convert_says_how_far_the_logits_moved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DEIMv2.from_variant("atto").save_pretrained(tmp_path / "own")
    words = ["convert", str(tmp_path / "own"), str(tmp_path / "port"), "--to", "transformers"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_logit_difference"] == 0
    assert main(words) == 1
    assert "exists" in capsys.readouterr().err


class FakeCamera:
    """Stand-in for `cv2.VideoCapture` on a camera: three BGR images and a meaningless frame count."""

    released = False

    def __init__(self, index: int) -> None:
        self.index, self.images = index, [np.full((48, 64, 3), (255, 0, n), np.uint8) for n in range(3)]

    def isOpened(self) -> bool:
        return self.index == 0

    def get(self, prop: int) -> float:
        return -1.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        return (True, self.images.pop(0)) if self.images else (False, None)

    def release(self) -> None:
        FakeCamera.released = True


def test_a_camera_gives_its_images_until_it_stops(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cv2.VideoCapture", FakeCamera)
    seen = list(detector.stream(0, threshold=0.0, batch_size=2))
    assert [prediction.name for prediction in seen] == [f"frame {n}" for n in range(len(seen))]
    assert seen[-1].image[0, 0].tolist() == [2, 0, 255]
    assert all(len(prediction.detections) for prediction in seen)
    assert FakeCamera.released
    assert 1 <= sum(1 for _ in detector(0)) <= 3
    with pytest.raises(DataError, match="Camera '1' cannot be opened"):
        detector(1)  # at the call, not at the first image


def test_predict_opens_a_camera_once(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Once(FakeCamera):
        def __init__(self, index: int) -> None:
            opened.append(index)
            super().__init__(index)

    monkeypatch.setattr("cv2.VideoCapture", Once)
    summary = predict_files(detector, 0, tmp_path, threshold=0.0)
    assert opened == [0]
    monkeypatch.undo()
    written = cv2.VideoCapture(str(tmp_path / "camera.mp4"))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == summary.images > 0
    assert written.get(cv2.CAP_PROP_FPS) == 25


def test_a_video_that_cannot_be_written_is_no_success(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot write .*x\.wrong"):
        predict_files(detector, sample_video(tmp_path / "x.mp4"), tmp_path / "x.wrong")


def test_a_video_that_is_not_written_whole_is_no_success(detector: Detector, tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "x.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5.0, (96, 64))
    rng = np.random.default_rng(0)
    for _ in range(3):
        writer.write(rng.integers(0, 256, (64, 96, 3), np.uint8))
    writer.release()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        with pytest.raises(DataError, match=r"x\.mp4' was not written whole: is the disk full"):
            predict_files(detector, tmp_path / "x.mp4", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_huge_image_is_read_whole_or_in_tiles(detector: Detector, tmp_path: Path) -> None:
    file = tmp_path / "huge.png"
    Image.new("L", (6_000, 4_000), 90).save(file)
    whole = detector(file, threshold=0.0, max_detections=3)
    assert len(whole) == 3
    assert whole.xyxy.max() > 640  # pixels of the original
    assert len(detector(file, threshold=0.0, max_detections=3, tile=(3000, 2000))) == 3


@pytest.mark.parametrize("threshold", [30, -0.1, float("nan")])
def test_a_threshold_that_is_no_score_is_refused(detector: Detector, threshold: float) -> None:
    with pytest.raises(ConfigError, match="`threshold` is a score from 0 to 1"):
        detector(np.zeros((8, 8, 3), np.uint8), threshold=threshold)
    with pytest.raises(ConfigError, match="`threshold` is a score from 0 to 1"):
        Detector.from_pretrained("atto", weights="random", device="cpu", threshold=threshold)


@pytest.mark.parametrize("name", ["list.txt", "images.zip", "instances.json"])
def test_a_file_of_another_kind_is_no_image_to_replace(detector: Detector, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a.png")
    with pytest.raises(DataError, match=f"{name}' is no image and no video"):
        detector(tmp_path / name)
