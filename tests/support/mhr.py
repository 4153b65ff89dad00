"""Tiny models for the MHR tests; every size differs from every other."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from thawline import MHRConfig

VOCAB = 61


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **{**sizes, **changes},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


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


def config(**changes: Any) -> MHRConfig:
    """Three tasks, five skills, two heads; B random, so that tasks differ."""
    fields = {"r": 3, "alpha": 6, "n_tasks": 3, "n_skills": 5, "n_heads": 2, "routing_init": 2.0}
    return MHRConfig(**{**fields, "target_modules": "all-linear", "init_weights": False, **changes})


def routed(base: nn.Module | None = None, seed: int = 1, **changes: Any) -> PeftModel:
    """A tiny Llama, or `base`, with MHR around every linear."""
    base = tiny_llama() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, config(**changes)).eval()


def tokens(rows: int = 3, length: int = 7, seed: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, input_ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **inputs).logits


def one_linear(size: int = 64, length: int = 16, **changes) -> tuple[nn.Module, Tensor]:
    """A linear in bf16, a batch of 8 rows, r = 8, S = 8, H = 8."""
    base = nn.Sequential(nn.Linear(size, size, bias=False)).to(torch.bfloat16)
    fields = {"r": 8, "n_tasks": 8, "n_skills": 8, "n_heads": 8, "target_modules": ["0"], **changes}
    model = get_peft_model(base, config(**fields)).train()
    return model, torch.randn(8, length, size, dtype=torch.bfloat16, requires_grad=True)
