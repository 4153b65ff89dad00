"""Made-up words and tasks about them: something to learn where there is neither data nor network."""

from __future__ import annotations

__all__ = ["ALPHABET", "TASKS", "make_rows", "make_word"]

import random
from collections.abc import Callable
from typing import Any

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
ALPHABET = ("\n", " ", *"abcdefghijklmnopqrstuvwxyz")
"""Every character that words, questions and answers are made of."""

TASKS: dict[str, tuple[tuple[str, ...], Callable[[str], str]]] = {
    "length": (("short", "long"), lambda word: "short" if len(word) == 4 else "long"),
    "end": (tuple("aeiou"), lambda word: word[-1]),
    "start": (tuple(sorted("bdfgklmnprst")), lambda word: word[0]),
}
"""Question → its possible answers, and the right one for a word."""


def make_word(rng: random.Random) -> str:
    """Two or three syllables, such as "banodi"."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice([2, 3])))


def make_rows(task: str, n_train: int, n_test: int, rng: random.Random) -> list[dict[str, Any]]:
    """Rows of one task as `thawline train` reads them; no word is asked about twice."""
    choices, answer = TASKS[task]
    words: dict[str, None] = {}
    while len(words) < n_train + n_test:
        words[make_word(rng)] = None
    return [
        {
            "input": f"{task} {word}",
            "output": answer(word),
            "choices": list(choices),
            "task": task,
            "split": "train" if i < n_train else "test",
        }
        for i, word in enumerate(words)
    ]
