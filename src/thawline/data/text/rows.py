"""Rows of text: read from JSONL or a `datasets` dataset, whatever their keys, and turned into tokens of
which answers are learned.

    file ── load_examples ──► Example(prompt, completion | messages, choices, task, split)
                                  └── TextEncoder ──► {"input_ids", "labels"}, label −100 where not learned

Prompt and completion are tokenised apart and joined, so that the prompt's tokens in training are those that
generation and choice ranking start from, whatever a tokenizer would merge across the seam.
"""

from __future__ import annotations

__all__ = [
    "FORMATS",
    "IGNORED",
    "Example",
    "Split",
    "TextEncoder",
    "collate_tokens",
    "format_prompt",
    "load_examples",
    "prompt_example",
    "read_manifest",
    "split_examples",
]

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from thawline.data.text.datasets import TABLES, dataset_rows, is_dataset, table_rows
from thawline.errors import ConfigError, DataError, did_you_mean

IGNORED = -100
"""Label of a token that is not learned; PyTorch's cross-entropy and transformers skip it."""

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "input-output": ("input", "output"),
    "text": ("text",),
}
"""Format → the keys a row must have. Looked at in this order: rows may carry more keys than they need."""

TEMPLATES = {
    "prompt-completion": "{prompt}",
    "instruction": "### Instruction:\n{instruction}\n\n### Response:\n",
    "input-output": "{input}\n",
}
INSTRUCTION_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"

# No space ends the generation prompt: many tokenizers would merge it with the answer's first word.
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
"""Values of `split`, and file stems, that mark held-out rows; the first one present is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row, as its file holds it but for the names of its keys."""

    prompt: str = ""
    completion: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    """A chat; then `prompt` and `completion` are empty."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the assistant of a chat may call, as JSON schemas; the chat template writes them out."""
    choices: tuple[str, ...] = ()
    """The answers to choose from, `completion` among them. Empty: open."""
    task: str = ""
    split: str = ""
    format: str = "text"
    where: str = ""
    """File and line, for messages."""

    @property
    def answer(self) -> str:
        """What a model should answer: the completion, or a chat's last turn."""
        return (self.messages[-1]["content"] or "") if self.messages else self.completion


class Split(NamedTuple):
    """Rows to learn from and rows held out."""

    train: list[Example]
    held_out: list[Example]


def load_examples(
    path: str | Path | Sequence[str],
    *,
    format: str = "auto",
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """Read every row of a JSONL, JSON, Parquet or CSV file, of several, of all such files below a folder, or
    of a dataset. Of a folder that holds both, JSONL and JSON are read.

    A folder's manifest.json, where there is one, is a list of `{task, choices?, instruction?, type?}`: what
    rows of a task lack is taken from there, and `{instruction}` may stand in the template.

    Args:
        path: file or folder; a folder written by `datasets`' save_to_disk; "hf://OWNER/NAME" or
            "hf://OWNER/NAME/CONFIG" for a dataset of the Hub; or a list of them.
        format: one of FORMATS, or "auto": by the keys of each file's first row.
        template: prompt made of a row's fields (`"{input}\\n"`). None: the format's own.
        columns: our key → the rows' own, e.g. {"input": "sentence", "output": "label", "task": "source"}.

    Raises: DataError: naming file and line, for a row that cannot be read as asked.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"Unknown format '{format}'. {did_you_mean(format, FORMATS)}")
    examples: list[Example] = []
    answers = {(columns or {}).get(key, key) for key in ("output", "completion")}
    for root in [path] if isinstance(path, (str, Path)) else path:
        if is_dataset(root):
            stem = Path(root).name
            for split, rows in dataset_rows(str(root), answers):
                examples += _read_rows(rows, format, template, columns or {}, {}, stem, split)
            continue
        manifest = {str(entry["task"]): entry for entry in read_manifest(root)}
        for file in _files(root):
            # train.jsonl and its like are splits, and their folder is the task; numbered parts are one file.
            stem = re.sub(r"-\d+-of-\d+$", "", file.stem)
            split = stem if stem in ("train", *HELD_OUT) else ""
            name = file.parent.name if split else stem
            content = table_rows(file, answers) if file.suffix[1:] in TABLES else _rows(file)
            found = _read_rows(content, format, template, columns or {}, manifest, name, split)
            if not found:
                raise DataError(f"{file}: no rows.")
            examples += found
    return examples


def read_manifest(root: str | Path) -> list[dict[str, Any]]:
    """The entries of a folder's manifest.json; none where there is no such file, or it is another's.

    Raises: DataError: if an entry's `choices` are no texts.
    """
    file = Path(root) / "manifest.json"
    if not file.is_file():
        return []
    entries = _parse(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(entries, list) or not all(isinstance(one, dict) and "task" in one for one in entries):
        return []
    for entry in entries:
        choices = entry.get("choices") or []
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise DataError(f"{file}: the choices of '{entry['task']}' must be texts, got {choices!r}.")
    return entries


def split_examples(
    examples: Sequence[Example],
    held_out: Sequence[Example] | None = None,
    *,
    fraction: float = 0.0,
    seed: int = 0,
) -> Split:
    """Part the rows to learn from the held-out ones: those given, else those marked, else a drawn share."""
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
    """The prompt a row's fields make. Raises: DataError: for a field of the template that the row lacks."""
    if template is None:
        template = TEMPLATES[format]
        if format == "instruction" and row.get("input"):
            template = INSTRUCTION_WITH_INPUT
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"`data.template` {template!r} cannot be read: {error}. Fields stand in braces, {{input}}; a "
            "brace that is meant is doubled, {{."
        ) from error
    missing = [name for name in fields if name not in row]
    if missing:
        raise DataError(f"{where}: the template asks for '{missing[0]}', the row has {_names(row)}.")
    return template.format(**{name: row[name] for name in fields})


