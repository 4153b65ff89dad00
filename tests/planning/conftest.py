"""Rates of the machine that need no measuring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that need no measuring."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = {"flops": {"float32": 1e10, "bfloat16": 1e10}, "bandwidth": 1e9, "per_op": 1e-6, "date": "2026"}
    (tmp_path / "thawline").mkdir()
    name = f"cpu, {torch.get_num_threads()} threads"
    (tmp_path / "thawline" / "rates.json").write_text(json.dumps({name: rates}))
