"""Choices as `thawline list` shows them, held to the tables that implement them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import pytest

from thawline.data.text.multitask import SAMPLING
from thawline.data.text.rows import FORMATS
from thawline.errors import ConfigError
from thawline.metrics.text import METRICS
from thawline.recipe import CHOICES, OBJECTIVES, TUNERS, Mhr, Paca, TextData, list_choices
from thawline.recipe.values import field_types
from thawline.tuners.mhr.routing import ROUTERS
from thawline.tuners.paca.selection import SELECTIONS

TABLES: dict[str, Iterable[str]] = {
    "tuners": TUNERS,
    "selections": SELECTIONS,
    "objectives": OBJECTIVES,
    "formats": FORMATS,
    "metrics": METRICS,
    "sampling": SAMPLING,
    "routers": ROUTERS,
}
FIELDS = {"selections": (Paca, "selection"), "sampling": (TextData, "sampling"), "routers": (Mhr, "router")}


@pytest.mark.parametrize("topic", CHOICES)
def test_choices_are_those_of_the_implementing_table(topic: str) -> None:
    assert set(CHOICES[topic]) == set(TABLES[topic])
    assert all(CHOICES[topic].values())


@pytest.mark.parametrize("topic", FIELDS)
def test_a_recipes_field_takes_exactly_the_choices(topic: str) -> None:
    section, field = FIELDS[topic]
    assert set(get_args(field_types(section)[field])) == set(CHOICES[topic])


def test_a_format_may_also_be_detected() -> None:
    assert set(get_args(field_types(TextData)["format"])) == {"auto", *CHOICES["formats"]}


def test_topics_are_listed_by_name() -> None:
    assert list_choices("routers") == {"routers": CHOICES["routers"]}
    assert list_choices() == CHOICES
    with pytest.raises(ConfigError, match="Unknown topic 'router'.*Did you mean 'routers'"):
        list_choices("router")
