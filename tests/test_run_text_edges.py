"""Text runs on files, tokenizers and bases as people have them: what works, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.text import byte_tokenizer
from tests.support.text_runs import TextRecipes
from thawline.run import run

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_llama(folder: Path, tokenizer) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, *rows: object) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


def test_a_model_trained_on_chats_is_saved_with_the_end_of_its_turns(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    chat = [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": "blue"}]
    data = write_rows(tmp_path / "chats.jsonl", {"messages": chat})
    recipe = TextRecipes(save_llama(tmp_path / "base", tokenizer), data, tmp_path / "runs")
    result = run(recipe("chats", "none", max_steps=1))
    saved = GenerationConfig.from_pretrained(result.folder / "model").eos_token_id
    assert set(saved) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
