"""Rows of files as people have them: encodings, gzip, CSV as text; all faults are named at once."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from thawline.data.text import Example, load_examples, prompt_example
from thawline.errors import DataError

ROWS = [{"input": "ähnlich", "output": "fast"}, {"input": "b", "output": "c"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "input,output\nähnlich,fast\nb,c\n"


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(example.prompt, example.completion) for example in load_examples(path)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl", LINES.replace("\n", "\r\n\r\n") + "  \n"),
        ("rows.json", LINES),
        ("rows.json", json.dumps(ROWS, indent=2)),
        ("rows.jsonl", json.dumps(ROWS)),
        ("ROWS.JSONL", LINES),
        ("rows.ndjson", LINES),
        ("rows.csv", TABLE),
        ("rows.csv", TABLE.replace("\n", "\r\n") + "\r\n,\r\n  \r\n"),
        ("rows.csv", TABLE.replace("\n", ",,\n") + ",,"),
        ("rows.csv", TABLE.replace(",", ";")),
        ("rows.csv", "sep=;\n" + TABLE.replace(",", ";")),
        ("rows.csv", TABLE.replace(",", "|")),
        ("rows.CSV", '"input","output"\n"ähnlich","fast"\n\n"b","c"'),
        ("rows.tsv", TABLE.replace(",", "\t")),
        ("rows", LINES),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_file_reads_alike_whatever_it_is(tmp_path: Path, name, text, encoding, is_packed) -> None:
    file = tmp_path / (f"{name}.gz" if is_packed else name)
    data = text.encode(encoding)
    file.write_bytes(gzip.compress(data) if is_packed else data)
    assert pairs(file) == [("ähnlich\n", "fast"), ("b\n", "c")]
    assert {example.task.lower() for example in load_examples(file)} == {"rows"}


@pytest.mark.parametrize(
    "value", ["1", "0", "None", "NA", "null", "nan", "True", "1.0", "007", "1e5", " x ", ""]
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_cell_is_the_text_that_stands_there(tmp_path: Path, value: str, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    comma = "," if suffix == "csv" else "\t"
    file.write_text(f'input{comma}output\n"two\n""lines"" {comma}"{comma}{value}\nb{comma}x\n')
    assert pairs(file) == [(f'two\n"lines" {comma}\n', value), ("b\n", "x")]


def test_whole_numbers_are_classes_in_every_file(tmp_path: Path) -> None:
    rows = {"input": ["good", "bad"], "output": [1, 0], "choices": [[0, 1], [0, 1]]}
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps(dict(zip(rows, row, strict=True))) + "\n" for row in zip(*rows.values(), strict=True)
        )
    )
    (tmp_path / "a.csv").write_text('input,output,choices\ngood,1,"[""0"", ""1""]"\nbad,0,"[0, 1]"\n')
    files = [tmp_path / "a.jsonl", tmp_path / "a.csv"]
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    for file in (*files, tmp_path / "a.parquet"):
        found = [(example.completion, example.choices) for example in load_examples(file)]
        assert found == [("1", ("0", "1")), ("0", ("0", "1"))], file


def test_chats_in_a_table_are_their_json_text(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (tmp_path / "a.tsv").write_text("messages\n" + json.dumps(json.dumps(chat)).replace('\\"', '""') + "\n")
    [example] = load_examples(tmp_path / "a.tsv")
    assert example.messages == tuple(chat)


HALVES = ["\\ud83d", "\\uDE00 x", "\\ude00\\ud83d"]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "smile HALF", "completion": "ok"}',
        '{"prompt": "smile", "completion": "HALF"}',
        '{"input": "a", "output": "b", "choices": ["b", "HALF"]}',
        '{"text": "HALF"}',
        '{"messages": [{"role": "user", "content": "HALF"}, {"role": "assistant", "content": "b"}]}',
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "HALF"}]}',
        '{"text": "a", "task": "HALF"}',
    ],
)
def test_half_of_a_character_is_named_wherever_it_stands(tmp_path: Path, row: str, half: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{row.replace('HALF', 'fine')}\n{row.replace('HALF', half)}\n")
    with pytest.raises(DataError, match=r"rows.jsonl:2: half of a character, \\u[d][8e][03][d0]"):
        load_examples(file)
    with pytest.raises(DataError, match="the text: half of a character"):
        prompt_example("smile \ud83d", "input-output", None)
    whole = row.replace("HALF", "\\ud83d\\ude00")
    file.write_text(whole + "\n")
    assert load_examples(file)


def test_all_faulty_rows_are_named_at_once_up_to_a_bound(tmp_path: Path) -> None:
    lines = [LINES, '{"input": "a"}\n', "{no\n", '{"input": "a", "output": null}\n']
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.csv").write_text('input,output\na\n1,2,3\n"x"y,z\n')
    with pytest.raises(DataError) as caught:
        load_examples(tmp_path)
    said = str(caught.value).replace(f"{tmp_path}/", "").split("\n")
    assert said[0] == "6 rows cannot be read:"
    assert [line.split(": ")[0] for line in said[1:]] == [
        "a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "b.csv:2", "b.csv:3", "b.csv:4"
    ]  # fmt: skip
    assert "expected 2 values (input, output), got 1" in said[4]
    (tmp_path / "a.jsonl").write_text("{}\n" * 2000)
    with pytest.raises(DataError, match=r"^2,003 rows cannot be read:\n(.*\n){10}… and 1,993 more$"):
        load_examples(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", LINES.encode("cp1252"), r"a.jsonl:1: not UTF-8 text \(byte 11: 0xe4\). Save it as UTF-8"),
        ("a.csv", b"input,output\nb,c\n" + "é,x".encode("cp1252"), r"a.csv:3: not UTF-8 text"),
        ("a.jsonl", LINES.replace("ä", "a").encode("utf-16-le"), "holds zero bytes: UTF-16 without its mark"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], r"Cannot read '.*a.jsonl.gz'"),
        ("a.json", b"[{}, {]", "a.json: not JSON: .* at column 7"),
        ("a.json", b"[{},\n {]", "a.json: not JSON: .* at line 2, column 3"),
        ("a.json", b'{"version": 1,\n "data": []}', "a.json:1: no format has the keys 'version', 'data'"),
        ("a.json", b"[" * 10**5, "a.json: JSON that cannot be read: maximum recursion depth"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"1" * 5000 + b"}", "a.jsonl:2: JSON that cannot be read"),
        ("a.json", b"3", "a.json:1: expected an object with keys, got int"),
        ("a.jsonl", b'["a", "b"]', "a.jsonl: row 1: expected an object with keys, got str"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', "a.jsonl:2: expected an object with keys, got list"),
        ("a.csv", b"input,output,input\na,b,c\n", "a.csv:1: two columns are called 'input'"),
        ("a.csv", b'input,output\na,b\nc,"d\n', "a.csv:3: not CSV: unexpected end of data"),
        ("a.csv", b"", "a.csv: no rows"),
        ("a.csv", b"input,output\n", "a.csv: no rows"),
        ("a.jsonl", b"\n \n", "a.jsonl: no rows"),
        ("a.xlsx", b"PK", r"Cannot tell how to read '.*a.xlsx': files of rows end in .jsonl"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path: Path, name, data, message) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_examples(tmp_path / name)


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    [example] = load_examples(tmp_path / "a.csv")
    assert len(example.completion) == 200_000


def test_a_folder_is_read_whole_and_what_is_left_out_is_said(tmp_path: Path, caplog) -> None:
    for name in ("a.jsonl", "sub/b.json", ".hidden.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES)
    (tmp_path / "c.csv").write_text(TABLE)
    (tmp_path / "README.md").write_text("Rows.")
    (tmp_path / "dataset_infos.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "thawline"):
        assert {example.task for example in load_examples(tmp_path)} == {"a", "b", "c"}
    assert not caplog.records
    (tmp_path / "d.xlsx").write_text("")
    with caplog.at_level(logging.WARNING, "thawline"):
        load_examples(tmp_path)
    assert "not read: d.xlsx (1); read are .jsonl" in caplog.text
    (tmp_path / "a.csv").write_text(TABLE)
    with pytest.raises(DataError, match=r"holds 'a.csv', 'a.jsonl': the same rows\?"):
        load_examples(tmp_path)


@pytest.mark.parametrize("name", ["Test", "test_sft", "validation_matched", "DEV", "valid"])
def test_held_out_rows_are_known_by_the_first_word_of_their_split(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "split": name}) + "\n")
    [example] = load_examples(tmp_path / "a.jsonl")
    assert example.split in ("test", "validation", "dev", "valid")


def test_an_example_made_by_hand_is_checked_too() -> None:
    with pytest.raises(DataError, match=r"half of a character, \\udc80, stands behind 'text"):
        Example(completion="text\udc80")
