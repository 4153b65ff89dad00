"""Lower precision: what it costs is measured, and parts that do not bear it stay in full precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.exporters.conftest import build_detector, label_itself
from thawline.errors import BudgetError, ConfigError
from thawline.exporters.certificate import generated_images
from thawline.exporters.export import export_detector
from thawline.exporters.job import Samples
from thawline.exporters.settings import Settings
from thawline.models.deimv2.model import DEIMv2
from thawline.sessions import OUTPUTS, open_onnx


@pytest.fixture(scope="module")
def steady() -> DEIMv2:
    """A detector whose queries are all tokens, so that small errors change its detections little."""
    return build_detector("lite", num_queries=20)


@pytest.fixture(scope="module")
def samples(steady: DEIMv2) -> Samples:
    return label_itself(steady, 6)


def overflowing() -> DEIMv2:
    """A detector that computes what `lite` does, by way of values that float16 does not hold."""
    model = build_detector("lite")
    ffn = model.decoder.decoder.layers[0].swish_ffn
    hidden = ffn.w3.in_features
    with torch.no_grad():
        ffn.w12.weight[hidden:] *= 2e5
        ffn.w12.bias[hidden:] *= 2e5
        ffn.w3.weight /= 2e5
    return model


def infinite_values(path: Path) -> list[str]:
    """Values of a file that are not finite for a generated image."""
    model = onnx.load(path)
    inner = [name for node in model.graph.node for name in node.output if name not in OUTPUTS]
    images, sizes = generated_images(1, (64, 64))
    found = open_onnx(path, also=inner)({"images": images, "orig_target_sizes": sizes})
    return [name for name, value in found.items() if not np.isfinite(value).all()]


def test_values_too_large_for_half_precision_stay_in_full(tmp_path: Path) -> None:
    report = export_detector(overflowing(), tmp_path / "half.onnx", Settings(half=True))
    assert report.passed
    assert {row.precision for row in report.rows} == {"fp32", "fp16"}
    assert sum("layers.0.swish_ffn" in node for node in report.kept_fp32) > 3, report.kept_fp32
    assert "In full precision" in report.lines()[-1]
    infinite = infinite_values(report.path)
    assert not infinite, infinite


def test_labelled_images_give_the_ap_of_both(steady: DEIMv2, samples: Samples, tmp_path: Path) -> None:
    report = export_detector(steady, tmp_path / "m.onnx", samples=samples)
    assert report.ap["torch"] > 0.5
    assert report.ap["file"] == pytest.approx(report.ap["torch"], abs=1e-3)
    assert report.ap["difference"] == pytest.approx(0, abs=1e-3)


def test_int8_keeps_in_full_precision_what_costs_too_much(
    steady: DEIMv2, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thawline.exporters.int8.FIRST", 64)
    settings = Settings(int8=True, ap_budget=50.0, single_input=True, batch=2)
    report = export_detector(steady, tmp_path / "m.onnx", settings, samples)
    weights = onnx.load(report.path).graph.initializer
    assert sum(w.data_type == onnx.TensorProto.INT8 for w in weights) > 10
    assert len(report.kept_fp32) == 64
    assert report.precision == "int8"
    assert -0.5 <= report.ap["difference"] < 0


def test_int8_over_the_ap_budget_is_refused(
    steady: DEIMv2, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thawline.exporters.int8.FIRST", 10**6)  # one attempt
    with pytest.raises(BudgetError, match="int8 changes AP by -"):
        export_detector(steady, tmp_path / "m.onnx", Settings(int8=True, ap_budget=0.0), samples)
    assert not (tmp_path / "m.onnx").exists()


def test_openvino_takes_int8_too(steady: DEIMv2, samples: Samples, tmp_path: Path) -> None:
    settings = Settings(format="openvino", int8=True, ap_budget=100.0)
    report = export_detector(steady, tmp_path / "m.xml", settings, samples)
    assert report.ap["difference"] < 0
    assert b'element_type="i8"' in (tmp_path / "m.xml").read_bytes()


def test_int8_needs_images_to_calibrate_with(lite: DEIMv2, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data DATASET"):
        export_detector(lite, tmp_path / "m.onnx", Settings(int8=True))


@pytest.mark.parametrize("settings", [{"half": True}, {"format": "pt2"}, {"format": "tensorrt"}])
def test_int8_is_refused_where_it_cannot_be(settings: dict) -> None:
    with pytest.raises(ConfigError, match="`int8` is for onnx and openvino"):
        Settings(int8=True, **settings)
