"""The face of the package: sorted, complete, and free until it is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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


def test_commands_of_the_command_line_are_functions() -> None:
    from thawline.cli import VERBS

    renamed = {
        "eval": "evaluate",
        "data": "check_data",
        "list": "list_choices",
        "report": "build_report",
        "domains": "list_domains",
    }
    for verb in VERBS.keys() - {"bench", "demo"}:
        assert callable(getattr(thawline, renamed.get(verb, verb))), verb


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tuner.rank": 8}, "Unknown key 'tuner.rank' in the overrides. Did you mean 'tuner.r'?"),
        ({"tuner": {"rank": 8}}, "Unknown key 'tuner.rank' in the overrides. Did you mean 'tuner.r'?"),
        ({"epochs": 8}, "Unknown key 'epochs' in the overrides. Did you mean 'training.epochs'?"),
        ({"tuner.r": "four"}, "'tuner.r' takes int, got 'four'."),
        ({"tuner": "pacca"}, "Unknown tuner 'pacca'."),
        ({"training": 3}, "`training` in the overrides must hold keys and values, got 3."),
    ],
)
def test_overrides_are_refused_as_on_the_command_line(tmp_path: Path, overrides: dict, message: str) -> None:
    recipe = {"base": "m", "data": "d", "folder": str(tmp_path)}
    with pytest.raises(thawline.ConfigError) as caught:
        thawline.train(recipe, **overrides)
    assert str(caught.value).startswith(message)


def test_one_call_does_what_a_command_does(tiny_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "letters.jsonl"
    lines = [
        {"input": f"{a}{b}", "output": a, "choices": ["a", "b"], "split": "test" if b == "z" else "train"}
        for a in "ab"
        for b in "xyz"
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {tiny_llama}\ntuner: {{method: lora, r: 2}}\nfolder: {tmp_path}/runs\n")
    training = {"epochs": 1, "batch_size": 2}
    result = thawline.train(recipe, data=rows, training=training, **{"tuner.r": 4, "name": "one"})
    assert (result.status, result.steps) == ("finished", 2)
    assert (result.folder / "report.html").is_file()
    config = thawline.load_recipe(result.folder / "config.yaml")
    assert (config.tuner.r, config.tuner.method, config.training.epochs) == (4, "lora", 1)

    out = tmp_path / "predicted.jsonl"
    found = thawline.evaluate(result.folder, out=out)
    assert found.metrics == result.metrics
    assert len(out.read_text().splitlines()) == 2
    assert (
        thawline.evaluate(result.folder, data={"path": str(rows), "max_eval_rows": 1}).parts["letters"][
            "rows"
        ]
        == 1
    )
    with pytest.raises(thawline.ConfigError, match="already exists"):
        thawline.evaluate(result.folder, out=out)
    assert set(thawline.predict(result.folder, ["az", "bz"], choices=["a", "b"])) <= {"a", "b"}
    assert len(thawline.predict(result.folder, "az", max_new_tokens=2)) == 1


def test_errors_are_also_the_built_in_error_a_caller_expects() -> None:
    for name in ("ConfigError", "RoutingError", "CheckpointError", "DataError"):
        assert issubclass(getattr(thawline, name), (thawline.ThawlineError, ValueError))
        assert issubclass(getattr(thawline, name), ValueError)
    missing = thawline.MissingExtraError("Detection", "OpenCV", "detect")
    assert isinstance(missing, ImportError)
    assert "pip install 'thawline[detect]'" in str(missing)


def test_did_you_mean_names_the_nearest() -> None:
    from thawline.errors import did_you_mean

    assert did_you_mean("lorra", ["paca", "lora"]) == "Available: lora, paca. Did you mean 'lora'?"
    assert did_you_mean("zzz", ["paca", "lora"]) == "Available: lora, paca."
    many = did_you_mean("lorra", ["lora", *(f"task_{i}" for i in range(100))])
    assert many.startswith("Available: lora, ")
    assert many.endswith(", … (101). Did you mean 'lora'?")
    assert many.count("task_") == 7  # of very many the nearest
