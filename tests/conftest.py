"""What every test may use. `../shared` holds real data and reference numbers; a public clone has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference numbers beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real data and reference numbers do not travel with a clone")
    return SHARED


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
