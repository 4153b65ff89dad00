"""The bench of sequences derives lengths and checks them by running."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thawline.bench import sequence


@pytest.mark.filterwarnings("ignore")
def test_the_derived_length_is_run_and_keeps_what_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = {name: sequence.COMPARED[name] for name in ("LoRA", "PaCA")}
    monkeypatch.setattr(sequence, "COMPARED", compared)
    monkeypatch.setattr(sequence.CONFIG, "num_hidden_layers", 1)
    out = tmp_path / "sequence.json"
    assert sequence.main(["--rounds", "0", "--budget", "40MB", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["variants"]
    assert rows["PaCA"]["length"] > rows["LoRA"]["length"] > 0
    assert all(row["saved_of_planned"] == pytest.approx(1, rel=0.01) for row in rows.values())
