"""Atomic writes leave the old file or the new one, never a part."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from thawline.files import (
    atomic_file,
    atomic_folder,
    read_json,
    read_jsonl,
    to_json,
    write_json,
    write_jsonl,
    write_text,
)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError, match="disk"), atomic_file(file) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise RuntimeError("disk")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    with atomic_folder(folder) as temporary:
        (temporary / "weights").write_text("1")
    with pytest.raises(RuntimeError, match="killed"), atomic_folder(folder) as temporary:  # noqa: PT012
        (temporary / "weights").write_text("2")
        raise RuntimeError("killed")
    assert (folder / "weights").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_folder_replaces_file_by_file_with_its_subfolders(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for value in "12":
        with atomic_folder(folder) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "weights").write_text(value)
    assert (folder / "deep" / "weights").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_behind_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.partial").write_text("half")
    (tmp_path / ".best.partial").mkdir()
    (tmp_path / ".best.partial" / "old").write_text("half")
    write_text(tmp_path / "a.txt", "new")
    with atomic_folder(tmp_path / "best") as temporary:
        (temporary / "weights").write_text("1")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "a.txt",
        "best",
        "best/weights",
    ]


def test_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"ä": [1, None], "path": Path("x")})
    assert read_json(tmp_path / "new" / "a.json") == {"ä": [1, None], "path": "x"}
    assert read_json(tmp_path / "none.json") == {}
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}, {"a": 2}])
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == ['{"a": 1}', '{"a": 2}']


def test_rows_are_read_without_the_half_line_of_a_killed_process(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"ä": None}, {"text": "one\u2028two\x85three\x0cfour"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"a": ')
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_json_holds_null_in_the_place_of_numbers_that_are_not_finite(tmp_path: Path) -> None:
    value = {"a": [1.5, float("nan"), (float("-inf"), "é")], "b": np.float64("inf"), "c": {"d": 2}}
    written = '{"a": [1.5, null, [null, "é"]], "b": null, "c": {"d": 2}}'
    assert to_json(value) == written
    write_jsonl(tmp_path / "a.jsonl", [value, value])
    assert (tmp_path / "a.jsonl").read_text() == f"{written}\n{written}\n"
    write_json(tmp_path / "a.json", value, indent=None)
    assert (tmp_path / "a.json").read_text() == f"{written}\n"


def test_json_is_written_in_one_place() -> None:
    within_text = ("data/text/chat", "data/text/rows", "exporters/export")
    elsewhere = {f"src/thawline/{name}.py" for name in ("files", *within_text)}
    root = Path(__file__).parents[1]
    for file in (*root.glob("src/**/*.py"), *root.glob("benchmarks/harness.py")):
        name = file.relative_to(root).as_posix()
        if name not in elsewhere:
            assert not re.search(r"json\.dumps?\(", file.read_text(encoding="utf-8")), name
