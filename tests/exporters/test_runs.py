"""A run of a detector is exported with its adapter merged, its classes and its held-out images."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests.support.detection_runs import NAMES, TINY_VIT, DetectionRecipes
from thawline.cli import main
from thawline.models.deimv2 import DEIMv2
from thawline.run import run


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_tuned_run_is_exported_and_its_report_shows_the_certificate(
    method: str, painted_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = DetectionRecipes(painted_set, tmp_path / "runs")
    DEIMv2.from_variant("s", **TINY_VIT, class_names=NAMES).save_pretrained(tmp_path / "start")
    base = {"weights": str(tmp_path / "start"), "overrides": {}}
    folder = run(recipes(variant="s", base=base, tuner={"method": method, "r": 4}, max_steps=1)).folder
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
