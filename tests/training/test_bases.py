"""Every base of docs/tuners/bases.md, tiny and random: trained, saved, loaded, merged and asked."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from thawline.recipe import Adapter, Lora, Mhr, Paca, TextBase
from thawline.training.text.base import on_text
from thawline.training.text.objective import head_of, loader_of
from thawline.tuners.build import attach_tuner

DOCS = Path(__file__).parents[2] / "docs/tuners/bases.md"
TUNERS = {"lora": Lora(r=2), "paca": Paca(r=2), "mhr": Mhr(r=2, n_skills=2)}
EXCLUDED = {("mamba", "lora"): ["out_proj"]}
"""Modules that PEFT refuses to adapt by LoRA, whose names it asks to leave out."""

COMMON = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = COMMON | {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = COMMON | {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_labels": 4,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 20, "num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": {**DECODER, "head_dim": 8},
    "gemma2": {**DECODER, "head_dim": 8},
    "gemma3": {
        "text_config": {**DECODER, "head_dim": 8, "sliding_window": 32},
        "vision_config": {
            "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_id": 60, "boi_token_index": 58, "eoi_token_index": 59,
    },
    "qwen2_5_vl": {
        "text_config": {
            **DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1],
                                              "rope_theta": 1e4},
        },
        "vision_config": {
            "depth": 1, "hidden_size": 24, "intermediate_size": 36, "num_heads": 4, "out_hidden_size": 24,
            "patch_size": 14, "fullatt_block_indexes": [0],
        },
        "image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57,
    },
    "phi3": DECODER,
    "gpt2": {**COMMON, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": DECODER,
    "opt": {**DECODER, "ffn_dim": 36, "word_embed_proj_dim": 24},
    "falcon": {**DECODER, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 36},
    "mixtral": {**DECODER, "num_local_experts": 3},
    "qwen3_moe": {**DECODER, **EXPERTS, "num_experts": 3, "head_dim": 8},
    "deepseek_v3": {
        **DECODER, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6, "v_head_dim": 6,
    },
    "gpt_oss": {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "mamba": {**DECODER, "state_size": 4, "time_step_rank": 4},
    "t5": {
        "vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 36, "num_layers": 2, "num_heads": 4,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    },
    "bart": {
        **COMMON, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36,
        "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    },
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": {**COMMON, "dim": 24, "hidden_dim": 36, "n_layers": 2, "n_heads": 4, "num_labels": 4},
}  # fmt: skip


def rows() -> dict[str, dict[str, str]]:
    """Return the table of the docs, by model type."""
    table = DOCS.read_text(encoding="utf-8").partition("## Bases that were tried")[2]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {kind.strip("`"): {"head": head, "left": left} for kind, _, head, left in cells}


def test_the_table_lists_the_bases_that_are_tried() -> None:
    assert set(rows()) == set(CONFIGS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_base_trains_saves_loads_merges_and_answers(kind: str, tmp_path: Path, caplog) -> None:
    row = rows()[kind]
    config = AutoConfig.for_model(kind, **copy.deepcopy(CONFIGS[kind]))
    torch.manual_seed(0)
    base = loader_of(row["head"], config).from_config(config).eval()
    base.config.architectures = [type(base).__name__]
    assert head_of(TextBase(model=kind), base.config) == row["head"]
    for method, settings in TUNERS.items():
        caplog.clear()
        settings = dataclasses.replace(settings, exclude_modules=EXCLUDED.get((kind, method)))
        with caplog.at_level(logging.WARNING):
            model, expected = trained(copy.deepcopy(base), settings, row["head"])
        told = [message for message in caplog.messages if "all-linear" in message or "No gradient" in message]
        assert bool(told) == (method in row["left"]), told
        folder = str(tmp_path / method)
        model.save_pretrained(folder)
        again = dataclasses.replace(settings, start_from=folder, exclude_modules=None)
        loaded = attach_tuner(copy.deepcopy(base), on_text(base, again), saved=True).eval()
        assert torch.equal(outputs(loaded, row["head"]), expected)
        assert torch.equal(answer(loaded, row["head"]), answer(model, row["head"]))
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(outputs(merged, row["head"]), expected, rtol=1e-4, atol=1e-4)


IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(1))


def batch(head: str) -> dict[str, Tensor]:
    labels = torch.tensor([0, 1, 3]) if head == "classifier" else IDS
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}


def trained(base: nn.Module, settings: Adapter, head: str) -> tuple[nn.Module, Tensor]:
    before = outputs(base, head)
    model = attach_tuner(base, on_text(base, settings)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**batch(head)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = outputs(model.eval(), head)
    assert not torch.equal(after, before)
    return model, after


def outputs(model: nn.Module, head: str) -> Tensor:
    with torch.no_grad():
        return model(**batch(head)).logits


def answer(model: nn.Module, head: str) -> Tensor:
    if head == "classifier":
        return outputs(model, head).argmax(-1)
    return model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
