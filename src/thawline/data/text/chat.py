"""Chats as text and tokens: what the template writes, what of it is learned, and which token ends a turn.

Learned are the assistant's turns, or what the template marks by `{% generation %}`, but no turn of weight 0.
A template that leaves out what a row holds is refused: the model would learn to answer what it cannot see.
"""

from __future__ import annotations

__all__ = ["ChatTemplate"]

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from thawline.data.text.rows import Example
from thawline.errors import ConfigError, DataError

# No space ends the generation prompt: many tokenizers would merge it with the answer's first word.
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

MARKS = re.compile(r"\{%-?\s*generation\b")
"""Start of a block that a template marks as written by the assistant."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn whose text a template may leave out of earlier turns, but not of all."""

CHANGE = "§"
"""Appended to a value to see whether the template writes it."""

Turn = Mapping[str, Any]


@dataclass(eq=False, frozen=True)
class ChatTemplate:
    """Chat template of a tokenizer, or one given in its place.

    Args:
        tokenizer: any of transformers' tokenizers.
        chosen: Jinja file, "plain", or None for the tokenizer's own template.
    """

    tokenizer: PreTrainedTokenizerBase
    chosen: str | None = None

    @cached_property
    def source(self) -> str:
        """Jinja text of the template. Raises: ConfigError: if there is none."""
        if self.chosen == "plain":
            return PLAIN_CHAT
        if self.chosen is not None:
            return Path(self.chosen).read_text(encoding="utf-8")
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(
                f"The tokenizer '{self.tokenizer.name_or_path}' has no chat template for rows of `messages`. "
                'Set `data.chat_template` to a Jinja file, or to "plain".'
            ) from error

    @cached_property
    def turn_end(self) -> int | None:
        """Id of the special token that closes an assistant's turn; None: the template closes it by text."""
        content = "answer"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
        try:
            text = self.text(Example(format="messages"), turns)
        except (ConfigError, DataError):
            return None
        tail = self.tokenizer(text.rpartition(content)[2], add_special_tokens=False).input_ids
        special = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        return next((token for token in tail if token in special), None)

    def text(self, example: Example, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        """Write turns of an example as text. Raises: DataError: if the template does not accept them."""
        return self._apply(example, turns, add_generation_prompt=add_generation_prompt, tokenize=False)

    def tokens(self, example: Example, *, learn_all: bool = False) -> tuple[list[int], list[bool]]:
        """Return the tokens of a whole chat, and which of them are learned.

        Args:
            learn_all: learn every role's turns.

        Raises: DataError: if the template leaves out something of the row, or rewrites earlier turns.
        """
        self.check_complete(example)
        weights = [bool(turn.get("weight", 1)) for turn in example.messages if turn["role"] == "assistant"]
        if learn_all and all(weights):
            text = self.text(example, example.messages)
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
            return ids, [True] * len(ids)
        ids, turns = self._marked(example, weights) if MARKS.search(self.source) else self._located(example)
        if learn_all:
            return ids, [turn is None or weights[turn] for turn in turns]
        return ids, [turn is not None and weights[turn] for turn in turns]

    def check_complete(self, example: Example) -> None:
        """Check that the template writes all that a row holds.

        Raises: DataError: naming what it leaves out.
        """
        turns = example.messages
        text = self.text(example, turns)
        if example.tools and text == self.text(replace(example, tools=()), turns):
            self._refuse(example, "the row's `tools`")
        for i, turn in enumerate(turns):
            content = turn.get("content") or ""
            if content.strip() not in text and text == self._text_with(example, {i: ("content", _changed)}):
                self._refuse(example, f"the content of turn {i + 1} ({turn['role']})")
            for j in range(len(turn.get("tool_calls") or ())):
                if text == self._text_with(example, {i: ("tool_calls", _rename_call(j))}):
                    self._refuse(example, f"the `tool_calls` of turn {i + 1}")
        for key in THOUGHTS:
            having: dict[int, tuple[str, Callable[[Any], Any]]]
            having = {i: (key, _changed) for i, turn in enumerate(turns) if turn.get(key)}
            if having and text == self._text_with(example, having):
                self._refuse(example, f"the row's `{key}`")

    def _refuse(self, example: Example, what: str) -> None:
        raise DataError(
            f"{example.where}: the chat template does not write {what}, so the model would not see it. "
            "Set `data.chat_template` to a Jinja file that does, or remove it from the row."
        )

    def _text_with(self, example: Example, changes: Mapping[int, tuple[str, Callable[[Any], Any]]]) -> str:
        """Return the chat's text where a value of some turns is another."""
        turns = [dict(turn) for turn in example.messages]
        for i, (key, change) in changes.items():
            turns[i][key] = change(turns[i].get(key))
        return self.text(example, turns)

    def _marked(self, example: Example, weights: Sequence[bool]) -> tuple[list[int], list[int | None]]:
        """Return tokens, and the assistant's turn of each, by the template's generation marks."""
        found = self._apply(
            example, example.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        turns: list[int | None] = []
        n_blocks = 0
        for is_marked, block in groupby(found["assistant_masks"]):
            turns += [n_blocks if is_marked else None for _ in block]
            n_blocks += bool(is_marked)
        if all(weights):
            turns = [None if turn is None else 0 for turn in turns]
        elif n_blocks != len(weights):
            raise DataError(
                f"{example.where}: the template marks {n_blocks} parts as the assistant's and the chat has "
                f"{len(weights)} such turns, so the turns of weight 0 cannot be located. Use a template with "
                "one {% generation %} block in a turn, or no weights."
            )
        return list(found["input_ids"]), turns

    def _located(self, example: Example) -> tuple[list[int], list[int | None]]:
        """Return tokens, and the assistant's turn of each: a turn is what it adds to those before it."""
        text = self.text(example, example.messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = []
        for i, turn in enumerate(example.messages):
            if turn["role"] != "assistant":
                continue
            before = self.text(example, example.messages[:i], add_generation_prompt=True)
            after = self.text(example, example.messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{example.where}: the chat template rewrites earlier turns, so the text of turn {i + 1} "
                    "cannot be located. Set `data.chat_template` to a Jinja file that marks what the "
                    'assistant writes by {% generation %}, or to "plain".'
                )
            spans.append((len(before), len(after)))
        turns = [
            next((i for i, (first, stop) in enumerate(spans) if start < stop and end > first), None)
            for start, end in encoded.offset_mapping
        ]
        return list(encoded.input_ids), turns

    @cached_property
    def _takes_objects(self) -> bool:
        """True if the template writes a call's arguments from an object, False if it wants JSON text."""
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"key": "value"}}}
        asked = {"role": "user", "content": "question"}
        turns: list[Turn] = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            written = self._render(Example(), turns, chat_template=self.source, tokenize=False)
        except Exception:
            return False
        return "'key'" not in written

    def _apply(self, example: Example, turns: Sequence[Turn], **options: Any) -> Any:
        """Apply the template as `options` say. Raises: DataError: if it does not accept the turns."""
        source = self.source
        if any(turn.get("tool_calls") for turn in turns) and not self._takes_objects:
            turns = [_with_json_arguments(turn) for turn in turns]
        try:
            return self._render(example, turns, chat_template=source, **options)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"{example.where}: the chat template does not accept this chat: {error}. Correct the row, or "
                'set `data.chat_template` to a Jinja file, or to "plain".'
            ) from error

    def _render(self, example: Example, turns: Sequence[Turn], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(list(turns), tools=list(example.tools) or None, **options)


def _changed(text: Any) -> str:
    return f"{text or ''}{CHANGE}"


def _rename_call(i: int) -> Callable[[Any], list[Any]]:
    """Return a function that renames call i of a turn."""

    def rename(calls: Sequence[Mapping[str, Any]]) -> list[Any]:
        function = calls[i]["function"]
        renamed = {**calls[i], "function": {**function, "name": _changed(function["name"])}}
        return [*calls[:i], renamed, *calls[i + 1 :]]

    return rename


def _with_json_arguments(turn: Turn) -> Turn:
    """Return a turn whose tool calls hold their arguments as JSON text."""

    def written(call: Mapping[str, Any]) -> Mapping[str, Any]:
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            return call
        text = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    calls = turn.get("tool_calls")
    return {**turn, "tool_calls": [written(call) for call in calls]} if calls else turn
