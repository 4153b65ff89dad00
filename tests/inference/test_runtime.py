"""Exported detectors without torch: the same call and the same detections as in torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import numpy as np
import onnx
import openvino
import pytest
import supervision
import torch
from PIL import Image

import thawline
from tests.exporters.conftest import build_detector
from tests.support.exports import equal_networks_share_a_trace
from thawline.cli import main
from thawline.errors import CheckpointError, ConfigError
from thawline.exporters.export import export_detector
from thawline.inference import exported, torch_network
from thawline.runtime import Detector
from thawline.sessions import Session

ROOT = Path(__file__).parents[2]
SIZE = (64, 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of exported files, of any batch size and of 2, and of the weights that they came from."""
    folder = tmp_path_factory.mktemp("exported")
    model = build_detector("lite", image_size=SIZE, class_names=("a", "b", "c", "d"))
    model.save_pretrained(folder / "weights")
    with equal_networks_share_a_trace():
        metadata = export_detector(model, folder / "plain.onnx").metadata
    converted = openvino.convert_model(folder / "plain.onnx")
    converted.reshape({"images": [2, 3, *SIZE], "orig_target_sizes": [2, 2]})
    for name, value in metadata.items():
        converted.set_rt_info(value, ["thawline", name])
    openvino.save_model(converted, folder / "pairs.xml", compress_to_fp16=False)
    for place in ("one", "run/exports"):
        (folder / place).mkdir(parents=True)
        shutil.copy(folder / "plain.onnx", folder / place / "model.onnx")
    return folder


