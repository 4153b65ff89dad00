"""The docs on training detectors agree with the recorded results, and those reach the goals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
TRAINING = " ".join((ROOT / "docs" / "training-detection.md").read_text(encoding="utf-8").split())
BACKBONE = (ROOT / "docs" / "results" / "detection-backbone.md").read_text(encoding="utf-8")
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
OF_BACKBONE = PERFORMANCE[PERFORMANCE.index("## A detector's backbone") :]
TUNERS = {"none": "none", "lora": "LoRA, r 8", "paca": "PaCA, r 16", "frozen": "frozen"}


def recorded(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f}"


@pytest.mark.parametrize("variant", ["Atto", "Pico", "N", "S"])
def test_a_training_step_is_recorded_within_its_goal_and_shown(variant: str) -> None:
    row = recorded("train-step")["variants"][variant.lower()]
    rounds = row["of_transformers_by_round"]
    assert row["batch_size"] == 4
    assert row["goal"] == {"Atto": 0.85, "Pico": 0.78, "N": 0.78, "S": 0.92}[variant]
    assert row["of_transformers"] <= row["goal"]
    waits = {who: sum(places.values()) for who, places in row["host_reads"].items()}
    assert waits["thawline"] <= 2
    line = f"| {variant} | {row['of_transformers']:.2f} | {len(rounds)} | "
    assert f"{line}{waits['transformers']}, {waits['thawline']} |" in PERFORMANCE


def test_the_loader_is_recorded_within_its_goals_and_shown() -> None:
    phases = recorded("loader")["phases"]
    ours = {phase: chains["thawline"] for phase, chains in phases.items()}
    for phase, chains in phases.items():
        assert chains["thawline"]["times_pillow"] >= 1.9
        assert chains["thawline"]["levels_from_pillow"] < 1
        if phase == "with Mosaic":
            assert chains["merged"]["times_pillow"] >= 3
    times = [f"{ours[phase]['times_pillow']:.1f}" for phase in ("with Mosaic", "without Mosaic", "stage 2")]
    assert f": {times[0]} in the epochs with Mosaic, {times[1]} without, {times[2]} in stage 2." in TRAINING
    rates = [row["images_per_second"] for row in ours.values()]
    assert f"one core: {min(rates):.0f} to {max(rates):.0f} images/s" in TRAINING


def test_the_readme_says_what_is_recorded() -> None:
    steps = {name: row["of_transformers"] for name, row in recorded("train-step")["variants"].items()}
    small = [steps.pop(name) for name in ("atto", "pico", "n")]
    assert f"| {min(small):.2f} to {max(small):.2f}, {steps['s']:.2f} |" in README
    chains = [phase["thawline"]["times_pillow"] for phase in recorded("loader")["phases"].values()]
    assert f"in Pillow | {1 / max(chains):.2f} to {1 / min(chains):.2f} |" in README
    fused = {
        name: row["runs"][0]["forms"]["fused"]["of_port"]
        for name, row in recorded("detector")["sizes"].items()
    }
    small = [fused.pop(name) for name in ("atto", "femto", "pico", "n")]
    rest = fused.values()
    assert f"| {min(small):.2f} to {max(small):.2f}, {min(rest):.2f} to {max(rest):.2f} |" in README


@pytest.mark.parametrize("tuner", TUNERS)
def test_what_a_step_costs_with_a_tuner_on_the_backbone_is_shown(tuner: str) -> None:
    rows = recorded("backbone")["tuners"]
    row, whole = rows[tuner], rows["none"]
    saved = row["bytes"]["saved"]
    cells = [TUNERS[tuner], f"{row['trainable_in_backbone']:,}", mib(row["bytes"]["saved_by_backbone"])]
    cells += [mib(saved), f"{saved / whole['bytes']['saved']:.2f}", f"{row['time_of_none']:.2f}"]
    assert f"| {' | '.join(cells)} |" in BACKBONE
    shown = next(line for line in OF_BACKBONE.splitlines() if re.match(rf"\| {tuner}\b", line))
    ops = f"{row['ops']['forward']}/{row['ops']['backward']}"
    of_all = [mib(row["bytes"][what]) for what in ("saved", "saved_by_backbone", "resident")]
    end = [*of_all, ops, f"{row['seconds']:.2f}", f"{row['time_of_none']:.3f}"]
    assert shown.endswith(f"| {' | '.join(end)} |")


@pytest.mark.parametrize("tuner", TUNERS)
def test_what_is_learned_with_a_tuner_on_the_backbone_is_shown(tuner: str) -> None:
    row = recorded("detection_backbone")[tuner]
    (curve,) = row["curve_epoch_AP_AP50"]
    scores = [f"{score:.3f}" for _, score, _ in curve]
    scores[-1] = f"**{scores[-1]}**"
    classes = [f"{row['AP50_by_class'][name]:.3f}" for name in ("RBC", "WBC", "Platelets")]
    cells = [TUNERS[tuner], *scores, f"{row['AP50']:.3f}", *classes, f"{row['cpu_seconds']:.0f}"]
    assert f"| {' | '.join(cells)} |" in BACKBONE


def test_detectors_on_real_sets_are_shown_as_recorded() -> None:
    found = recorded("detection_real")
    page = (ROOT / "docs" / "results" / "detection.md").read_text(encoding="utf-8")

    def cells(*values: float) -> str:
        return " | ".join(f"{value:.3f}" for value in values)

    for name, methods in found["sets"].items():
        ours, port = methods["thawline"], methods["transformers"]
        assert ours["images"] == port["images"]
        shown = (
            f"| {ours['images']:,} | **{ours['AP']:.3f}** | {cells(ours['AP50'], port['AP'], port['AP50'])} |"
        )
        assert re.search(rf"^\| {name} \| .*{re.escape(shown)}$", page, re.MULTILINE)
    for result in found["ablation"]["bccd"].values():
        assert len(result["AP_of_seeds"]) == 2
        of_seeds = [
            ", ".join(f"{value:.3f}" for value in result[f"{key}_of_seeds"]) for key in ("AP", "AP50")
        ]
        assert f"| {of_seeds[0]} | {result['AP']:.3f} | {of_seeds[1]} | {result['AP50']:.3f} |" in page
    for name in ("nuts", "trees"):
        for tuner, title in (("frozen", "frozen"), ("paca", "PaCA"), ("none", "all trains")):
            result = found["few"][name][tuner]
            row = cells(result["AP"], result["AP50"], result["best_AP_on_the_way"])
            assert f"| {name} | {title} | {row} |" in page


def test_rows_of_the_recipe_study_are_shown_as_recorded() -> None:
    page = (ROOT / "docs" / "results" / "recipe.md").read_text(encoding="utf-8")
    rows = recorded("recipe")["table"]
    for row in rows:
        cells = [row[name] for name in ("data", "n_images", "size", "epochs")]
        cells += [f"`{row['arm']}`", row["seeds"]]
        scores = [f"{row[name]:.3f}" for name in ("AP", "raw_AP")]
        assert f"| {' | '.join(map(str, [*cells, *scores]))} |" in page
    assert len(re.findall(r"` \| \d+ \| ", page)) == len(rows)
