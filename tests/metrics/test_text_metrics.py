"""Metrics of text, by their closed forms."""

from __future__ import annotations

import sys

import pytest

from thawline.errors import MissingExtraError
from thawline.metrics import text
from thawline.metrics.text import exact_match, most_likely, rouge_l


def test_exact_match_looks_past_white_space_around_the_answer_only() -> None:
    assert exact_match(" Paris\n", "Paris") == 1.0
    assert exact_match("paris", "Paris") == 0.0
    assert exact_match("New  York", "New York") == 0.0


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # LCS of "the cat sat" and "the cat on the mat sat" is 3 words: precision 3/3, recall 3/6, F = 2/3.
    assert rouge_l("the cat sat", "the cat on the mat sat") == pytest.approx(2 / 3)
    assert rouge_l("", "the cat") == 0.0


def test_the_likeliest_choice_is_judged_by_the_token() -> None:
    assert most_likely([-2.0, -3.0], [1, 3]) == 1
    assert most_likely([-2.0, -3.0], [1, 1]) == 0
    assert most_likely([-1.0, -1.0], [1, 1]) == 0


def test_rouge_l_names_the_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    text._rouge_scorer.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'thawline\[text\]'"):
        rouge_l("a", "a")
