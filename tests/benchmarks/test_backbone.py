"""The bench of what a tuner on a detector's backbone costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backbone import TUNERS, main, measure_backbone


def test_bytes_kept_follow_from_what_trains() -> None:
    rows = measure_backbone("s", batch_size=1, size=64, rounds=0)["tuners"]
    kept = {name: row["bytes"] for name, row in rows.items()}
    by_backbone = {name: found["saved_by_backbone"] for name, found in kept.items()}
    assert by_backbone["frozen"] < by_backbone["paca"] < by_backbone["none"] <= by_backbone["lora"]
    # Outside of the backbone all keep the same, but for a match more or less.
    beside = [found["saved"] - found["saved_by_backbone"] for found in kept.values()]
    assert max(beside) == pytest.approx(min(beside), rel=1e-3)
    # 12 blocks of qkv, proj, fc1, fc2: r columns of each, r (in + out) numbers in LoRA's two factors.
    inside = {name: row["trainable_in_backbone"] for name, row in rows.items()}
    d = 192
    assert inside["paca"] - inside["frozen"] == 12 * 16 * (3 * d + d + 4 * d + d)
    assert inside["lora"] - inside["frozen"] == 12 * 8 * ((d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d))
    # Gradients are float32, and trained are exactly the parameters that get one.
    assert all(row["bytes"]["gradients"] == 4 * row["trainable"] for row in rows.values())


def test_bench_of_the_backbone_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "backbone.json"
    arguments = ["--variant", "atto", "--size", "64", "--batch_size", "1", "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["tuners"]
    assert list(rows) == list(TUNERS)
    # All of HGNetv2 comes pretrained, so nothing of a frozen one is kept.
    assert rows["frozen"]["bytes"]["saved_by_backbone"] == 0 < rows["paca"]["bytes"]["saved_by_backbone"]
    assert f"{rows['paca']['time_of_none']:.3f}" in capsys.readouterr().out
