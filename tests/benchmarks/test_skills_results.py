"""The docs on skills say what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
PERFORMANCE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
SKILLS = (ROOT / "docs/results/skills.md").read_text(encoding="utf-8")


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("family", ["head", "layer"])
def test_the_tables_of_the_worlds_are_those_recorded(family: str) -> None:
    section = SKILLS.split("\n## ")[["head", "layer"].index(family) + 1]
    shown = [cells(line) for line in section.splitlines() if line.startswith("| ")][1:]
    expected = []
    for method, row in recorded("skills")["families"][family]["methods"].items():
        scores = [row["score"].get(phase) for phase in ("train", "zero_shot", "full", "z", "mu")]
        expected.append(
            [method, str(row["trained"])]
            + [f"{s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" if s else "" for s in scores]
            + [f"{mean(row['alignment'][space]['coherence']):.4f}" for space in ("skill", "effective")]
        )
    assert shown == expected


@pytest.mark.parametrize(
    ("file", "case", "label"),
    [
        ("mhr", "skills-small", "small Llama, launches decide"),
        ("mhr-reference", "skills-reference", "reference Llama, 8 × 128 tokens"),
        ("mhr", "skills-decoding-small", "small Llama, generating (ops per token)"),
        ("mhr-reference", "skills-decoding", "reference Llama, generating"),
    ],
)
def test_a_case_of_mhr_is_shown_as_recorded(file: str, case: str, label: str) -> None:
    rows = recorded(file)["cases"][case]["variants"]
    took = {name: row["time"]["cpu"] for name, row in rows.items()}
    ops = {name: row["ops"] for name, row in rows.items()}
    counts = [
        "/".join(str(ops[name][way]) for way in ("forward", "backward") if ops[name][way])
        for name in ("lora", "poly", "mhr")
    ]
    ratios = [took["mhr"]["of_lora"], took["mhr"]["of_poly"], took["poly"]["of_lora"]]
    waits = [str(ops[name]["waits"]) for name in ("poly", "mhr")]
    shown = next(cells(line) for line in PERFORMANCE.splitlines() if line.startswith(f"| {label} |"))
    assert shown == [label, *(f"{ratio:.3f}" for ratio in ratios), *counts, *waits]


def test_the_readme_says_what_is_recorded_of_mhr() -> None:
    small, large = (
        recorded(file)["cases"][case]["variants"]["mhr"]["time"]["cpu"]["of_poly"]
        for file, case in (("mhr", "skills-small"), ("mhr-reference", "skills-reference"))
    )
    assert (
        f"launches decide, products decide | {small:.2f}, {large:.2f} |" in (ROOT / "README.md").read_text()
    )


@pytest.mark.parametrize("file", ["mhr", "mhr-reference"])
def test_the_command_shown_is_the_one_that_was_run(file: str) -> None:
    command = recorded(file)["command"].removeprefix("python -m thawline.bench.tuners ")
    assert command in " ".join(PERFORMANCE.split())
    assert f"`benchmarks/results/{file}.json`" in PERFORMANCE


def test_the_worlds_command_is_the_one_that_was_run() -> None:
    assert f"`{recorded('skills')['command']}`" in SKILLS
