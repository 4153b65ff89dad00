"""The browser's page detects what the exported model detects, and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import CHROMIUM, open_page
from tests.exporters.conftest import build_detector
from thawline.errors import ConfigError, DataError
from thawline.jobs import export
from thawline.runtime import Detector
from thawline.web import build

CACHED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thawline" / build.TARBALL


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A detector's folder, with files in the runtime's place that hold their names."""
    folder = tmp_path_factory.mktemp("site")
    tarball = folder / "cache" / "thawline" / build.TARBALL
    tarball.parent.mkdir(parents=True)
    with tarfile.open(tarball, "w:gz") as archive:
        for name in (*build.RUNTIME, "ort.all.min.mjs"):
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    model = build_detector("lite", image_size=(64, 96), class_names=tuple("abcde"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(
            build, "DIGEST", base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        )
        export(model, folder / "site", format="web")
        yield folder / "site"


def test_the_folder_holds_all_that_the_page_loads(site: Path) -> None:
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert found >= {*build.PAGE, *(f"ort/{name}" for name in build.RUNTIME), "model.onnx", "check.bin"}
    assert (site / "ort" / build.RUNTIME[0]).read_text() == build.RUNTIME[0]
    about = json.loads((site / "model.json").read_text())
    assert (about["class_names"], about["image_size"]) == ([*"abcde"], [64, 96])
    assert len(about["check"]) > 0
    pixels = np.frombuffer((site / "check.bin").read_bytes(), np.uint8).reshape(3, 64, 96)
    (expected,) = Detector(site, threshold=0).network([pixels.transpose(1, 2, 0).copy()])
    np.testing.assert_allclose(about["check"][0]["score"], expected["scores"][0], atol=1e-5)
    for path in site.glob("*.*s"):
        assert "//" not in re.sub(r"^ *//.*|; *//.*", "", path.read_text(), flags=re.MULTILINE), path.name
    for settings in ({"half": True}, {"batch": 4}, {"single_input": True}):
        with pytest.raises(ConfigError, match=f"`{next(iter(settings))}`: the page decides it"):
            export("atto", site, weights="random", format="web", **settings)


def test_another_page_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(ConfigError, match="holds another page"):
        export("atto", tmp_path, weights="random", format="web")


def test_a_runtime_that_is_not_the_published_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "thawline").mkdir()
    (tmp_path / "thawline" / build.TARBALL).write_bytes(b"another")
    with pytest.raises(DataError, match="is not the published"):
        build.find_runtime()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.skipif(not CACHED.is_file(), reason="`thawline export --format web` caches its runtime")
def test_the_page_detects_what_the_model_does(site: Path) -> None:
    build.write_site(site, site / "model.onnx", CACHED)
    rng = np.random.default_rng(0)
    images = {}
    for height, width in ((150, 200), (40, 31), (64, 96)):
        small = Image.fromarray(rng.integers(0, 255, (7, 9, 3), dtype=np.uint8))
        images[f"{width}.png"] = small.resize((width, height), Image.Resampling.BICUBIC)
        images[f"{width}.png"].save(site / f"{width}.png")
    detector = Detector(site / "model.onnx", threshold=0.0)
    with open_page(site) as browser:
        about = "[self.crossOriginIsolated, thawline.detector.provider, thawline.detector.note]"
        assert browser.evaluate(about) == [True, "wasm", ""]
        browser.evaluate("document.getElementById('threshold').value = 0")
        for name, image in images.items():
            found = browser.evaluate(
                f"fetch('{name}').then((answer) => answer.blob()).then(createImageBitmap)"
                ".then((image) => thawline.show(image, image.width, image.height))"
            )
            expected = detector(image)
            assert len(found) == len(expected) > 0
            rows = zip(expected.xyxy, expected.data["class_name"], expected.confidence, strict=True)
            for box, label, score in rows:
                assert any(
                    one["class_name"] == label
                    and abs(one["score"] - score) < 1e-4
                    and np.abs(np.array(one["box"]) - box).max() < 0.01
                    for one in found
                ), name
        assert "frames/s" in browser.evaluate("document.getElementById('status').textContent")
