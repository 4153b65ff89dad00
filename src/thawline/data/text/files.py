"""Rows of files: JSON (a list, or a row per line), CSV and TSV, all of them in gzip too, and Parquet.

The content decides where names mislead: JSON lines in a .json file, gzip without its suffix, the mark of
UTF-8 or UTF-16 in front of a text. Nothing is guessed: a cell of CSV is the text that stands there, be it 1,
None or nothing, and text in an unmarked encoding other than UTF-8 is refused.
"""

from __future__ import annotations

__all__ = ["Rows", "data_files", "decode_text", "file_name", "file_rows", "read_text"]

import csv
import gzip
import io
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from thawline.data.text.datasets import table_rows
from thawline.data.text.turns import parse_json
from thawline.errors import DataError
from thawline.files import marked_encoding

logger = logging.getLogger(__name__)

Rows = Iterator[tuple[str, Mapping[str, Any] | DataError]]
"""Place of each row, for messages, and its content, or why it cannot be read."""

NOT_ROWS = ("manifest.json", "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""Files of a folder that describe its rows."""
DOCUMENTS = ("", ".md", ".py", ".yaml", ".yml")
"""Suffixes of files that nobody takes for rows."""


def data_files(root: Path) -> list[Path]:
    """Return a file, or the files with rows below a folder, hidden ones aside; says what it leaves out.

    Raises: DataError: if there are none, or two of one name, which may hold the same rows.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"No such file or folder: '{root}'.")
    visible = sorted(
        file
        for file in root.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    found = [file for file in visible if _suffix(file) in SUFFIXES and file.name not in NOT_ROWS]
    if not found:
        raise DataError(f"'{root}' holds no {_known()} file.")
    for name, count in Counter(file.with_name(file_name(file)) for file in found).items():
        if count > 1:
            twice = ", ".join(f"'{file.name}'" for file in found if file.with_name(file_name(file)) == name)
            raise DataError(f"'{name.parent}' holds {twice}: the same rows? Give one of them, or rename it.")
    others = [file for file in visible if _suffix(file) not in (*SUFFIXES, *DOCUMENTS)]
    if others:
        shown = ", ".join([file.name for file in others[:3]] + ["…"] * (len(others) > 3))
        logger.warning("'%s': not read: %s (%d); read are %s.", root, shown, len(others), _known())
    return found


def file_name(file: Path) -> str:
    """Return a file's name without its suffixes: "train" of train.jsonl.gz."""
    return Path(file.name.removesuffix(".gz")).stem


def file_rows(file: Path, answers: Collection[str] = ()) -> Rows:
    """Yield the rows of a file. `answers`: see `dataset_rows`.

    Raises: DataError: for a file that cannot be read, or not as its suffix says; faulty rows are yielded.
    """
    suffix = _suffix(file)
    if suffix == ".parquet":
        return table_rows(file, answers)
    if suffix not in ("", *SUFFIXES):
        raise DataError(f"Cannot tell how to read '{file}': files of rows end in {_known()}.")
    return READERS.get(suffix, _json_rows)(file, read_text(file))


def read_text(file: Path) -> str:
    """Read a text file, plain or in gzip (`decode_text`). Raises: DataError: if it cannot be read."""
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read '{file}': {error}.") from error
    return decode_text(data, str(file))


def decode_text(data: bytes, name: str) -> str:
    """Decode text: UTF-8, or as the mark in front of it says.

    Args:
        name: what it is of, for messages.

    Raises: DataError: naming the first byte that cannot be read.
    """
    encoding = marked_encoding(data) or "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}: not {encoding.upper()} text (byte {error.start}: {data[error.start]:#04x}). "
            "Save it as UTF-8; text of Windows often is cp1252."
        ) from error
    if "\0" in text:
        raise DataError(f"'{name}' holds zero bytes: UTF-16 without its mark, or no text. Save it as UTF-8.")
    return text


def _json_rows(file: Path, text: str) -> Rows:
    """Yield the rows of a JSON list, or of one row per line."""
    try:
        value = json.loads(text)  # fails right after the first row where there is one per line
    except (ValueError, RecursionError):
        if text.lstrip().startswith("["):
            parse_json(text, str(file))
        # Not splitlines(): JSON leaves line separators such as U+2028 unescaped within a text.
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield _object(f"{file}:{i}", parse_json(line, f"{file}:{i}"))
                except DataError as error:
                    yield f"{file}:{i}", error
        return
    if not isinstance(value, list):
        yield _object(f"{file}:1", value)
    else:
        yield from (_object(f"{file}: row {i}", row) for i, row in enumerate(value, 1))


def _object(where: str, row: Any) -> tuple[str, Mapping[str, Any] | DataError]:
    """Return a row with its place, or what is wrong where it is no object."""
    if isinstance(row, dict):
        return where, row
    return where, DataError(f"{where}: expected an object with keys, got {type(row).__name__}.")


def _table_rows(file: Path, text: str) -> Rows:
    """Yield the rows of CSV or TSV, all values as the text that stands there; empty lines are no rows."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(file, text), strict=True)
    names: list[str] | None = None
    while True:
        where = f"{file}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            quote = "Within quotes, a quote is doubled, and every quote that opens is closed."
            yield where, DataError(f"{where}: not CSV: {error}. {quote}")
            return
        if cells is None:
            return
        if not any(map(str.strip, cells)) or (names is None and cells[0] == "sep="):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
                raise DataError(f"{where}: two columns are called '{twice[0]}'. Rename or remove one.")
        elif len(cells) == len(names):
            yield where, dict(zip(names, cells, strict=True))
        else:
            n = f"expected {len(names)} values ({', '.join(names)}), got {len(cells)}"
            yield where, DataError(f"{where}: {n}. A value that holds the separator stands in quotes.")


def _delimiter(file: Path, text: str) -> str:
    """Return what separates the values: of CSV, a comma, or what the header has in its place."""
    if _suffix(file) == ".tsv":
        return "\t"
    header = text.lstrip().partition("\n")[0]
    if header.startswith("sep="):  # Excel's
        return header[4:5]
    return next((mark for mark in ",;\t|" if mark in header), ",")


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
}
"""Suffix → reader of a file's text."""
SUFFIXES = (*READERS, ".parquet")


def _suffix(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _known() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
