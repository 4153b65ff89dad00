"""Where `predict` writes: never onto a source, never two results into one file, never over a foreign file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from thawline.cli import main
from thawline.errors import ConfigError, DataError
from thawline.inference import Detector
from thawline.inference.files import Summary, predict_files
from thawline.models.deimv2 import DEIMv2


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    model = DEIMv2.from_variant("atto", class_names=("a", "b"), image_size=(64, 64), num_queries=9)
    return Detector(model, device="cpu", threshold=0.0)


@pytest.fixture
def predict(detector: Detector) -> Callable[..., Summary]:
    def call(source: object, out: Path, **options: object) -> Summary:
        return predict_files(detector, source, out, max_detections=2, **options)

    return call


def write_image(path: Path, grey: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((40, 60, 3), grey, np.uint8))
    return path


def write_video(path: Path, n: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for grey in range(n):
        writer.write(np.full((48, 64, 3), 40 * grey, np.uint8))
    writer.release()
    return path


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file but the hidden record."""
    return {
        path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_images_keep_their_place_below_the_folder_or_the_pattern(predict, tmp_path: Path) -> None:
    for name in ("a/0001.png", "b/0001.png", "b/deep/0001.jpg", "0001.png"):
        write_image(tmp_path / "in" / name)
    every = {"a/0001.png", "b/0001.png", "b/deep/0001.jpg", "0001.png"}
    for number, (source, expected) in enumerate(
        [
            (tmp_path / "in", every),
            (str(tmp_path / "in" / "**" / "*.*"), every),
            (str(tmp_path / "in" / "[ab]" / "*.png"), {"a/0001.png", "b/0001.png"}),
            ([tmp_path / "in" / "a", str(tmp_path / "in" / "b" / "*.png")], {"a/0001.png", "b/0001.png"}),
            ([tmp_path / "in" / "b" / "0001.png", tmp_path / "in" / "b" / "deep"],
             {"0001.png", "deep/0001.jpg"}),
            (tmp_path / "in" / "a" / "0001.png", {"0001.png"}),
        ]
    ):  # fmt: skip
        out = tmp_path / f"out{number}"
        assert predict(source, out).images == len(expected)
        assert set(contents(out)) == expected, source


def test_relative_sources_and_one_stem_with_two_suffixes(
    predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.jpg", "x.png", "sub/x.jpg"):
        write_image(Path("in") / name)
    predict("in", Path("out"))
    assert set(contents(Path("out"))) == {"x.jpg", "x.png", "sub/x.jpg"}
    predict("in/*.*", Path("out2"))
    assert set(contents(Path("out2"))) == {"x.jpg", "x.png"}
    predict("in/x.jpg", Path("drawn.png"))
    assert cv2.imread("drawn.png").shape == (40, 60, 3)


def test_images_in_memory_and_of_suffixes_that_cannot_be_written_become_png(predict, tmp_path: Path) -> None:
    image = cv2.imread(str(write_image(tmp_path / "x.png")))
    predict([image, image], tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"image 0.png", "image 1.png"}
    os.rename(tmp_path / "x.png", tmp_path / "x.unheard")
    predict([tmp_path / "x.unheard"], tmp_path / "out")
    assert "x.unheard.png" in contents(tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "same image", "link to folder", "symlink", "hardlink", "parent"])
def test_a_source_is_never_replaced(predict, tmp_path: Path, kind: str) -> None:
    write_image(tmp_path / "in" / "a.png")
    write_image(tmp_path / "in" / "sub" / "a.png")
    before = contents(tmp_path / "in")
    out = source = tmp_path / "in"
    if kind == "same image":
        out = source = tmp_path / "in" / "a.png"
    elif kind == "link to folder":
        out = tmp_path / "link"
        out.symlink_to(source)
    elif kind in ("symlink", "hardlink"):
        out = tmp_path / "out"
        out.mkdir()
        link = out / "a.png"
        link.symlink_to(source / "a.png") if kind == "symlink" else os.link(source / "a.png", link)
    elif kind == "parent":
        source = tmp_path / "in" / "sub"
    with pytest.raises(ConfigError, match=r"a\.png' (is a source|exists)"):
        predict(source, out)
    assert contents(tmp_path / "in") == before


def test_a_video_is_never_replaced_while_it_is_read(predict, tmp_path: Path) -> None:
    source = write_video(tmp_path / "clip.mp4")
    before = contents(tmp_path)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "clip.mp4").symlink_to(source)
    for out in (tmp_path, source, tmp_path / "linked"):
        with pytest.raises(ConfigError, match="is a source"):
            predict(source, out)
    assert {name: digest for name, digest in contents(tmp_path).items() if "/" not in name} == before
    predict(source, tmp_path / "out")
    assert cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 4


