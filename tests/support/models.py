"""Tiny models with random weights; every size differs from every other."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

VOCAB = 61
transformers_loads_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers' own adapter methods ask for PEFT {MIN_PEFT_VERSION}",
)


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two blocks in training mode, with `changes` to its config."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=36, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0, is_encoder_decoder=True,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=1, n_head=4, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))


def gpt_oss() -> GptOssForCausalLM:
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=3, head_dim=6, num_experts_per_tok=2))
