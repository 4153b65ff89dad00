"""The tuners' bench on small shapes: exact bytes, its files, and gates that a slower PaCA would trip."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

import thawline.bench.cases as cases
import vision
from tests.support.bench_cases import reference
from thawline.bench import tuners
from thawline.bench.cases import CASES
from thawline.bench.methods import METHODS, attach
from thawline.errors import ConfigError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
RESULTS, PERFORMANCE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"


def test_every_variant_but_the_floor_learns():
    case = reference(layers=1, batch=1, length=8)
    for name in case.methods:
        run = tuners._Run.start(name, case, CPU)
        losses = [float(run.loss().detach())]
        for _ in range(4):
            run.step()
        losses.append(float(run.loss().detach()))
        assert (losses[1] < losses[0]) == (name != "floor"), name


@pytest.mark.parametrize("name", CASES)
def test_every_case_can_be_built_and_its_targets_name_layers(name):
    case = CASES[name]
    assert set(case.methods) <= METHODS.keys()
    assert case.methods[0] == "floor"
    with torch.device("meta"):
        model = case.build()
    model.get_submodule(case.adapt.entry)
    if case.adapt.targets != "all-linear":
        matched = [type(m) for n, m in model.named_modules() if re.fullmatch(case.adapt.targets, n)]
        assert matched
        assert {kind.__name__ for kind in matched} <= {"Linear", "Conv2d", "Qwen3MoeExperts"}


@pytest.mark.parametrize("variant", ["floor", "full", "lora", "paca"])
@pytest.mark.parametrize("network", vision.NETWORKS)
def test_a_new_head_is_trained_beside_every_tuner(network, variant):
    adapt = replace(CASES[network].adapt, head="head")
    model = attach(variant, CASES[network].build(), adapt)
    heads = [n for n, p in model.named_parameters() if p.requires_grad and "head" in n]
    assert len(heads) == 2
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or all_) for all_ in (1, 0)
    )
    assert (trained == total) == (variant == "full")


def test_the_command_prints_the_table_it_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        CASES, "vit", replace(CASES["vit"], batch=cases._images(classes=10, batch=2, size=32))
    )
    out = tmp_path / "results" / "vit.json"
    assert tuners.main(["--case", "vit", "--rounds", "2", "--device", "cpu", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["machine"]["torch"] == version("torch")
    rows = written["cases"]["vit"]["variants"]
    assert list(rows) == list(CASES["vit"].methods)
    assert rows["floor"]["time"]["cpu"]["of_floor"] == 1.0
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert re.search(rf"\| {name} \|.*\| {row['ops']['forward']}/{row['ops']['backward']} \|", printed)


def test_the_vision_command_adapts_to_another_domain(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vision, "N_TRAIN", 32)
    monkeypatch.setattr(vision, "N_VALIDATION", 16)
    monkeypatch.setattr(vision, "N_TEST", 16)
    monkeypatch.setattr(vision, "RATES", (1e-3, 1e-2))
    out = tmp_path / "vision.json"
    flags = ["--network", "convnet", "--seeds", "1", "--pretrain-steps", "2", "--adapt-steps", "2"]
    assert vision.main([*flags, "--device", "cpu", "--out", str(out)]) == 0
    record = json.loads(out.read_text())["networks"]["convnet"]
    assert list(record["methods"]) == ["head", "full", "lora", "paca"]
    assert all(0 <= row["test_mean"] <= 1 for row in record["methods"].values())
    assert "| paca |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["reference", "bf16-8b-proportions", "complaints", "vision-cost"])
def test_the_docs_show_the_recorded_tables_and_the_command_that_made_them(name):
    text = PERFORMANCE.read_text()
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert f"`benchmarks/results/{name}.json`" in text
    assert results["command"].removeprefix("python -m thawline.bench.tuners ") in " ".join(text.split())
    for record in results["cases"].values():
        for row in tuners._table(record).splitlines():
            assert row in text


def test_the_recorded_runs_reach_the_goals():
    reference, half = (
        json.loads((RESULTS / f"{name}.json").read_text())["cases"][name]
        for name in ("reference", "bf16-8b-proportions")
    )
    assert reference["rounds"] >= 10
    rows = reference["variants"]
    took = {name: row["time"]["cpu"] for name, row in rows.items()}
    assert took["paca"]["of_floor"] <= 1.06
    assert took["paca"]["of_lora"] <= 0.88
    assert took["paca_lean"]["of_floor"] <= 1.03 * took["paca"]["of_floor"]
    saved = {name: row["memory"]["saved_of_floor"] for name, row in rows.items()}
    assert saved["paca"] <= 1.02
    assert saved["paca_lean"] <= 0.85
    assert half["variants"]["paca_lean"]["memory"]["saved_of_floor"] <= 0.70
    blocks = 8
    added = {way: rows["paca"]["ops"][way] - rows["floor"]["ops"][way] for way in ("forward", "backward")}
    assert added["forward"] <= 7 * blocks
    assert added["backward"] <= 16 * blocks


def test_unknown_variants_and_a_missing_gpu_are_refused_with_what_would_work():
    with pytest.raises(ConfigError, match=r"Unknown method 'lorra'.*Did you mean 'lora'"):
        attach("lorra", nn.Linear(2, 2), CASES["vit"].adapt)
    with pytest.raises(ConfigError, match="needs a GPU.*'cpu'"):
        tuners.measure_case(CASES["8b-blocks"], device=CPU, rounds=0)
