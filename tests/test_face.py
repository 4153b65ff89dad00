"""The face of the package: sorted, complete, and free until it is touched."""

from __future__ import annotations

import subprocess
import sys

import pytest

import thawline


def test_every_public_name_loads_and_is_sorted() -> None:
    assert list(thawline.__all__) == sorted(thawline.__all__)
    for name in thawline.__all__:
        assert getattr(thawline, name) is not None
    assert set(thawline.__all__) <= set(dir(thawline))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'PacaConfg'"):
        _ = thawline.PacaConfg


def test_importing_thawline_imports_no_framework() -> None:
    code = (
        "import sys, thawline, thawline.errors\n"
        "heavy = {'torch', 'transformers', 'peft', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_are_also_the_built_in_error_a_caller_expects() -> None:
    for name in ("ConfigError", "RoutingError", "CheckpointError", "DataError"):
        assert issubclass(getattr(thawline, name), (thawline.ThawlineError, ValueError))
        assert issubclass(getattr(thawline, name), ValueError)
    missing = thawline.MissingExtraError("QPaCA", "bitsandbytes", "quant")
    assert isinstance(missing, ImportError)
    assert "pip install 'thawline[quant]'" in str(missing)


def test_did_you_mean_names_the_nearest() -> None:
    from thawline.errors import did_you_mean

    assert did_you_mean("lorra", ["paca", "lora"]) == "Available: lora, paca. Did you mean 'lora'?"
    assert did_you_mean("zzz", ["paca", "lora"]) == "Available: lora, paca."
    many = did_you_mean("lorra", ["lora", *(f"task_{i}" for i in range(100))])
    assert many.startswith("Available: lora, ")
    assert many.endswith(", … (101). Did you mean 'lora'?")
    assert many.count("task_") == 7  # of very many the nearest
