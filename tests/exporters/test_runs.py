"""A run of a detector is exported with its adapter merged, its classes and its held-out images."""

from __future__ import annotations

import json

import onnx
import pytest

from tests.support.detection_runs import NAMES, DetectionRecipes, write_painted_coco
from thawline.cli import main
from thawline.run import run


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> DetectionRecipes:
    return DetectionRecipes(
        write_painted_coco(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs")
    )


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_tuned_run_is_exported_and_its_report_shows_the_certificate(
    method: str, recipes: DetectionRecipes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recipes.runs / method
    run(recipes(method, variant="s", tuner={"method": method, "r": 4}, epochs=1))
    assert main(["export", str(folder), "--single_input"]) == 0
    assert "AP on 2 held-out images" in capsys.readouterr().out
    file = folder / "exports" / "model.onnx"
    report = json.loads(file.with_name("model.onnx.report.json").read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 3]
    assert max(row["box_error_px"] for row in report["rows"]) < 0.1
    assert report["ap"]["difference"] == pytest.approx(0, abs=1e-3)
    stored = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(stored["class_names"]) == list(NAMES)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Exports, compared with torch" in page
    assert "model.onnx" in page
