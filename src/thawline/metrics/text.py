"""Metrics of text answers: one number per row, between 0 and 1, to be averaged over rows."""

from __future__ import annotations

__all__ = ["METRICS", "exact_match", "most_likely", "rouge_l"]

from collections.abc import Sequence
from functools import cache
from typing import Any

from thawline.errors import requires_extra

METRICS = ("loss", "choice_accuracy", "exact_match", "rouge_l", "accuracy")
"""Names of the metrics of text; `thawline list metrics` explains them."""


def exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 if the texts are equal apart from surrounding white space, else 0.0."""
    return float(prediction.strip() == reference.strip())


def rouge_l(prediction: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words (Lin, 2004), without stemming.

    Raises: MissingExtraError: without the rouge-score library.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


def most_likely(log_likelihoods: Sequence[float], n_tokens: Sequence[int]) -> int:
    """Return the index of the choice with the highest mean log-likelihood per token; the first of equals.

    Dividing by length keeps long choices from losing for their length (GPT-3's rule; Brown et al., 2020).
    """
    means = [value / n for value, n in zip(log_likelihoods, n_tokens, strict=True)]
    return max(range(len(means)), key=means.__getitem__)


@cache
def _rouge_scorer() -> Any:
    with requires_extra("Rouge-L", "rouge-score", "text"):
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(["rougeL"])
