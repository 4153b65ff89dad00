"""A base to adapt: a tiny Llama that has learned to spell made-up words, a token a character."""

from __future__ import annotations

__all__ = ["build_tokenizer", "pretrain", "save_base"]

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thawline.demo.toy_tasks import ALPHABET, make_word


def save_base(folder: Path, steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Make the base and its tokenizer, and write both to `folder`."""
    torch.set_num_threads(1)  # networks this small are several times faster so
    tokenizer = build_tokenizer()
    base = pretrain(tokenizer, steps)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return base, tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(("</s>", "<unk>", *ALPHABET))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """A Llama of some 250,000 parameters that has read words, each twice."""
    torch.manual_seed(0)
    rng = random.Random(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    progress = tqdm(range(steps), unit="step", desc="pretraining")
    for step in progress:
        words = [make_word(rng) for _ in range(32)]
        batch = tokenizer([f"{word}\n{word}" for word in words], padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")
    return model
