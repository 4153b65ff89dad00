"""Text examples read from files or a `datasets` dataset, whatever their keys are called.

    file or dataset ── load_examples ──► Example(prompt, completion | messages, choices, task, split)
                                             └── split_examples ──► Split(train, held_out)

Faulty rows are named by file and line, all at once. `encode.py` turns examples into tokens.
"""

from __future__ import annotations

__all__ = [
    "FORMATS",
    "TEMPLATES",
    "Example",
    "Split",
    "format_prompt",
    "load_examples",
    "prompt_example",
    "read_manifest",
    "split_examples",
]

import json
import logging
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from thawline.data.text.datasets import dataset_rows, is_dataset
from thawline.data.text.files import Rows, data_files, file_name, file_rows, read_text
from thawline.data.text.turns import CHAT_KEYS, is_learned, parse_json, read_chat
from thawline.errors import ConfigError, DataError, all_of, did_you_mean

logger = logging.getLogger(__name__)

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "input-output": ("input", "output"),
    "text": ("text",),
}
"""Format → the keys a row must have. Tried in this order: rows may have more keys than they need."""

TEMPLATES: dict[str, str] = {
    "prompt-completion": "{prompt}",
    "instruction": "### Instruction:\n{instruction}\n\n### Response:\n",
    "input-output": "{input}\n",
}
"""Format → its prompt where the recipe has no template of its own."""
INSTRUCTION_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"

PARTS_OF_PROMPT = ("system", "system_prompt", "history", "tools", "functions")
"""Keys with which other tools build a chat of a row without turns."""
EMPTY = ("", "nan", "null", "[]")
"""Texts with which tables and JSON stand for a missing value."""

OTHER_KEYS = {"task", "split", "choices"}
"""Keys that rows of every format may have."""
MAY_BE_CHATS = ("messages", "conversations", "prompt-completion")
"""Formats whose rows may be chats, and so may have keys of chats."""
MARKS = {"kto_tag", "label", "weight"}
"""Keys that may say of a row that it is not learned; all but `kto_tag` in the formats of chats alone."""

HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
"""Values of `split`, and file stems, that mark held-out rows; the first one present is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row, under the same field names whatever its format."""

    prompt: str = ""
    completion: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Turns of a chat; then `prompt` and `completion` are empty."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tools the assistant of a chat may call, as JSON schemas; written out by the chat template."""
    choices: tuple[str, ...] = ()
    """Answers to choose from, including `completion`. Empty: any answer."""
    n_asked: int = 0
    """Turns of a chat that its prompt brings along: the assistant's among them are no answers to learn."""
    task: str = ""
    split: str = ""
    format: str = "text"
    where: str = "the text"
    """File and line, for messages."""

    def __post_init__(self) -> None:
        """Check that tokenizers can read the text. Raises: DataError: for half of a character."""
        text = '"'.join((self.prompt, self.completion, self.task, *self.choices))
        if self.messages:
            text += json.dumps((self.messages, self.tools), ensure_ascii=False, default=str)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            before = error.object[max(error.start - 20, 0) : error.start].rpartition('"')[2]
            raise DataError(
                f"{self.where}: half of a character, \\u{ord(error.object[error.start]):04x}, stands behind "
                f"{before!r}. JSON writes an emoji by two such codes: correct the row, or remove the code."
            ) from error

    @property
    def asked(self) -> tuple[Mapping[str, Any], ...]:
        """Turns of a chat before its last answer; all of them where it has none."""
        answers = [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant"]
        return self.messages[: answers[-1]] if answers else self.messages

    @property
    def calls_tools(self) -> bool:
        """True if the last answer of a chat calls tools, and so may have no text."""
        return any(turn.get("tool_calls") for turn in self.messages[len(self.asked) :])

    @property
    def question(self) -> str:
        """The text before the answer: the prompt, or the turn of a chat before its last answer."""
        return self.asked[-1]["content"] if self.asked else self.prompt

    @property
    def answer(self) -> str:
        """The text a model should answer: the completion, or the last answer of a chat."""
        rest = self.messages[len(self.asked) :]
        return rest[0]["content"] if rest else self.completion


class Split(NamedTuple):
    """Training rows and held-out rows."""

    train: list[Example]
    held_out: list[Example]


def load_examples(
    path: str | Path | Sequence[str],
    *,
    format: str = "auto",
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """Read all rows of files, folders or datasets.

    Of a folder, every JSON, JSONL, CSV, TSV and Parquet file below it is read, plain or in gzip.
    Its manifest.json, if any, is a list of `{task, choices?, instruction?, type?}`: values that a task's rows
    lack are taken from there, and the template may use `{instruction}`.

    Args:
        path: file or folder; a folder written by `datasets`' save_to_disk; "hf://OWNER/NAME" or
            "hf://OWNER/NAME/CONFIG" for a dataset of the Hub; or a list of them.
        format: one of FORMATS, or "auto": by the keys of each file's first row.
        template: prompt built from a row's fields (`"{input}\\n"`). None: the format's own.
        columns: our key → the rows' key, e.g. {"input": "sentence", "output": "label", "task": "source"}.

    Raises: DataError: naming file and line of the rows that cannot be read.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"Unknown format '{format}'. {did_you_mean(format, FORMATS)}")
    columns = columns or {}
    answers = {columns.get(key, key) for key in ("output", "completion")}
    examples: list[Example] = []
    faults: list[DataError] = []
    for root in [path] if isinstance(path, (str, Path)) else path:
        manifest = {} if is_dataset(root) else {str(entry["task"]): entry for entry in read_manifest(root)}
        for task, split, rows in _sources(root, answers):
            row_format = format
            keys: set[str] = set()
            for where, row in rows:
                try:
                    row = _rename(row, columns, where)
                    keys.update(row)
                    if row_format == "auto":
                        row_format = _detect_format(row, where)
                    if marks := row.keys() & (MARKS if row_format in MAY_BE_CHATS else {"kto_tag"}):
                        _check_learned(row, marks - _read_keys(row_format, template, columns), where)
                    name = _text(row.get("task", task), f"{where}: the row's task")
                    if not name:
                        raise DataError(f"{where}: the row's task is empty. Name it, or leave the key out.")
                    shared = {"task": name, "split": _split(row.get("split") or split), "where": where}
                    entry = manifest.get(name, {})
                    examples.append(_example(row, row_format, template, columns, entry, **shared))
                except DataError as fault:
                    faults.append(fault)
            if unread := keys - _read_keys(row_format, template, columns):
                names = ", ".join(f"'{key}'" for key in sorted(unread))
                logger.info("%s: rows have keys that are not read: %s.", task, names)
    if faults:
        raise all_of(faults, "rows cannot be read")
    return examples


def read_manifest(root: str | Path) -> list[dict[str, Any]]:
    """Return the entries of a folder's manifest.json; none if there is no such file, or it is not ours.

    Raises: DataError: if `choices` of an entry is not a list of texts.
    """
    file = Path(root) / "manifest.json"
    if not file.is_file():
        return []
    entries = parse_json(read_text(file), str(file))
    if not isinstance(entries, list) or not all(isinstance(one, dict) and "task" in one for one in entries):
        return []
    for entry in entries:
        _choices(entry.get("choices") or [], f"{file}: `choices` of '{entry['task']}'")
    return entries


def split_examples(
    examples: Sequence[Example],
    held_out: Sequence[Example] | None = None,
    *,
    fraction: float = 0.0,
    seed: int = 0,
) -> Split:
    """Split off the held-out rows: those given, else those marked by `split`, else a random fraction."""
    marked = [name for name in HELD_OUT if any(example.split == name for example in examples)]
    train = [example for example in examples if example.split not in HELD_OUT]
    if held_out is not None:
        return Split(train or list(examples), list(held_out))
    if marked:
        return Split(train, [example for example in examples if example.split == marked[0]])
    if fraction:
        order = random.Random(seed).sample(range(len(train)), len(train))
        cut = max(1, round(fraction * len(train)))
        return Split([train[i] for i in sorted(order[cut:])], [train[i] for i in sorted(order[:cut])])
    return Split(train, [])


def format_prompt(row: Mapping[str, Any], format: str, template: str | None, where: str) -> str:
    """Build a prompt from a row's fields. Raises: DataError: for a template field that the row lacks."""
    if template is None:
        template = TEMPLATES[format]
        if format == "instruction" and row.get("input"):
            template = INSTRUCTION_WITH_INPUT
    fields = _template_fields(template)
    missing = [name for name in fields if name not in row]
    if missing:
        raise DataError(f"{where}: the template asks for '{missing[0]}', the row has {_quoted(row)}.")
    for name in fields:
        is_missing = row[name] is None or row[name] != row[name]  # tables write null as NaN
        if is_missing or isinstance(row[name], (list, tuple, Mapping)):
            kind = "null" if is_missing else type(row[name]).__name__
            raise DataError(
                f"{where}: the template asks for '{name}', which is {kind} here and must be text."
            )
    try:
        return template.format(**{name: row[name] for name in fields})
    except ValueError as error:
        raise DataError(f"{where}: `data.template` {template!r} does not fit the row: {error}.") from error


def _template_fields(template: str | None) -> list[str]:
    """Return the names of a template's fields. Raises: ConfigError: if it is not a format string."""
    try:
        return [name for _, name, _, _ in Formatter().parse(template or "") if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"`data.template` {template!r} is not a format string: {error}. Write fields in braces, "
            f"{{input}}, and double a literal brace, {{{{."
        ) from error


def prompt_example(
    text: str, format: str, template: str | None, choices: Sequence[str] = (), task: str = ""
) -> Example:
    """Build an example without an answer: `text` is the format's first field, or a user's turn."""
    shared: dict[str, Any] = {"choices": tuple(choices), "format": format, "task": task}
    if format == "messages":
        return Example(messages=({"role": "user", "content": text},), **shared)
    if format in TEMPLATES:
        text = format_prompt({FORMATS[format][0]: text}, format, template, "the text")
    return Example(prompt=text, **shared)


def _sources(root: str | Path, answers: Collection[str]) -> Iterator[tuple[str, str, Rows]]:
    """Yield task, split and rows of every file or dataset split; rows may name another task or split."""
    if is_dataset(root):
        for split, found in dataset_rows(str(root), answers):
            yield Path(root).name, split, found
        return
    for file in data_files(Path(root)):
        # train.jsonl and the like are splits, and their folder is the task; numbered parts are one file.
        stem = re.sub(r"-\d+-of-\d+$", "", file_name(file))
        is_split = stem in ("train", *HELD_OUT)
        rows = file_rows(file, answers)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{file}: no rows.")
        yield (
            file.absolute().parent.name if is_split else stem,
            stem if is_split else "",
            chain([first], rows),
        )


def _rename(row: Mapping[str, Any] | DataError, columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """Return a row under our names. Raises: DataError: if it lacks one, or could not be read."""
    if isinstance(row, DataError):
        raise row
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise DataError(f"{where}: `data.columns` asks for '{missing[0]}', the row has {_quoted(row)}.")
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _split(name: object) -> str:
    """Return a split's name: that in HELD_OUT for `Test`, `test_sft`, `validation_matched` and the like."""
    first = re.split(r"[^a-z]", str(name).lower())[0]
    return first if first in HELD_OUT else str(name)


def _detect_format(row: Mapping[str, Any], where: str) -> str:
    for name, keys in FORMATS.items():
        if all(key in row for key in keys):
            return name
    formats = "; ".join(f"{name}: {' + '.join(keys)}" for name, keys in FORMATS.items())
    raise DataError(
        f"{where}: no format has the keys {_quoted(row)}. Known: {formats}. Other names are given by "
        "`data.columns`, e.g. {input: question, output: answer}."
    )


def _read_keys(format: str, template: str | None, columns: Mapping[str, str]) -> set[str]:
    """Return the keys of rows that are read."""
    read = OTHER_KEYS.union(FORMATS.get(format, ()), ["input"] if format == "instruction" else [])
    read.update(_template_fields(template))
    if format in MAY_BE_CHATS:
        read |= CHAT_KEYS
    return read | {theirs for ours, theirs in columns.items() if ours in read}


def _check_learned(row: Mapping[str, Any], marks: Collection[str], where: str) -> None:
    """Raise DataError if one of the keys `marks` says of a row that its answer is not to be learned."""
    for key in sorted(marks):
        if str(row[key]).lower() == "false" or not is_learned(key, row[key]):
            raise DataError(
                f"{where}: the row's '{key}' is {row[key]!r}, so its answer is not to be learned. Remove the "
                "row; where the key means something else, remove it or read it by `data.columns`."
            )


def _example(
    row: Mapping[str, Any],
    format: str,
    template: str | None,
    columns: Mapping[str, str],
    task_entry: Mapping[str, Any],
    **shared: Any,
) -> Example:
    """Convert a row. `task_entry`: the manifest's entry of its task; `shared`: task, split and where."""
    where = shared["where"]
    missing = [key for key in FORMATS[format] if key not in row]
    if missing:
        raise DataError(f"{where}: a row of format '{format}' needs '{missing[0]}', got {_quoted(row)}.")
    if format in ("messages", "conversations") or (format != "text" and isinstance(row.get("prompt"), list)):
        return Example(**read_chat(row, where), format="messages", **shared)
    texts = {key: _text(row[key], f"{where}: '{key}'") for key in FORMATS[format]}
    completion = texts[FORMATS[format][-1]]
    if format == "text":
        return Example(completion=completion, **shared)
    for key in PARTS_OF_PROMPT:
        given = str(row.get(key) or "").strip() not in EMPTY
        if given and key not in {*_template_fields(template), *columns.values()}:
            raise DataError(
                f"{where}: the row's '{key}' is in no prompt. Put {{{key}}} into `data.template`, give the "
                "row as a chat (`messages`), or remove it."
            )
    choices = _choices(row.get("choices") or task_entry.get("choices") or (), f"{where}: `choices`")
    if choices and completion not in choices:
        raise DataError(f"{where}: the answer {completion!r} is not among the choices {list(choices)!r}.")
    fields = {"instruction": task_entry["instruction"], **row} if "instruction" in task_entry else row
    prompt = format_prompt({**fields, **texts}, format, template, where)
    return Example(prompt=prompt, completion=completion, choices=choices, format=format, **shared)


def _text(value: Any, what: str) -> str:
    """Return a text as it is, and a whole number (a class) as its digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        kind = "null" if value is None else f"{type(value).__name__} {value!r}"
        raise DataError(f"{what} must be text, got {kind}.")
    return value


def _choices(values: Any, what: str) -> tuple[str, ...]:
    """Return choices, given as a list of texts or, in a table, as its JSON text."""
    if isinstance(values, str) and values.startswith("["):
        values = parse_json(values, what)
    if not isinstance(values, (list, tuple)):
        raise DataError(f"{what} must be a list of texts, got {values!r}.")
    return tuple(_text(value, f"{what}: each") for value in values)


def _quoted(row: Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in row) or "no keys"
