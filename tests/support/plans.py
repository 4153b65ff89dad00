"""Recipes to plan: bases that are a config.json alone, small in every direction."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import transformers

ROWS, LENGTH = 2, 12
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
HEADS = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "LlamaForCausalLM": partial(transformers.LlamaConfig, **HEADS),
    "Qwen2ForCausalLM": partial(transformers.Qwen2Config, **SIZES, num_key_value_heads=2),
    "Qwen3ForCausalLM": partial(transformers.Qwen3Config, **HEADS),
    "Gemma2ForCausalLM": partial(transformers.Gemma2Config, **HEADS, sliding_window=6),
    "Gemma3ForCausalLM": partial(transformers.Gemma3TextConfig, **HEADS, sliding_window=6),
    "GPT2LMHeadModel": partial(transformers.GPT2Config, vocab_size=97, n_embd=32, n_head=4),
    "BertForSequenceClassification": partial(transformers.BertConfig, **SIZES),
    "RobertaForSequenceClassification": partial(transformers.RobertaConfig, **SIZES),
    "T5ForConditionalGeneration": partial(
        transformers.T5Config,
        vocab_size=97,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "MixtralForCausalLM": partial(transformers.MixtralConfig, **HEADS, num_local_experts=4),
}


def base(tmp_path: Path, architecture: str = "LlamaForCausalLM", n_blocks: int = 2, **fields: object) -> str:
    """A folder with config.json alone."""
    if architecture.startswith("T5"):
        fields["num_decoder_layers"] = n_blocks
    config = CONFIGS[architecture](num_hidden_layers=n_blocks, **fields)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path / f"{architecture}-{n_blocks}")
    return str(tmp_path / f"{architecture}-{n_blocks}")


def recipe(model: str, **sections: object) -> dict:
    return {
        "base": {"model": model, "dtype": "float32"},
        "data": {"path": "elsewhere.jsonl", "max_length": LENGTH},
        "training": {"batch_size": ROWS},
        **sections,
    }