def prompt_example(
    text: str, format: str, template: str | None, choices: Sequence[str] = (), task: str = ""
) -> Example:
    """An example without an answer: `text` in the place of the format's first field, or a user's turn."""
    shared: dict[str, Any] = {"choices": tuple(choices), "format": format, "task": task}
    if format == "messages":
        return Example(messages=({"role": "user", "content": text},), **shared)
    if format in TEMPLATES:
        text = format_prompt({FORMATS[format][0]: text}, format, template, "the text")
    return Example(prompt=text, **shared)


class TextEncoder:
    """Turns examples into token ids and labels for one tokenizer and one kind of model.

    Args:
        tokenizer: any of transformers' tokenizers.
        max_length: longest sequence; a longer prompt loses its beginning, a longer completion its end.
        learn_prompt: learn prompts too (and, in chats, every role's turns).
        seq2seq: prompt to the encoder, completion to the decoder.
        chat_template: Jinja text for `messages`, "plain", or None for the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        learn_prompt: bool = False,
        seq2seq: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.learn_prompt = learn_prompt
        self.seq2seq = seq2seq
        self.chat_template = _chat_template(tokenizer, chat_template)
        self.n_cut = 0
        """Examples that were longer than `max_length` so far."""

    def __call__(self, example: Example) -> dict[str, list[int]]:
        """Token ids and labels of one example.

        Raises: DataError: if nothing of the example would be learned, or the template drops its tools.
        """
        if example.tools:
            self._check_tools(example)
        if example.messages and not self.seq2seq:
            row = self._encode_chat(example)
        else:
            row = self.join(self.prompt_ids(example), self.answer_ids(example.answer))
        # A causal LM never predicts its first token.
        if all(label == IGNORED for label in row["labels"][not self.seq2seq :]):
            raise DataError(
                f"{example.where}: nothing is left to learn in max_length={self.max_length} tokens."
            )
        return row

    def join(self, prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
        """One row: a prompt and the answer to learn after it. Too long a prompt loses its beginning."""
        if self.seq2seq:
            self.n_cut += max(len(prompt), len(answer)) > self.max_length
            return {"input_ids": self._keep_end(prompt, self.max_length), "labels": answer[: self.max_length]}
        self.n_cut += len(prompt) + len(answer) > self.max_length
        answer = answer[: self.max_length - bool(prompt)]
        prompt = self._keep_end(prompt, self.max_length - len(answer))
        return {
            "input_ids": prompt + answer,
            "labels": (prompt if self.learn_prompt else [IGNORED] * len(prompt)) + answer,
        }

    def prompt_ids(self, example: Example) -> list[int]:
        """What an answer starts from: the tokenizer's opening tokens and the prompt, not closed."""
        if example.messages:
            turns = example.messages[:-1] if example.messages[-1]["role"] == "assistant" else example.messages
            return self._ids(self._chat_text(example, turns, add_generation_prompt=True))
        if self.seq2seq:
            return list(self.tokenizer(example.prompt).input_ids)
        return self._opening_ids() + self._ids(example.prompt)

    def answer_ids(self, text: str) -> list[int]:
        """The answer's tokens, closed by the end-of-sequence token."""
        end = self.tokenizer.eos_token_id
        return self._ids(text) + ([] if end is None else [end])

    def _encode_chat(self, example: Example) -> dict[str, list[int]]:
        """Tokens of the whole chat; those of the assistant's turns are learned."""
        text = self._chat_text(example, example.messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded.input_ids)
        if self.learn_prompt:
            labels = list(ids)
        else:
            spans = self._answer_spans(example, text)
            labels = [
                token
                if any(start < span_end and end > span_start for span_start, span_end in spans)
                else IGNORED
                for token, (start, end) in zip(ids, encoded.offset_mapping, strict=True)
            ]
        self.n_cut += len(ids) > self.max_length
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}

    def _answer_spans(self, example: Example, text: str) -> list[tuple[int, int]]:
        """Where the assistant's turns lie in the chat's text: a turn is what it adds to those before it."""
        spans = []
        for i, turn in enumerate(example.messages):
            if turn["role"] != "assistant":
                continue
            before = self._chat_text(example, example.messages[:i], add_generation_prompt=True)
            after = self._chat_text(example, example.messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{example.where}: the chat template rewrites earlier turns, so what turn {i + 1} adds "
                    'cannot be told. Use another `data.chat_template` (a Jinja file, or "plain").'
                )
            spans.append((len(before), len(after)))
        return spans

    def _check_tools(self, example: Example) -> None:
        """Raises: DataError: if the template, as many do, leaves `tools` out without a word."""
        without = replace(example, tools=())
        if self._chat_text(example, example.messages) == self._chat_text(without, example.messages):
            raise DataError(
                f"{example.where}: the chat template does not write the row's `tools`, so the model would "
                "not see them. Set `data.chat_template` to a Jinja file that does, or take `tools` out."
            )

    def _chat_text(
        self, example: Example, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        if self.chat_template is None:
            raise ConfigError(
                f"The tokenizer '{self.tokenizer.name_or_path}' has no chat template for rows of `messages`. "
                'Set `data.chat_template` to a Jinja file, or to "plain".'
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(turns),
                tools=list(example.tools) or None,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            raise DataError(
                f"{example.where}: the chat template does not take this chat: {error}. Mend the row, or set "
                '`data.chat_template` to a Jinja file, or to "plain".'
            ) from error

    def _keep_end(self, ids: list[int], length: int) -> list[int]:
        """The opening tokens and the end of `ids`, at most `length` together."""
        if len(ids) <= length:
            return ids
        opening = self._opening_ids()[:length]
        return opening + ids[len(ids) - (length - len(opening)) :]

    def _opening_ids(self) -> list[int]:
        """Tokens the tokenizer puts in front of every text (Llama's <s>), but no closing one (T5's </s>)."""
        return [token for token in self.tokenizer("").input_ids if token != self.tokenizer.eos_token_id]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def collate_tokens(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to the longest: `input_ids`, `attention_mask` (B, T), `labels` (B, L).

    A key that holds one number a row (a class, a task's id) becomes (B,). Text (a task's name) is left out.
    """
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if isinstance(values[0], str):
            continue
        if isinstance(values[0], int):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = _pad(values, IGNORED if key == "labels" else pad_token_id)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


def _pad(rows: list[list[int]], value: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded


def _files(path: str | Path) -> Iterable[Path]:
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"No such file or folder: '{root}'.")
    for suffixes in (("jsonl", "json"), TABLES):
        found = sorted(file for suffix in suffixes for file in root.rglob(f"*.{suffix}"))
        found = [file for file in found if file.name != "manifest.json"]
        if found:
            return found
    raise DataError(f"'{root}' holds no .jsonl, .json, .parquet or .csv file.")


def _read_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    format: str,
    template: str | None,
    columns: Mapping[str, str],
    manifest: Mapping[str, Mapping[str, Any]],
    task: str,
    split: str,
) -> list[Example]:
    """The examples of one file or split; `task` and `split` are those of rows that do not say."""
    examples: list[Example] = []
    for where, row in rows:
        if columns:
            row = _renamed(row, columns, where)
        if format == "auto":
            format = _format_of(row, where)
        if row.get("task", task) in (None, ""):
            raise DataError(f"{where}: the row's task is empty. Name it, or leave the key out.")
        name = str(row.get("task", task))
        shared = {"task": name, "split": str(row.get("split") or split), "format": format, "where": where}
        examples.append(_example(row, format, template, shared, manifest.get(name, {})))
    return examples


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise DataError(f"{where}: `data.columns` asks for '{missing[0]}', the row has {_names(row)}.")
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and content of every row of a JSONL file, or of a JSON file holding a list."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows' editors put a mark in front
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}).") from error
    if file.suffix == ".json":
        rows = _parse(text, str(file))
        if not isinstance(rows, list):
            raise DataError(
                f"{file}: expected a list of rows, got {type(rows).__name__}. Or use .jsonl, one row a line."
            )
        numbered = ((f"{file}: row {i}", row) for i, row in enumerate(rows, 1))
    else:
        # Not splitlines(): JSON leaves line separators such as U+2028 unescaped within a text.
        lines = enumerate(text.split("\n"), 1)
        numbered = ((f"{file}:{i}", _parse(line, f"{file}:{i}")) for i, line in lines if line.strip())
    for where, row in numbered:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with keys, got {type(row).__name__}.")
        yield where, row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}.") from error


def _format_of(row: Mapping[str, Any], where: str) -> str:
    for name, keys in FORMATS.items():
        if all(key in row for key in keys):
            return name
    formats = "; ".join(f"{name}: {' + '.join(keys)}" for name, keys in FORMATS.items())
    raise DataError(f"{where}: cannot tell the format from the keys {_names(row)}. Known: {formats}.")


def _example(
    row: Mapping[str, Any],
    format: str,
    template: str | None,
    shared: Mapping[str, Any],
    told: Mapping[str, Any],
) -> Example:
    """A row as an example. `told`: what the manifest tells of its task."""
    where = shared["where"]
    missing = [key for key in FORMATS[format] if key not in row]
    if missing:
        raise DataError(f"{where}: a row of format '{format}' needs '{missing[0]}', got {_names(row)}.")
    if format == "text":
        return Example(completion=_text(row, "text", where), **shared)
    if format == "messages" or isinstance(row.get("prompt"), list):
        return Example(
            messages=_messages(row, where), tools=_tools(row, where), **{**shared, "format": "messages"}
        )
    answer = "completion" if format == "prompt-completion" else "output"
    for key in (*FORMATS[format], answer):
        _text(row, key, where)
    completion = _text(row, answer, where)
    fields = {"instruction": told["instruction"], **row} if "instruction" in told else row
    return Example(
        prompt=format_prompt(fields, format, template, where),
        completion=completion,
        choices=_choices(row.get("choices") or told.get("choices") or (), completion, where),
        **shared,
    )


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{where}: '{key}' must be text, got {type(row[key]).__name__}.")
    return row[key]


def _choices(choices: Any, completion: str, where: str) -> tuple[str, ...]:
    if not isinstance(choices, (list, tuple)) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: 'choices' must be a list of texts, got {choices!r}.")
    if choices and completion not in choices:
        raise DataError(f"{where}: the answer {completion!r} is not among the choices {list(choices)!r}.")
    return tuple(choices)


def _messages(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """The turns of a chat, whole or as prompt and completion lists."""
    turns = row["messages"] if "messages" in row else [*row["prompt"], *_as_turns(row["completion"])]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: `messages` must be a list of turns, got {turns!r}.")
    for i, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise DataError(f"{where}: turn {i} needs 'role' and 'content', got {turn!r}.")
        # A turn that only calls tools says nothing: null, as OpenAI's API has it.
        if not isinstance(turn["content"], str) and not (turn["content"] is None and turn.get("tool_calls")):
            raise DataError(f"{where}: the 'content' of turn {i} must be text, got {turn['content']!r}.")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"{where}: no turn of role 'assistant', so there is nothing to learn.")
    return tuple(turns)


def _tools(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """A chat's tools: a list of schemas, or its JSON text, as datasets store lists of unlike objects."""
    tools = row.get("tools") or []
    if isinstance(tools, str):
        tools = _parse(tools, f"{where}: `tools`") or []
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: `tools` must be a list of JSON schemas, or its JSON text, got {tools!r}.")
    return tuple(tools)


def _as_turns(completion: Any) -> list[Mapping[str, Any]]:
    return completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]


def _chat_template(tokenizer: PreTrainedTokenizerBase, chosen: str | None) -> str | None:
    if chosen is None:
        return tokenizer.chat_template
    if chosen == "plain":
        return PLAIN_CHAT
    file = Path(chosen)
    if not file.is_file():
        raise ConfigError(f"`data.chat_template`: no such file '{chosen}'. Give a Jinja file, or \"plain\".")
    return file.read_text(encoding="utf-8")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in row) or "no keys"
