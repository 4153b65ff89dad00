"""Chats as text and tokens: what the template writes, what of it is learned, and which token ends a turn.

Learned are the assistant's turns, and where rows give weights, the turns of weight 1. A template says what
the assistant wrote by `{% generation %}`; of one that does not, a turn is what it adds to those before it.
A template that leaves out what a row holds is refused: the model would learn to answer what it cannot see.
"""

from __future__ import annotations

__all__ = ["ChatTemplate", "without_end"]

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from thawline.data.text.files import read_text
from thawline.data.text.rows import Example
from thawline.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# No space ends the generation prompt: many tokenizers would merge it with the answer's first word.
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

MARKS = re.compile(r"\{%-?\s*generation\b")
"""Start of a block that a template marks as written by the assistant."""

OTHER_TEMPLATE = (
    "`data.chat_template` to a Jinja file that marks what the assistant writes by {% generation %}, or to "
    '"plain".'
)

READ_KEYS = {"role", "content", "weight", "tool_calls", "tool_call_id"}
"""Keys of a turn that need no word: read, or without a meaning for the model."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn whose text a template may leave out of earlier turns, but not of all."""
END_OF_THOUGHT = "</think>"
"""Text before this marker in the content of a turn is reasoning as well."""

ASKED = {"role": "user", "content": "question"}
"""A turn to try templates with."""
CHANGE = "§"
"""Added to a value to see whether the template writes it."""

Turn = Mapping[str, Any]
Changes = Mapping[int, tuple[str, Callable[[Any], Any]]]
"""Number of a turn → key, and how its value is changed."""


