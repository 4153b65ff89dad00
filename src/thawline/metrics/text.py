"""How an answer in text is judged: one number a row, between 0 and 1, to be averaged over rows."""

from __future__ import annotations

__all__ = ["METRICS", "exact_match", "most_likely", "rouge_l"]

from collections.abc import Sequence
from functools import cache
from typing import Any

from thawline.errors import MissingExtraError

METRICS: dict[str, str] = {
    "loss": "mean negative log-likelihood of a learned token, in nats",
    "choice_accuracy": "the right choice has the highest log-likelihood a token",
    "exact_match": "the generated answer is the reference, but for white space around it",
    "rouge_l": "F-measure of the longest common subsequence of words, by rouge-score",
    "accuracy": "a classifier's highest logit is the right label",
}
"""Metric of text → what it measures."""


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where the texts are equal but for white space around them, else 0.0."""
    return float(prediction.strip() == reference.strip())


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin, 2004), without stemming.

    Raises: MissingExtraError: without the rouge-score library.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


def most_likely(log_likelihoods: Sequence[float], n_tokens: Sequence[int]) -> int:
    """Index of the choice with the highest mean log-likelihood a token; of equals the first.

    Dividing by length keeps a choice from losing for being long (GPT-3's rule; Brown et al., 2020).
    """
    means = [value / n for value, n in zip(log_likelihoods, n_tokens, strict=True)]
    return max(range(len(means)), key=means.__getitem__)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("Rouge-L", "rouge-score", "text") from error
    return RougeScorer(["rougeL"])
