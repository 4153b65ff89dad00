"""Few-shot splits: k examples of a task, or of each of its classes, drawn by a seed.

Both readings of k are the field's: per task, whatever the classes (GPT-3, T-Few and what follows them; the
default), or per class (LM-BFF, CrossFit's classification tasks). A task's draw depends on the seed and the
task's name alone, so it is the same whatever other tasks are there; and 16 shots are among the 64 of the
same seed.
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
    """Draw k examples of every task, or of every answer of every task, in the order given.

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
