"""Bytes, operations and step times of the tuners side by side, with gates that a slower tuner would trip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import thawline.bench.cases as cases
from tests.support.bench_cases import reference
from thawline.bench import tuners
from thawline.bench.cases import CASES

CPU = torch.device("cpu")


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
    record = tuners.measure_case(case, device=CPU, rounds=0, methods=("floor", "paca", "paca_lean"))
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
            case, device=CPU, rounds=8, methods=("floor", "lora", "paca", "paca_lean")
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
    # Without bf16 in hardware a product of the case's 8 × 256 tokens takes a second.
    case = replace(CASES["skills-linear"], batch=lambda: {"x": torch.randn(8, 32, 1024)})
    variants = ("floor", "poly", "mhr")
    rows = tuners.measure_case(case, device=CPU, rounds=0, methods=variants)["variants"]
    of_the_loss = rows["floor"]["ops"]["forward"] - 1
    assert rows["mhr"]["ops"]["forward"] - of_the_loss <= 12
    output = x = 2**19
    # The factors mixed for 8 tasks are 0.25 MiB; the rest grows with the tokens, to 0.35 MiB at 8 × 256.
    assert rows["mhr"]["memory"]["saved"] - output - x <= 0.32 * 2**20
    assert rows["poly"]["ops"]["waits"] > rows["mhr"]["ops"]["waits"] == 0


@pytest.mark.parametrize(
    ("case", "rounds", "gates"),
    [("skills-small", 9, {"lora": 1.30, "poly": 0.55}), ("skills-decoding-small", 3, {"lora": 1.20})],
)
def test_a_step_of_mhr_stays_near_loras_where_launches_decide(case, rounds, gates):
    """Goals 1.15 and 0.50, writing 1.10. One median in six goes astray on a crowded machine."""
    seen = []
    for _ in range(3):
        record = tuners.measure_case(CASES[case], device=CPU, rounds=rounds, methods=(*gates, "mhr"))
        took = record["variants"]["mhr"]["time"]["cpu"]
        seen.append({peer: took[f"of_{peer}"] for peer in gates})
        if all(seen[-1][peer] <= gate for peer, gate in gates.items()):
            return
    pytest.fail(f"{seen} in three measurements: expected at most {gates}")