def test_videos_of_one_stem_do_not_replace_each_other(predict, tmp_path: Path) -> None:
    for name in ("clip.avi", "clip.mov"):
        predict(write_video(tmp_path / name), tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"clip.avi.mp4", "clip.mov.mp4"}
    with pytest.raises(DataError, match=r"clip\.avi' is a video"):
        predict([tmp_path / "clip.avi", tmp_path / "clip.mov"], tmp_path / "out")


def test_a_file_is_no_folder_to_write_into(predict, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("mine")
    for out in ("notes.txt", "notes.txt/a.png"):
        with pytest.raises(ConfigError, match="notes.txt' is a file. Give a folder"):
            predict(tmp_path / "a.png", tmp_path / out)


def test_two_results_of_one_name_are_refused(predict, tmp_path: Path) -> None:
    image = write_image(tmp_path / "in" / "a.png")
    write_image(tmp_path / "in" / "b.png")
    with pytest.raises(ConfigError, match=r"would both be written to '.*a\.png'"):
        predict([image, image], tmp_path / "out")
    with pytest.raises(ConfigError, match="names one image, but there are 2"):
        predict(tmp_path / "in", tmp_path / "one.png")
    assert not (tmp_path / "out").exists()


def test_a_file_that_predict_did_not_write_is_never_replaced(predict, tmp_path: Path) -> None:
    source = write_image(tmp_path / "card" / "a.png")
    original = write_image(tmp_path / "album" / "a.png", grey=10)
    before = contents(tmp_path / "album")
    for out in (tmp_path / "album", original):
        with pytest.raises(ConfigError, match="is no earlier result"):
            predict(source, out)
    (tmp_path / "album" / "predictions.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"predictions\.json' exists"):
        predict(write_image(tmp_path / "card" / "b.png"), tmp_path / "album", save_results=True)
    (tmp_path / "album" / "predictions.json").unlink()
    assert contents(tmp_path / "album") == before


def test_earlier_results_are_replaced_and_are_no_source(
    predict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "in"
    write_image(source / "a.png")
    out = source / "drawn"
    for run in range(2):
        summary = predict(source, out, save_results=True)
        assert (summary.images, len(json.loads((out / "predictions.json").read_text()))) == (1, 2)
        assert set(contents(source)) == {"a.png", "drawn/a.png", "drawn/predictions.json"}
        assert ("1 results of earlier predictions" in caplog.text) == (run == 1)
        caplog.clear()
        caplog.set_level("INFO")
    # Neither into another folder, nor by a pattern; a file given by name is what its user wants.
    assert predict(source, tmp_path / "other").images == 1
    assert predict(str(source / "**" / "*.png"), tmp_path / "third").images == 1
    assert predict(out / "a.png", tmp_path / "fourth").images == 1
    with pytest.raises(DataError, match="1 results of earlier predictions"):
        predict(out, tmp_path / "fifth")
    write_image(out / "new.png")  # a source again: it is no result
    assert predict(source, tmp_path / "sixth").images == 2


def test_frames_of_another_size_are_not_left_out_of_a_video(
    predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Turning:
        def __init__(self, index: int) -> None:
            self.images = [np.zeros((48, 64, 3), np.uint8), np.zeros((64, 48, 3), np.uint8)]

        def isOpened(self) -> bool:
            return True

        def get(self, prop: int) -> float:
            return 0.0

        def read(self) -> tuple[bool, np.ndarray | None]:
            return (True, self.images.pop(0)) if self.images else (False, None)

        def release(self) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr("cv2.VideoCapture", Turning)
        (tmp_path / "video.mp4").touch()
        predict(tmp_path / "video.mp4", tmp_path / "turned.mp4")
    assert cv2.VideoCapture(str(tmp_path / "turned.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2


def test_the_command_says_what_it_refuses_in_one_line(
    detector: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DEIMv2.from_variant("atto", class_names=("a", "b"), image_size=(64, 64), num_queries=9)
    model.save_pretrained(tmp_path / "model")
    files = [str(write_image(tmp_path / "in" / sub / "a.png")) for sub in ("x", "y", "z")]
    words = ["predict", str(tmp_path / "model"), "--device", "cpu", "--threshold", "0"]
    # A pattern that the shell has expanded, and the option again.
    assert main([*words, "--source", *files[:2], "--source", files[2], "--out", str(tmp_path / "out")]) == 0
    assert set(contents(tmp_path / "out")) == {"x/a.png", "y/a.png", "z/a.png"}
    capsys.readouterr()
    assert main([*words, "--source", str(tmp_path / "in"), "--out", str(tmp_path / "in"), "--json"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is a source, which is never replaced" in line