@dataclass(eq=False, frozen=True)
class ChatTemplate:
    """Chat template of a tokenizer, or one given in its place.

    Args:
        tokenizer: any of transformers' tokenizers.
        chosen: Jinja file, "plain", or None for the tokenizer's own template.
        options: variables of the template.
    """

    tokenizer: PreTrainedTokenizerBase
    chosen: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    _known: dict[str, tuple[bool, bool]] = field(default_factory=dict, init=False)
    """Template → what it accepts."""
    _unread: set[str] = field(default_factory=set, init=False)
    """Keys of turns that no template writes, already named."""

    @cached_property
    def turn_end(self) -> int | None:
        """Id of the special token that closes an assistant's turn; None: the template closes it by text."""
        tail = self.tokenizer(self._closing, add_special_tokens=False).input_ids
        special = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        return next((token for token in tail if token in special), None)

    def text(self, example: Example, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        """Write turns of an example as text. Raises: DataError: if the template does not accept them."""
        return self._apply(example, turns, add_generation_prompt=add_generation_prompt, tokenize=False)

    def tokens(self, example: Example, *, learn_all: bool = False) -> tuple[list[int], list[bool]]:
        """Return the tokens of a whole chat, and which of them are learned.

        Args:
            learn_all: learn every role's turns, but those of weight 0.

        Raises: DataError: if the template leaves out something of the row, or the turns cannot be located.
        """
        self.check_complete(example)
        turns, answers = example.messages, range(example.n_asked, len(example.messages))
        usual = [learn_all or (turn["role"] == "assistant" and i in answers) for i, turn in enumerate(turns)]
        learned = [bool(turn.get("weight", is_usual)) for turn, is_usual in zip(turns, usual, strict=True)]
        # What stands between turns is learned with `learn_all` alone.
        located = [i for i, is_learned in enumerate(learned) if is_learned != learn_all]
        if located and not self.tokenizer.is_fast:
            raise ConfigError(
                f"The tokenizer '{self.tokenizer.name_or_path}' does not say where tokens stand in "
                "a text, which chats need. Use a fast one (tokenizer.json), or rows of prompt and completion."
            )
        has_marks = MARKS.search(self._source(example)) is not None
        locate = self._marked if located and has_marks else self._added
        ids, is_located = locate(example, located)
        return ids, [found != learn_all for found in is_located]

    def check_complete(self, example: Example) -> None:
        """Check that the template writes all that a row holds; say once which other keys turns have.

        Raises: DataError: naming what it leaves out.
        """
        source = self._source(example)
        keys = {key for turn in example.messages for key, value in turn.items() if value}
        keys -= READ_KEYS.union(THOUGHTS, self._unread, re.findall(r"\w+", source))
        if keys:
            self._unread.update(keys)
            names = ", ".join(f"'{key}'" for key in sorted(keys))
            logger.warning(
                "%s: the chat template does not write what turns have as %s.", example.where, names
            )
        for what in self._left_out(example):
            raise DataError(
                f"{example.where}: the chat template does not write {what}, so the model would not see it. "
                "Set `data.chat_template` to a Jinja file that does, or remove it from the row."
            )

    def without_ends(self, example: Example) -> Example:
        """Return an example whose answers do not bring along the end token that the template writes."""
        ends = [self.tokenizer.eos_token, self.tokenizer.decode(self.turn_end or [])]
        turns = (
            {**turn, "content": without_end(turn["content"], *ends)} if turn["role"] == "assistant" else turn
            for turn in example.messages
        )
        return replace(example, messages=tuple(turns))

    def _left_out(self, example: Example) -> Iterator[str]:
        """Yield what the template does not write, found by changing it."""
        turns = example.messages
        text = self.text(example, turns)

        def is_left_out(changes: Changes) -> bool:
            return bool(changes) and text == self._text_with(example, changes)

        if example.tools and text == self.text(replace(example, tools=()), turns):
            yield "the row's `tools`"
        for i, turn in enumerate(turns):
            if turn["content"].strip() not in text and is_left_out({i: ("content", _append)}):
                yield f"the content of turn {i + 1} ({turn['role']})"
            if any(is_left_out({i: ("tool_calls", _rename_call(j))}) for j, _ in enumerate(_calls(turn))):
                yield f"the `tool_calls` of turn {i + 1}"
        for key in THOUGHTS:
            if is_left_out({i: (key, _append) for i, turn in enumerate(turns) if turn.get(key)}):
                yield f"the row's `{key}`"
        thoughtful = [i for i, turn in enumerate(turns) if END_OF_THOUGHT in turn["content"]]
        if is_left_out(dict.fromkeys(thoughtful, ("content", _change_thought))):
            yield f"what stands before {END_OF_THOUGHT}"

    def _text_with(self, example: Example, changes: Changes) -> str:
        """Return the chat's text where a value of some turns is another."""
        turns = [dict(turn) for turn in example.messages]
        for i, (key, change) in changes.items():
            turns[i][key] = change(turns[i][key])
        return self.text(example, turns)

    def _marked(self, example: Example, located: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Return tokens, and which of them are of the turns `located`, by the template's generation marks."""
        found = self._apply(
            example, example.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [bool(mark) for mark in found["assistant_masks"]]
        answers = [i for i, turn in enumerate(example.messages) if turn["role"] == "assistant"]
        if located != answers:
            starts = [mark and not before for before, mark in pairwise([False, *marked])]
            if sum(starts) != len(answers) or not set(located) <= set(answers):
                raise DataError(
                    f"{example.where}: the chat template marks {sum(starts)} parts as the assistant's and "
                    f"the chat has {len(answers)} such turns, so turns of weight 0 cannot be located. Use a "
                    "template with one {% generation %} block in each, or no weights."
                )
            blocks = zip(marked, accumulate(starts), strict=True)
            marked = [mark and answers[n_blocks - 1] in located for mark, n_blocks in blocks]
        return list(found["input_ids"]), marked

    def _added(self, example: Example, located: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Return tokens, and which of them are of the turns `located`: what these add to the text."""
        text = self.text(example, example.messages)
        spans = [self._span(example, i, text) for i in located]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(spans))
        ids = list(encoded.input_ids)
        if not spans:
            return ids, [False] * len(ids)
        return ids, [
            any(start < stop and end > first for first, stop in spans)
            for start, end in encoded.offset_mapping
        ]

    def _span(self, example: Example, i: int, text: str) -> tuple[int, int]:
        """Return where turn i starts and ends in a chat's text."""
        turns, turn = example.messages, example.messages[i]
        before = self.text(example, turns[:i]) if i else ""
        opened, after = before, self.text(example, turns[: i + 1])
        if turn["role"] == "assistant" and i:
            opened = self.text(example, turns[:i], add_generation_prompt=True)
        elif turn["role"] == "assistant":  # no template opens an answer to nothing
            opened = text[: _first_difference(text, self._text_with(example, {0: ("content", _prepend)}))]
        # What opens an answer may be left out once turns follow it, as Qwen3.5's <think>.
        start = len(opened) if text.startswith(opened) else _first_difference(text, opened)
        if start < len(opened) and (start <= len(before) or i == len(turns) - 1):
            raise DataError(
                f"{example.where}: the chat template opens an answer by {opened[start:]!r}, but writes turn "
                f"{i + 1} without. Give the turn its thoughts, set `data.chat_options` (such as "
                f"{{enable_thinking: false}}), or set {OTHER_TEMPLATE}"
            )
        if text.startswith(after):
            return start, len(after)
        # Or it is written differently: Qwen3 leaves out its thoughts. What follows its last value ends it.
        call = ("tool_calls", _rename_call(len(_calls(turn)) - 1))
        change = {i: call if _calls(turn) else ("content", _append)}
        end = _first_difference(text, self._text_with(example, change))
        changed = self._text_with(replace(example, messages=turns[: i + 1]), change)
        closings = [after[_first_difference(after, changed) :]]
        if not _calls(turn):
            closings += sorted(map(str, self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        closing = next((one for one in closings if text.startswith(one, end)), None)
        if closing is None:
            raise DataError(
                f"{example.where}: the chat template rewrites earlier turns, so the text of turn {i + 1} "
                f"cannot be located. Set {OTHER_TEMPLATE}"
            )
        return start, end + len(closing)

    @cached_property
    def _closing(self) -> str:
        """The text that closes an assistant's turn."""
        turns = [ASKED, {"role": "assistant", "content": "answer"}]
        try:
            return self.text(Example(), turns).rpartition("answer")[2]
        except (ConfigError, DataError):
            return ""

    def _source(self, example: Example) -> str:
        """Return the Jinja text of the template. Raises: ConfigError: if there is none."""
        if self.chosen == "plain":
            return PLAIN_CHAT
        if self.chosen is not None:
            return self._file
        try:
            return self.tokenizer.get_chat_template(tools=list(example.tools) or None)
        except ValueError as error:
            raise ConfigError(
                f"The tokenizer '{self.tokenizer.name_or_path}' has no chat template for rows of `messages`. "
                'Set `data.chat_template` to a Jinja file, or to "plain".'
            ) from error

    @cached_property
    def _file(self) -> str:
        return read_text(Path(str(self.chosen)))

    def _apply(self, example: Example, turns: Sequence[Turn], **options: Any) -> Any:
        """Apply the template as `options` say. Raises: DataError: if it does not accept the turns."""
        source = self._source(example)
        takes_text, takes_objects = self._accepted(source)
        if not takes_text:
            turns = [_with_parts(turn) for turn in turns]
        if not takes_objects:
            turns = [_with_json_arguments(turn) for turn in turns]
        try:
            return self._render(source, turns, tools=list(example.tools) or None, **options)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"{example.where}: the chat template does not accept this chat: {error}. Correct the row, or "
                'set `data.chat_template` to a Jinja file, or to "plain".'
            ) from error

    def _accepted(self, source: str) -> tuple[bool, bool]:
        """Return whether a template writes contents given as text, and arguments of calls given as objects.

        Else it wants parts of type text, as those of image models, and JSON text.
        """
        if source not in self._known:
            # Mistral's templates ask for an id of nine letters.
            call = {"id": "callnine1", "type": "function", "function": {"name": "f", "arguments": {"key": 1}}}
            turns: list[Turn] = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
            takes_text = True
            if ASKED["content"] not in self._tried(source, [ASKED]):
                takes_text = ASKED["content"] not in self._tried(source, [_with_parts(ASKED)])
            turns = turns if takes_text else [_with_parts(turn) for turn in turns]
            objects = self._tried(source, turns)
            texts = self._tried(source, [_with_json_arguments(turn) for turn in turns])
            self._known[source] = takes_text, "'key'" not in objects if objects else not texts
        return self._known[source]

    def _tried(self, source: str, turns: Sequence[Turn]) -> str:
        """Return what a template writes; nothing if it does not accept the turns."""
        try:
            return str(self._render(source, turns, tokenize=False))
        except Exception:
            return ""

    def _render(self, source: str, turns: Sequence[Turn], **options: Any) -> Any:
        options = {**self.options, **options, "chat_template": source}
        return self.tokenizer.apply_chat_template(list(turns), **options)


def without_end(text: str, *ends: str | None) -> str:
    """Return a text without the end tokens that it may close with, each one of `ends`."""
    closed = text.rstrip()
    end = next((end for end in ends if end and closed.endswith(end)), None)
    return text if end is None else without_end(closed.removesuffix(end), *ends)


def _first_difference(a: str, b: str) -> int:
    """Return the index of the first letter that differs, or the length of the shorter text."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _append(text: Any) -> str:
    return f"{text}{CHANGE}"


def _prepend(text: Any) -> str:
    return f"{CHANGE}{text}"


def _change_thought(text: Any) -> str:
    return str(text).replace(END_OF_THOUGHT, CHANGE + END_OF_THOUGHT)


def _calls(turn: Turn) -> Sequence[Mapping[str, Any]]:
    return turn.get("tool_calls", ())


def _rename_call(i: int) -> Callable[[Any], list[Any]]:
    """Return a function that renames call i of a turn."""

    def rename(calls: Sequence[Mapping[str, Any]]) -> list[Any]:
        function = calls[i]["function"]
        renamed = {**calls[i], "function": {**function, "name": _append(function["name"])}}
        return [*calls[:i], renamed, *calls[i + 1 :]]

    return rename


def _with_parts(turn: Turn) -> Turn:
    """Return a turn whose content is a list of one part of type text."""
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _with_json_arguments(turn: Turn) -> Turn:
    """Return a turn whose tool calls hold their arguments as JSON text."""
    if "tool_calls" not in turn:
        return turn
    calls = [{**call, "function": dict(call["function"])} for call in _calls(turn)]
    for call in calls:
        arguments = call["function"].get("arguments", {})
        call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**turn, "tool_calls": calls}
