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
from thawline.bench import tuners, vision
from thawline.bench.cases import CASES
from thawline.bench.variants import VARIANTS, attach
from thawline.errors import ConfigError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
RESULTS, PERFORMANCE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"


def reference(layers: int, batch: int, length: int) -> cases.Case:
    """The reference case at its true widths, shorter and shallower."""
    return replace(
        CASES["reference"],
        build=cases._llama(hidden=512, mlp=1408, layers=layers, heads=8, kv_heads=8, vocab=512),
        batch=cases._tokens(vocab=512, batch=batch, length=length),
    )


@pytest.fixture(scope="module")
def memory() -> dict[str, dict[str, int]]:
    record = tuners.measure_case(reference(layers=2, batch=1, length=32), device=CPU, rounds=0)
    return {name: row | row["memory"] for name, row in record["variants"].items()}


def test_paca_keeps_the_chosen_columns_and_nothing_else_beyond_the_floor(memory):
    tokens, r, linears = 32, 16, 2 * 7
    assert memory["paca"]["saved"] - memory["floor"]["saved"] == tokens * r * linears * 4
    assert memory["paca"]["saved"] <= 1.02 * memory["floor"]["saved"]
    assert memory["paca"]["saved"] <= 0.80 * memory["lora"]["saved"]


def test_lean_blocks_bring_paca_below_the_floor(memory):
    assert memory["paca_lean"]["saved"] <= 0.85 * memory["floor"]["saved"]


def test_lean_blocks_keep_two_thirds_in_bf16_at_the_proportions_of_the_8b():
    block = cases._llama(hidden=512, mlp=1792, layers=1, heads=8, kv_heads=2, vocab=64, trunk=True)
    batch = cases._tokens(vocab=64, batch=1, length=8)
    case = replace(CASES["bf16-8b-proportions"], build=block, batch=batch)
    record = tuners.measure_case(case, device=CPU, rounds=0, variants=("floor", "paca", "paca_lean"))
    saved = {name: row["memory"]["saved_of_floor"] for name, row in record["variants"].items()}
    assert saved["paca"] <= 1.02
    assert saved["paca_lean"] <= 0.70


def test_counts_are_those_of_the_method(memory):
    per_block = 4 * (512 + 512) + 2 * (512 + 1408) + (1408 + 512)
    assert memory["lora"]["trainable"] == 2 * 8 * per_block
    assert memory["paca"]["trainable"] == 2 * 16 * (4 * 512 + 2 * 1408 + 512)
    assert memory["floor"]["trainable"] == memory["floor"]["gradients"] == 0
    assert memory["full"]["gradients"] == 4 * memory["full"]["trainable"]
    # Weights and AdamW's two moments; the batch and the optimiser's step counters are the rest.
    rest = memory["full"]["resident"] - 3 * memory["full"]["gradients"]
    assert 0 < rest < 50_000


def test_lean_blocks_add_no_operation(memory):
    stock, lean = memory["paca"]["ops"], memory["paca_lean"]["ops"]
    assert lean["forward"] <= stock["forward"]
    assert lean["backward"] < stock["backward"]


def test_a_step_of_paca_costs_little_more_than_the_floor_and_less_than_one_of_lora():
    """Invariant 14: process time at the reference case's widths and batch; fewer tokens time Python instead.
    Goals 1.06 × floor, 0.88 × LoRA, lean 1.03 × PaCA; the gates stand 0.05 above. One median in six goes
    astray on a crowded machine."""
    gates = {"paca of floor": 1.11, "paca of lora": 0.93, "lean of paca": 1.08}
    case, seen = reference(layers=1, batch=4, length=256), []
    for _ in range(3):
        rows = tuners.measure_case(
            case, device=CPU, rounds=8, variants=("floor", "lora", "paca", "paca_lean")
        )["variants"]
        paca, lean = (rows[name]["time"]["cpu"] for name in ("paca", "paca_lean"))
        seen.append(
            {
                "paca of floor": paca["of_floor"],
                "paca of lora": paca["of_lora"],
                "lean of paca": lean["of_floor"] / paca["of_floor"],
            }
        )
        if all(seen[-1][what] <= gate for what, gate in gates.items()):
            return
    pytest.fail(f"{seen} in three measurements: expected at most {gates}")


def test_mhr_on_one_linear_is_few_operations_and_keeps_no_copy_of_the_input():
    rows = tuners.measure_case(CASES["skills-linear"], device=CPU, rounds=0)["variants"]
    of_the_loss = rows["floor"]["ops"]["forward"] - 1
    assert rows["mhr"]["ops"]["forward"] - of_the_loss <= 12
    output = x = 4 * 2**20
    assert rows["mhr"]["memory"]["saved"] - output - x <= 0.35 * 2**20
    assert rows["poly"]["ops"]["waits"] > rows["mhr"]["ops"]["waits"] == 0


@pytest.mark.parametrize(
    ("case", "rounds", "gates"),
    [("skills-small", 9, {"lora": 1.30, "poly": 0.55}), ("skills-decoding-small", 3, {"lora": 1.20})],
)
def test_a_step_of_mhr_stays_near_loras_where_launches_decide(case, rounds, gates):
    """Goals 1.15 and 0.50, writing 1.10. One median in six goes astray on a crowded machine."""
    seen = []
    for _ in range(3):
        record = tuners.measure_case(CASES[case], device=CPU, rounds=rounds, variants=(*gates, "mhr"))
        took = record["variants"]["mhr"]["time"]["cpu"]
        seen.append({peer: took[f"of_{peer}"] for peer in gates})
        if all(seen[-1][peer] <= gate for peer, gate in gates.items()):
            return
    pytest.fail(f"{seen} in three measurements: expected at most {gates}")


def test_every_variant_but_the_floor_learns():
    case = reference(layers=1, batch=1, length=8)
    for name in case.variants:
        run = tuners._Run.start(name, case, CPU)
        losses = [float(run.loss().detach())]
        for _ in range(4):
            run.step()
        losses.append(float(run.loss().detach()))
        assert (losses[1] < losses[0]) == (name != "floor"), name


@pytest.mark.parametrize("name", CASES)
def test_every_case_can_be_built_and_its_targets_name_layers(name):
    case = CASES[name]
    assert set(case.variants) <= VARIANTS.keys()
    assert case.variants[0] == "floor"
    with torch.device("meta"):
        model = case.build()
    model.get_submodule(case.adapt.entry)
    if case.adapt.targets != "all-linear":
        matched = [type(m) for n, m in model.named_modules() if re.fullmatch(case.adapt.targets, n)]
        assert matched
        assert set(matched) <= {nn.Linear, nn.Conv2d}


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
    assert list(rows) == list(CASES["vit"].variants)
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
    with pytest.raises(ConfigError, match=r"Unknown variant 'lorra'.*Did you mean 'lora'"):
        attach("lorra", nn.Linear(2, 2), CASES["vit"].adapt)
    with pytest.raises(ConfigError, match="needs a GPU.*'cpu'"):
        tuners.measure_case(CASES["8b-blocks"], device=CPU, rounds=0)
