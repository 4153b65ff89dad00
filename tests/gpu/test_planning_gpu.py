"""Plans against what a step allocates on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import thawline
from thawline.planning.plan import Planner
from thawline.recipe import RunConfig
from thawline.tuners.build import attach_tuner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.filterwarnings("ignore:apply_lean")
@pytest.mark.parametrize(
    ("tuner", "lean"), [("none", False), ("lora", False), ("paca", False), ("paca", True)]
)
def test_peak_memory_of_a_step_is_within_a_tenth(tmp_path: Path, tuner: str, lean: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=8, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    recipe = {
        "base": {"model": str(tmp_path), "dtype": "bfloat16"},
        "data": {"path": "elsewhere.jsonl", "max_length": 512},
        "tuner": tuner,
        "lean": lean,
        "training": {"batch_size": 4, "precision": "fp32"},
    }
    run = RunConfig.from_mapping(recipe)
    planned = Planner(run, device="cuda").bytes()
    before = torch.cuda.memory_allocated()
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    if lean:
        thawline.apply_lean(model, loss=True)
    model = attach_tuner(model, run.tuner).train().cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(32000, (4, 512), device="cuda")
    for _ in range(2):  # the state of the optimiser comes with the first
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before
    assert planned["total"] - planned["overhead"] == pytest.approx(peak, rel=0.1)
