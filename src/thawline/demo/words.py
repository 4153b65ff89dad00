"""Base model of the demos: a tiny Llama that has learned to spell made-up words, one token per character."""

from __future__ import annotations

__all__ = ["build_tokenizer", "pretrain", "save_base", "train"]

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thawline.demo.toy_tasks import ALPHABET, make_word
from thawline.recipe import RunConfig
from thawline.run import RunResult, run


def save_base(folder: Path, steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Create the base and its tokenizer, and write both to `folder`."""
    torch.set_num_threads(1)  # networks this small are several times faster on one
    tokenizer = build_tokenizer()
    base = pretrain(tokenizer, steps)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return base, tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of one token per character."""
    vocabulary = {token: i for i, token in enumerate(("</s>", "<unk>", *ALPHABET))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """Train a Llama of about 250,000 parameters on words, each repeated once."""
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


def train(
    name: str, folder: Path, tuner: dict[str, Any], *, data: dict[str, Any] | None = None, **training: Any
) -> RunResult:
    """Train the base in `folder` on the tasks there, by the same call as `thawline train`."""
    recipe = {
        "name": name,
        "folder": str(folder),
        "base": str(folder / "base"),
        "data": {"path": str(folder / "tasks"), "max_length": 32, **(data or {})},
        "tuner": tuner,
        "training": {"eval_every": "end", "save_every": "end", **training},
    }
    return run(RunConfig.from_mapping(recipe))
