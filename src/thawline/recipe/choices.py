"""Everything there is to choose from, as plain text: what `thawline list` shows.

The tables that hold the implementations import torch or PEFT, and `thawline list` must answer at once; so the
names stand here as well, and tests/test_choices.py holds each topic to its table.
"""

from __future__ import annotations

__all__ = ["CHOICES", "list_choices"]

from thawline.errors import ConfigError, did_you_mean
from thawline.recipe.run import OBJECTIVES
from thawline.recipe.tuners import TUNERS


def _summaries(table: dict[str, type]) -> dict[str, str]:
    return {name: (kind.__doc__ or "").partition("\n")[0] for name, kind in table.items()}


CHOICES: dict[str, dict[str, str]] = {
    "tuners": _summaries(TUNERS),
    "selections": {
        "random": "columns drawn without replacement, by the seed and the layer's name alone",
        "adjacent": "a random block of adjacent columns: adapters are switched many times faster",
        "weight_norm": "columns of the weight with the largest L2 norm",
        "activation": "columns whose inputs have the largest sum of squares over a few batches",
        "gradient": "columns whose gradient has the largest sum of squares over a few batches",
        "explicit": "columns listed in `tuner.indices`",
    },
    "objectives": _summaries({name: sections["objective"] for name, sections in OBJECTIVES.items()}),
    "formats": {
        "messages": "chats: rows with `messages`",
        "conversations": "ShareGPT's chats: rows with `conversations`",
        "prompt-completion": "rows with `prompt` and `completion`",
        "instruction": "rows with `instruction` and `output`, perhaps `input`",
        "input-output": "rows with `input` and `output`, perhaps `choices`",
        "text": "plain text: rows with `text`",
    },
    "metrics": {
        "loss": "mean negative log-likelihood of a learned token, in nats",
        "choice_accuracy": "share of rows whose right choice has the highest log-likelihood per token",
        "exact_match": "share of generated answers equal to the reference, white space around them aside",
        "rouge_l": "F-measure of the longest common subsequence of words, by rouge-score",
        "accuracy": "share of rows whose right label has the classifier's highest logit",
    },
    "sampling": {
        "each": "every row once an epoch",
        "size": "tasks in proportion to their number of rows",
        "temperature": "tasks in proportion to their number of rows to the power of 1 / temperature",
        "equal": "all tasks equally often",
    },
    "routers": {
        "learned": "a logit per task, head and skill; weights are sigmoids, normalised over a head's skills",
        "uniform": "every skill counts the same for every task; no task ids are needed",
        "private": "one skill per task: separate LoRAs",
        "random": "each head of each task averages a fixed random subset of the skills",
    },
}
"""Topic → choice → one line about it."""


def list_choices(*topics: str) -> dict[str, dict[str, str]]:
    """Return the choices of the given topics, or of all: topic → choice → one line about it.

    Raises: ConfigError: for an unknown topic.
    """
    for topic in topics:
        if topic not in CHOICES:
            raise ConfigError(f"Unknown topic '{topic}'. {did_you_mean(topic, CHOICES)}")
    return {topic: CHOICES[topic] for topic in topics or CHOICES}
