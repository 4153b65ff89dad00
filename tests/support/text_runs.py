"""Short text runs on a tiny Llama, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thawline.recipe import RunConfig
from thawline.training.text.objective import TextObjective

LORA = {"method": "lora", "r": 2, "dropout": 0.2}


def write_first_letters(file: Path) -> str:
    """Say the first letter of two: 12 rows to learn, 4 held out."""
    lines = [
        {"input": a + b, "output": a, "choices": list("abcd"), "split": "test" if a == b else "train"}
        for a in "abcd"
        for b in "abcd"
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


class TextRecipes:
    """Recipes of 12 steps, 4 rows each, with dropout, so that random state matters."""

    def __init__(self, base: Path, data: str, runs: Path) -> None:
        self.base, self.data, self.runs = base, data, runs

    def __call__(self, name: str, tuner: object = None, **training: object) -> RunConfig:
        steps = {"log_every": 2, "eval_every": 4, "save_every": 4, "epochs": 4, "batch_size": 4, "lr": 1e-2}
        return RunConfig.from_mapping(
            {
                "name": name,
                "folder": str(self.runs),
                "base": str(self.base),
                "data": self.data,
                "tuner": tuner or LORA,
                "training": {**steps, **training},
            }
        )


def logged(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def strict_json(*files: Path) -> list:
    """Read JSON values of files, one per line in .jsonl, as a strict reader does: no NaN, no Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    texts = [
        line
        for file in files
        for line in (file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()])
    ]
    return [json.loads(text, parse_constant=refuse) for text in texts]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = next((folder / "model").glob("*model.safetensors"))
    return load_file(file)


def stop_at_batch(monkeypatch: pytest.MonkeyPatch, n: int, stop) -> None:
    """Call `stop` when the n-th training batch is made, in step n − 2: one is the plan's, one is ahead."""
    collate, made = TextObjective.collate, 0

    def counting(self, rows):
        nonlocal made
        if all(row in self.train_rows for row in rows):
            made += 1
            if made == n:
                stop()
        return collate(self, rows)

    monkeypatch.setattr(TextObjective, "collate", counting)
