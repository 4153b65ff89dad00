"""The table of an evaluation: every line followed by what it started from."""

from __future__ import annotations

import pytest

from thawline.tables import aligned, evaluation_rows, evenly_spaced


def test_every_line_is_followed_by_what_it_started_from() -> None:
    parts = {"a": {"rows": 2, "loss": 1.0, "acc": 0.5}, "b": {"rows": 6, "loss": 3.0}}
    metrics = {"loss": 2.5, "acc": 0.5, "macro_loss": 2.0, "macro_acc": 0.5}
    before = {"a": {"rows": 2, "loss": 4.0, "acc": 0.0}, "b": {"rows": 6, "loss": 6.0}}
    start = {"name": "zero-shot", "metrics": {"loss": 5.5, "acc": 0.0}, "parts": before}
    plain = [
        ["task", "rows", "loss", "acc"],
        ["a", 2, 1.0, 0.5],
        ["b", 6, 3.0, None],
        ["mean over tasks", None, 2.0, 0.5],
        ["all rows", 8, 2.5, 0.5],
    ]
    assert evaluation_rows(metrics, parts) == plain
    header, *rows = evaluation_rows(metrics, parts, start)
    assert [header, *rows[::2]] == plain
    assert rows[1::2] == [
        ["  zero-shot", None, 4.0, 0.0],
        ["  zero-shot", None, 6.0, None],
        ["  zero-shot", None, 5.0, 0.0],
        ["  zero-shot", None, 5.5, 0.0],
    ]


def test_one_part_has_no_mean_and_a_start_without_a_name_is_a_start() -> None:
    parts = {"a": {"rows": 2, "loss": 1.0}}
    start = {"metrics": {"loss": 4.0}, "parts": {"a": {"rows": 2, "loss": 4.0}}}
    rows = evaluation_rows({"loss": 1.0}, parts, start)
    assert rows == [["task", "rows", "loss"], ["a", 2, 1.0], ["  at start", None, 4.0]]


def test_classes_of_objects_are_called_so() -> None:
    rows = evaluation_rows({"AP": 0.5}, {"cell": {"AP": 0.25}, "rod": {"AP": 0.75}})
    assert [row[0] for row in rows] == ["class", "cell", "rod", "mean over classes", "all rows"]
    assert aligned([["a", "b"], ["long", "1"]]) == "a     b\nlong  1"


def test_datasets_have_images_and_their_mean_is_the_whole() -> None:
    parts = {"pcb": {"images": 4, "AP": 0.25}, "cards": {"images": 9, "AP": 0.75, "AP_small": 0.5}}
    rows = evaluation_rows({"AP": 0.5, "AP_small": 0.5, "pcb/AP": 0.25}, parts)
    assert rows == [
        ["dataset", "images", "AP", "AP_small"],
        ["pcb", 4, 0.25, None],
        ["cards", 9, 0.75, 0.5],
        ["mean over datasets", None, 0.5, 0.5],
    ]


@pytest.mark.parametrize(
    ("n_rows", "n", "expected"),
    [(10, 4, [0, 2, 5, 7]), (6, 4, [0, 1, 3, 4]), (3, 5, [0, 1, 2]), (3, 0, []), (0, 4, [])],
)
def test_rows_are_evenly_spaced_also_where_less_than_half_are_left_out(n_rows, n, expected):
    assert evenly_spaced(range(n_rows), n) == expected
