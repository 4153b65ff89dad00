"""The ONNX file gives torch's detections, in plain operations, at any batch size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.testing import assert_close

from tests.exporters.conftest import build_detector
from thawline.cli import main
from thawline.errors import ConfigError
from thawline.exporters.export import export_detector
from thawline.exporters.forms import build_graph
from thawline.exporters.settings import Settings
from thawline.models.deimv2.model import DEIMv2

NOT_PLAIN = {
    "Loop",
    "If",
    "Scan",
    "Shape",
    "Size",
    "Range",
    "ConstantOfShape",
    "NonZero",
    "ScatterND",
    "Expand",
}


@pytest.mark.parametrize("kind", ["lite", "hgnet", "tiny", "dino"])
@pytest.mark.parametrize("sampling", ["grid_sample", "gather"])
def test_graph_gives_the_models_detections(kind: str, sampling: str) -> None:
    model = build_detector(kind, image_size=(64, 96))
    images, sizes = torch.rand(3, 3, 64, 96), torch.tensor([[640, 480], [333, 500], [96, 64]])
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.image_mean, model.config.image_std))
    with torch.inference_mode():
        expected = model.postprocess(model((images - mean) / std), sizes.flip(1))
        labels, boxes, scores = build_graph(model, sampling)(images, sizes)
    for i, one in enumerate(expected):
        assert_close(scores[i], one["scores"], atol=2e-6, rtol=0)
        assert_close(boxes[i], one["boxes"], atol=2e-3, rtol=0)
        assert torch.equal(labels[i], one["labels"])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lite", {"opset": 17}),
        ("hgnet", {"opset": 18, "sampling": "gather"}),
        ("tiny", {"opset": 19, "single_input": True}),
        ("dino", {"opset": 17, "sampling": "gather", "batch": 2}),
    ],
)
def test_file_is_what_was_asked_for(kind: str, settings: dict, tmp_path: Path) -> None:
    model = build_detector(kind, image_size=(64, 96), class_names=("a", "b", "c"))
    report = export_detector(model, tmp_path / "m.onnx", Settings(**settings))
    file = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", settings["opset"])]
    assert not NOT_PLAIN & {node.op_type for node in file.graph.node}
    assert ("GridSample" in {node.op_type for node in file.graph.node}) == ("sampling" not in settings)
    assert {entry.key: entry.value for entry in file.metadata_props}["class_names"] == '["a", "b", "c"]'
    assert [row.batch for row in report.rows] == ([settings["batch"]] if "batch" in settings else [1, 3])
    assert max(row.box_error_px for row in report.rows) < 0.05
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    first = session.get_inputs()[0].shape[0]
    assert first == settings.get("batch", "N")
    n = settings.get("batch", 5)
    inputs = {"images": np.random.default_rng(0).random((n, 3, 64, 96), np.float32)}
    if "single_input" not in settings:
        inputs["orig_target_sizes"] = np.full((n, 2), 100)
    labels, boxes, scores = session.run(["labels", "boxes", "scores"], inputs)
    k = min(300, model.config.decoder.num_queries * 3)
    assert (labels.shape, boxes.shape, scores.shape) == ((n, k), (n, k, 4), (n, k))


def test_report_beside_the_file_says_what_was_compared(lite: DEIMv2, tmp_path: Path) -> None:
    export_detector(lite, tmp_path)
    report = json.loads((tmp_path / "model.onnx.report.json").read_text())
    assert report["passed"]
    assert [(row["precision"], row["batch"]) for row in report["rows"]] == [("fp32", 1), ("fp32", 3)]
    assert all(row["box_error_px"] < 0.05 and row["score_error"] < 1e-4 for row in report["rows"])
    assert report["metadata"]["image_size"] == "[64, 64]"


def test_half_precision_keeps_inputs_and_outputs_in_float32(lite: DEIMv2, tmp_path: Path) -> None:
    report = export_detector(lite, tmp_path / "half.onnx", Settings(half=True))
    assert {row.precision for row in report.rows} == {"fp32", "fp16"}
    session = onnxruntime.InferenceSession(tmp_path / "half.onnx")
    assert session.get_inputs()[0].type == session.get_outputs()[1].type == "tensor(float)"
    weights = onnx.load(tmp_path / "half.onnx").graph.initializer
    assert sum(w.data_type == onnx.TensorProto.FLOAT16 for w in weights) > 50


@pytest.mark.parametrize(("format", "name"), [("openvino", "m.xml"), ("pt2", "m.pt2")])
def test_other_formats_give_torchs_detections_too(format: str, name: str, tmp_path: Path) -> None:
    report = export_detector(build_detector("hgnet"), tmp_path / name, Settings(format=format))
    assert [row.batch for row in report.rows] == [1, 3]
    assert max(row.box_error_px for row in report.rows) < 0.05
    assert (tmp_path / name).is_file()
    files = [file for file in tmp_path.iterdir() if file != report.file]  # OpenVINO's weights are one of them
    assert report.bytes == sum(file.stat().st_size for file in files) > 500_000


def test_executorch_gives_torchs_detections_where_it_is_installed(lite: DEIMv2, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    settings = Settings(format="executorch", sampling="gather", batch=2)
    report = export_detector(lite, tmp_path, settings)
    assert report.path == tmp_path / "model.pte"
    assert [(row.batch, row.box_error_px < 0.05) for row in report.rows] == [(2, True)]


def test_tensorrt_is_told_the_exact_command_where_it_is_missing(
    lite: DEIMv2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    report = export_detector(lite, tmp_path / "m.engine", Settings(format="tensorrt"))
    assert report.path == tmp_path / "m.onnx"
    assert report.path.is_file()
    (note,) = report.notes
    assert "trtexec --onnx=m.onnx --saveEngine=m.engine --minShapes=images:1x3x64x64,orig_target" in note


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"opset": 20}, "GridSample"),
        ({"opset": 16}, "17, 18 or 19"),
        ({"format": "caffe"}, "caffe"),
        ({"sampling": "nearest"}, "nearest"),
        ({"batch": 0}, "batch"),
        ({"budget": -1.0}, "budget"),
        ({"ap_budget": -1.0}, "ap_budget"),
        ({"format": "executorch"}, "`sampling=gather` and `batch`"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Settings(**settings)


def test_file_over_the_budget_is_not_kept(
    lite: DEIMv2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lite.save_pretrained(tmp_path / "weights")
    out = tmp_path / "m.onnx"
    assert main(["export", str(tmp_path / "weights"), "--out", str(out), "--budget", "0"]) == 3
    assert "the budget is 0 pixels" in capsys.readouterr().err
    assert not out.exists()
    assert not json.loads((tmp_path / "m.onnx.report.json").read_text())["passed"]
    assert main(["export", str(tmp_path / "weights"), "--out", str(out), "--budget", "0.1"]) == 0
    assert "box_error_px" in capsys.readouterr().out
    older, report = out.read_bytes(), json.loads((tmp_path / "m.onnx.report.json").read_text())
    assert report["passed"]
    assert main(["export", str(tmp_path / "weights"), "--out", str(out), "--budget", "0"]) == 3
    assert "the older file stays" in capsys.readouterr().err
    assert out.read_bytes() == older
    assert json.loads((tmp_path / "m.onnx.report.json").read_text()) == report
    assert not json.loads((tmp_path / "m.onnx.refused.report.json").read_text())["passed"]


def test_name_that_does_not_fit_the_format_is_refused(lite: DEIMv2, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ends in .onnx"):
        export_detector(lite, tmp_path / "model.xml")