@pytest.fixture
def torch_detector(folder: Path, monkeypatch: pytest.MonkeyPatch) -> thawline.Detector:
    """The detector in torch, on Pillow's bytes: those of torch's resizing that differ would move its boxes.

    What such a byte does to a detector without training says nothing about others.
    """
    monkeypatch.setattr(
        torch_network,
        "_resize",
        lambda image, size: torch.from_numpy(exported._resize([image], size)[0].copy()),
    )
    return thawline.Detector.from_pretrained(folder / "weights", device="cpu", threshold=0.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images larger and smaller than the detector's, of several shapes and kinds."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate(((150, 200), (333, 111), (40, 50))):
        small = Image.fromarray(rng.integers(0, 255, (7, 9, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def same(found: supervision.Detections, expected: supervision.Detections) -> None:
    """Each detection has one of its class, score and box, within half a pixel; equal scores in any order."""
    assert len(found) == len(expected) > 0
    for box, label, score in zip(expected.xyxy, expected.class_id, expected.confidence, strict=True):
        near = (found.class_id == label) & (np.abs(found.confidence - score) < 1e-3)
        assert np.abs(found.xyxy[near] - box).max(axis=1).min() < 0.5


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (37, 91)])
def test_images_are_resized_as_in_torch(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    ours = exported._resize([image], (160, 192))[0].astype(int)
    difference = np.abs(torch_network._resize(image, (160, 192)).numpy() - ours)
    assert difference.max() <= 1
    assert difference.mean() < 0.01
    for filter in (cv2.INTER_LINEAR, cv2.INTER_AREA):
        assert (
            np.abs(cv2.resize(image, (192, 160), interpolation=filter).transpose(2, 0, 1) - ours).mean() > 0.1
        )


@pytest.mark.parametrize("name", ["plain.onnx", "pairs.xml", "one", "run"])
def test_boxes_are_torchs(name: str, folder: Path, photos: Path, torch_detector: thawline.Detector) -> None:
    detector = Detector(folder / name, threshold=0.0)
    assert detector.class_names == ("a", "b", "c", "d")
    for found, expected in zip(detector(photos), torch_detector(photos), strict=True):
        same(found, expected)
        assert found.data["class_name"].tolist() == [detector.class_names[i] for i in found.class_id]


def test_boxes_of_a_file_that_takes_images_only_are_scaled(folder: Path) -> None:
    network = exported.ExportedNetwork(folder / "plain.onnx")
    calls = []

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(inputs["images"].shape)
        boxes = np.tile(np.array([0, 0.5, 1, 1], np.float32), (2, 3, 1))
        return {"labels": np.zeros((2, 3), int), "boxes": boxes, "scores": np.ones((2, 3))}

    network._session = Session(["images"], run, batch=2)
    found = network([np.zeros((10 * n, 20, 3), np.uint8) for n in (1, 2, 3)])
    assert calls == [(2, 3, *SIZE)] * 2
    assert [one["boxes"][2].tolist() for one in found] == [[0, 5 * n, 20, 10 * n] for n in (1, 2, 3)]


def test_every_option_and_source_is_the_same_call(
    folder: Path, photos: Path, torch_detector: thawline.Detector, tmp_path: Path
) -> None:
    detector = thawline.Detector.from_pretrained(str(folder / "plain.onnx"), threshold=0.0)
    image = cv2.imread(str(photos / "0.png"))[..., ::-1].copy()
    video = cv2.VideoWriter(str(tmp_path / "x.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (200, 150))
    for _ in range(3):
        video.write(image)
    video.release()
    for source, options in (
        (photos / "0.png", {"classes": "a,2", "max_detections": 4}),
        (Image.fromarray(image), {"threshold": float(np.median(torch_detector(image).confidence))}),
        (image, {"tile": 90}),
        ([image, photos / "1.png"], {"batch_size": 1}),
        (tmp_path / "x.mp4", {}),
    ):
        pairs = (one(source, **options) for one in (detector, torch_detector))
        found, expected = ([one] if isinstance(one, supervision.Detections) else list(one) for one in pairs)
        for one, other in zip(found, expected, strict=True):
            same(one, other)


def test_it_needs_neither_torch_nor_transformers(folder: Path, photos: Path) -> None:
    code = f"""
import sys
for name in ("torch", "transformers", "peft", "huggingface_hub", "accelerate", "onnx"):
    sys.modules[name] = None  # importing it is an error
import thawline.runtime
from thawline.cli import main
assert len(thawline.Detector({str(folder / "plain.onnx")!r})({str(photos / "0.png")!r}, threshold=0.0))
assert main(["predict", {str(folder / "plain.onnx")!r}, "--source", {str(photos / "0.png")!r}]) == 0
assert main(["predict", {str(folder / "weights")!r}, "--source", {str(photos / "0.png")!r}]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "0.png: " in done.stdout
    assert "thawline: This needs torch: `pip install thawline`" in done.stderr


def test_what_is_no_exported_detector_is_refused(folder: Path, tmp_path: Path) -> None:
    foreign = onnx.load(folder / "plain.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes((folder / "plain.onnx").read_bytes()[:5000])
    shutil.copy(folder / "pairs.xml", tmp_path / "alone.xml")
    for path, text in (
        (tmp_path / "foreign.onnx", "was not written by `thawline export`"),
        (tmp_path / "cut.onnx", r"'.*cut\.onnx' cannot be opened"),
        (tmp_path / "alone.xml", "cannot be opened"),
        (tmp_path / "none.onnx", "No exported detector"),
        (tmp_path, "holds several exported detectors: alone.xml, cut.onnx, foreign.onnx"),
        (folder / "weights", "holds no exported detector"),
    ):
        with pytest.raises(CheckpointError, match=text):
            Detector(path)
    with pytest.raises(ConfigError, match="run on the CPU"):
        Detector(folder / "plain.onnx", device="cuda")
    with pytest.raises(ConfigError, match="is exported: its size"):
        Detector.from_pretrained(folder / "plain.onnx", weights="random")
    with pytest.raises(CheckpointError, match="has 4 classes, but 1 `class_names`"):
        Detector.from_pretrained(folder / "plain.onnx", class_names=["a"])
    assert Detector.from_pretrained(folder / "one", class_names=[*"wxyz"]).class_names == (*"wxyz",)


def test_predict_takes_an_exported_file(
    folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--source", str(photos), "--threshold", "0", "--out", str(tmp_path / "out")]
    assert main(["predict", str(folder / "pairs.xml"), *words]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0.png", "1.png", "2.png"]
    assert main(["predict", str(folder / "none.onnx"), *words]) == 1
    assert "No exported detector" in capsys.readouterr().err


def test_the_runtimes_distribution_asks_for_what_thawlines_does_without_torch() -> None:
    whole, runtime = (
        tomllib.loads((ROOT / place / "pyproject.toml").read_text())["project"] for place in ("", "runtime")
    )
    extras = whole["optional-dependencies"]
    known = {*whole["dependencies"], *extras["detect"], *extras["export"], *extras["serve"]}
    wanted = {*runtime["dependencies"], *runtime["optional-dependencies"]["openvino"]}
    assert wanted <= known
    assert runtime["optional-dependencies"]["serve"] == extras["serve"]
    assert not {"torch", "transformers"} & {line.split(">")[0] for line in wanted}
