"""A tokenizer, models of random weights and tasks to test with."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LETTERS = "abcd"
TASKS = {"first": lambda a, b: a, "last": lambda a, b: b, "swap": lambda a, b: b + a, "least": min}
"""What is asked of two letters; the third has no choices."""


def write_tasks(folder: Path) -> Path:
    """A file for each task, and a manifest that knows the choices of three of them."""
    for task, answer in TASKS.items():
        rows = [
            {"input": a + b, "output": answer(a, b), "split": "test" if a == b else "train"}
            for a in LETTERS
            for b in LETTERS
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = [
        {"task": task, "type": "choice", "choices": list(LETTERS)} for task in ("first", "last", "least")
    ]
    (folder / "manifest.json").write_text(json.dumps([*manifest, {"task": "swap", "type": "writing"}]))
    return folder


def save_tiny_bert(folder: Path) -> Path:
    """A BERT with random weights and a tokenizer of one token a byte."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_t5(folder: Path) -> Path:
    """A T5 with random weights and a tokenizer of one token a byte, which closes every text as T5's does."""
    from tokenizers import processors
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", pad_token_id=0, decoder_start_token_id=0,
        eos_token_id=tokenizer.eos_token_id, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer():
    """256 bytes and <pad> <s> </s>; <s> stands in front of every text, as with Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
