"""Generated words and tasks about them: text datasets that need no download."""

from __future__ import annotations

__all__ = ["ALPHABET", "REWRITES", "TASKS", "make_rewrites", "make_rows", "make_word", "save_rows"]

import random
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from thawline.files import write_jsonl

VOWELS, CONSONANTS = "aeiou", "bdfgklmnprst"
SYLLABLES = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
ALPHABET = ("\n", " ", *"abcdefghijklmnopqrstuvwxyz")
"""All characters of words, questions and answers."""

TASKS: dict[str, tuple[tuple[str, ...], Callable[[str], str]]] = {
    "length": (("short", "long"), lambda word: "short" if len(word) == 4 else "long"),
    "end": (tuple(VOWELS), lambda word: word[-1]),
    "start": (tuple(CONSONANTS), lambda word: word[0]),
}
"""Question → its possible answers, and the function that gives the correct one."""

LETTERS: dict[str, Callable[[str], str]] = {
    "plain": lambda word: word,
    "round": lambda word: word.translate({ord(letter): "o" for letter in VOWELS}),
    "hard": lambda word: word.translate({ord(letter): "t" for letter in CONSONANTS}),
}
ENDINGS: dict[str, Callable[[str], str]] = {
    "whole": lambda word: word,
    "plural": lambda word: f"{word}s",
    "short": lambda word: word[:2],
}
REWRITES = tuple(f"{letters}-{ending}" for letters, ending in product(LETTERS, ENDINGS))[1:]
"""Eight tasks that rewrite a word, named by the change of its letters and of its ending: "round-plural" turns
banodi into bonodos. Each half is part of two or three tasks; plain-whole would change nothing."""


def make_word(rng: random.Random) -> str:
    """Draw a word of two or three syllables, such as "banodi"."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice([2, 3])))


def make_rows(task: str, n_train: int, n_test: int, rng: random.Random) -> list[dict[str, Any]]:
    """Draw rows of one of `TASKS` as `thawline train` reads them; no word occurs twice."""
    choices, answer = TASKS[task]
    rows = _rows(task, answer, n_train, n_test, rng)
    return [{**row, "input": f"{task} {row['input']}", "choices": list(choices)} for row in rows]


def make_rewrites(task: str, n_train: int, n_test: int, rng: random.Random) -> list[dict[str, Any]]:
    """Draw rows of one of `REWRITES`. The input is the word alone and does not tell the task."""
    letters, ending = task.split("-")
    return _rows(task, lambda word: ENDINGS[ending](LETTERS[letters](word)), n_train, n_test, rng)


def save_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of one task to <task>.jsonl in `folder`, which is created."""
    write_jsonl(folder / f"{rows[0]['task']}.jsonl", rows)


def _rows(
    task: str, answer: Callable[[str], str], n_train: int, n_test: int, rng: random.Random
) -> list[dict[str, Any]]:
    words: dict[str, None] = {}
    while len(words) < n_train + n_test:
        words[make_word(rng)] = None
    return [
        {"input": word, "output": answer(word), "task": task, "split": "train" if i < n_train else "test"}
        for i, word in enumerate(words)
    ]
