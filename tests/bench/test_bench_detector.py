"""The detector's bench: what it counts, its file, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from thawline.bench import detector
from thawline.bench.port import build_port
from thawline.errors import ConfigError
from thawline.models.deimv2 import VARIANTS, DEIMv2

needs_port = pytest.mark.skipif(
    not hasattr(transformers, "Deimv2Config"), reason="this transformers has no DEIMv2"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """On few pixels, but enough for the queries that the port insists on."""
    whole = detector.measure_size

    def measure(size: str, **settings: object) -> dict[str, object]:
        return whole(size, **settings, resolution=(192, 256))

    monkeypatch.setattr(detector, "measure_size", measure)
    monkeypatch.setattr(detector.torch, "set_num_threads", lambda n: None)


@needs_port
def test_counts_and_ratios_of_a_small_run(small: None, tmp_path: Path, capsys) -> None:
    out = tmp_path / "results" / "detector.json"
    arguments = ["--batch", "1", "2", "--rounds", "2", "--device", "cpu", "--out", str(out)]
    assert detector.main(["--size", "atto", *arguments]) == 0
    assert detector.main(["--size", "femto", *arguments, "--forms", "port", "fused", "--profile"]) == 0
    record = json.loads(out.read_text())
    femto = record["sizes"]["femto"]
    assert femto["command"] == (
        "thawline bench detector --size femto --batch 1 2 --dtype fp32 --forms port fused "
        "--rounds 2 --calls 1 --threads 2 --profile"
    )
    operators = femto["runs"][1]["forms"]["fused"]["operators"]
    assert "mkldnn::_convolution_pointwise" in operators
    assert 0.3 < sum(operators.values()) <= 1
    assert list(record["sizes"]) == ["atto", "femto"]  # a second run adds
    assert {"processor", "torch", "transformers"} <= set(record["machine"])
    atto = record["sizes"]["atto"]
    assert atto["parameters"]["eager"] == 508_985 > atto["parameters"]["fused"]
    assert atto["gflops"]["fused"] == pytest.approx(atto["gflops"]["eager"], rel=0.03)
    assert [run["batch"] for run in atto["runs"]] == [1, 2]
    for run in atto["runs"]:
        assert set(run["forms"]) == {"port", "eager", "fused"}
        assert run["forms"]["port"]["of_port"] == 1
        for form in run["forms"].values():
            assert form["images_per_s"] == pytest.approx(1e3 * run["batch"] / form["median_ms"], rel=0.01)
    assert "| fp32 | 1 | fused |" in capsys.readouterr().out


@needs_port
def test_operations_of_atto_are_those_its_authors_report() -> None:
    model, _ = detector._pair("atto")
    gflops = detector._gflops(model, (1, 3, 320, 320))
    assert gflops == pytest.approx(VARIANTS["atto"].reported.gflops, rel=0.02)


def test_half_precision_needs_a_gpu_and_results_of_another_machine_are_kept(
    small: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="bf16"):
        detector.main(["--dtype", "bf16", "--device", "cpu"])
    out = tmp_path / "detector.json"
    out.write_text('{"bench": "detector", "machine": {}, "device": "cpu", "sizes": {}}')
    with pytest.raises(ConfigError, match="another machine"):
        detector.main(["--device", "cpu", "--out", str(out)])


def test_a_transformers_without_the_port_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thawline.bench.port.transformers", SimpleNamespace(__version__="5.3.0"))
    with pytest.raises(ConfigError, match="transformers 5.3.0 has no DEIMv2"):
        build_port(DEIMv2.from_variant("atto"))
