"""Few-shot splits: k examples per task, or per class of a task, drawn by a seed.

Both meanings of k are common: per task, whatever the classes (GPT-3, T-Few and their successors; the
default), or per class (LM-BFF, CrossFit's classification tasks). A task's draw depends only on the seed and
the task's name, so it does not change with the other tasks; 16 shots are among the 64 of the same seed.
"""

from __future__ import annotations

__all__ = ["few_shot"]

import random
from collections.abc import Sequence
from typing import Literal

from thawline.data.text.rows import Example
from thawline.errors import DataError


def few_shot(
    examples: Sequence[Example], k: int, *, per: Literal["task", "class"] = "task", seed: int = 0
) -> list[Example]:
    """Draw k examples per task, or per answer of every task, and return them in the order given.

    Raises: DataError: naming a task, or a class of it, with fewer than k examples.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault((example.task, example.answer if per == "class" else ""), []).append(i)
    drawn: list[int] = []
    for (task, answer), members in groups.items():
        if len(members) < k:
            which = f"task '{task}'" + (f", class {answer!r}," if per == "class" else "")
            raise DataError(
                f"{which} has {len(members)} examples to draw {k} shots from. Lower `data.shots`."
            )
        random.Random(f"{seed}/{task}/{answer}").shuffle(members)
        drawn += members[:k]
    return [examples[i] for i in sorted(drawn)]
