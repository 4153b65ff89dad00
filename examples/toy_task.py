"""Make a small pretrained base and a task, to try the command line with, offline: `toy_task.py [FOLDER]`.

The base is a tiny Llama that has learned to spell words; its new task: is a word short or long?
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYLLABLES = [c + v for c in "bdfgklmnprst" for v in "aeiou"]


def make_word(rng: random.Random) -> str:
    """Two or three syllables."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice([2, 3])))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    tokens = ["</s>", "<unk>", "\n", *"abcdefghijklmnopqrstuvwxyz"]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, rng: random.Random, steps: int = 150) -> LlamaForCausalLM:
    """A few seconds of reading words, each twice."""
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.05, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        words = [f"{word}\n{word}" for word in (make_word(rng) for _ in range(32))]
        rows = tokenizer(words, padding=True, return_tensors="pt")
        model(**rows, labels=rows.input_ids.masked_fill(rows.attention_mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


torch.manual_seed(0)
rng, folder = random.Random(0), Path(sys.argv[1] if len(sys.argv) > 1 else "toy")
tokenizer = build_tokenizer()
pretrain(tokenizer, rng).save_pretrained(folder / "base")
tokenizer.save_pretrained(folder / "base")
with (folder / "length.jsonl").open("w") as file:
    for i in range(600):
        word = make_word(rng)
        row = {"input": word, "output": "short" if len(word) == 4 else "long", "choices": ["short", "long"]}
        file.write(json.dumps({**row, "split": "train" if i < 500 else "test"}) + "\n")
print(f"{folder}/base: a pretrained model; {folder}/length.jsonl: 500 rows to learn, 100 held out")
