"""Atomic writes: a file or folder appears whole or not at all, and a killed process leaves the old one.

The temporary has a fixed name, so that the next write replaces what a killed process left behind; two
processes must not write the same path at once. What a damaged file or a full disk raises, in whatever
library, is decided here too.
"""

from __future__ import annotations

__all__ = [
    "DAMAGED",
    "atomic_file",
    "atomic_folder",
    "finite",
    "marked_encoding",
    "is_write_failure",
    "read_json",
    "read_jsonl",
    "to_json",
    "write_json",
    "write_jsonl",
    "write_text",
]

import codecs
import errno
import json
import math
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from thawline.errors import CheckpointError

DAMAGED = (SafetensorError, pickle.UnpicklingError, EOFError)
"""Raised by readers of tensors for a file that is cut short, empty, or holds other objects than tensors."""
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` on success, delete it on an error.

    The folder is created. An existing `path` is replaced in one step.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; move it to `path` on success, delete it on an error.

    Where `path` exists, its files are replaced one by one, so that at no moment a file is missing; files of
    the old folder that the new one lacks stay.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not path.is_dir():
            temporary.rename(path)
            return
        for file in sorted(p for p in temporary.rglob("*") if not p.is_dir()):
            target = path / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as JSON atomically; what JSON does not know is written as text."""
    write_text(path, f"{to_json(value, indent=indent)}\n")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line atomically."""
    write_text(path, "".join(f"{to_json(row)}\n" for row in rows))


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON; what JSON does not know becomes text, and numbers that are not finite null."""
    options: dict[str, Any] = {"indent": indent, "ensure_ascii": False, "default": str, "allow_nan": False}
    try:
        return json.dumps(value, **options)
    except ValueError:
        return json.dumps(finite(value), **options)


def finite(value: Any) -> Any:
    """Return plain values with None in the place of numbers that are not finite, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Read a JSON file; an empty dict where there is none. Raises: CheckpointError: for a damaged one."""
    path = Path(path)
    return _parse(path, path.read_bytes()) if path.is_file() else {}


def read_jsonl(path: str | Path) -> list[Any]:
    """Read a file of one JSON value per line, without an incomplete last line of a killed process.

    Raises: CheckpointError: for another line that is damaged.
    """
    content = Path(path).read_bytes()
    # Text may hold other line breaks than "\n", U+2028 for one, at which splitlines would cut it.
    lines = content[: content.rfind(b"\n") + 1].split(b"\n")
    return [_parse(path, line, f"line {i}: ") for i, line in enumerate(lines, 1) if line.strip()]


def marked_encoding(data: bytes) -> str | None:
    """Return the encoding that the mark in front of a text states (UTF-8 or UTF-16); None: there is none."""
    return next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)


def is_write_failure(error: BaseException) -> bool:
    """Return whether a file could not be written in full: a full disk, a quota, a limit of its size."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    # Neither safetensors nor torch raises an OSError; torch does not even give the reason.
    codes = [f"os error {code}" for code in _FULL] if isinstance(error, SafetensorError) else []
    codes += (
        ["inline_container", "PytorchStreamWriter", "iostream error"]
        if isinstance(error, RuntimeError)
        else []
    )
    return any(code in str(error) for code in codes)


def _parse(path: str | Path, content: bytes, where: str = "") -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise CheckpointError(
            f"'{path}' is damaged: {where}{error if content else 'it is empty'}."
        ) from error
