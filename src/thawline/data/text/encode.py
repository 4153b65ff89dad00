"""Token ids and labels of text examples, and batches of them.

    Example ── TextEncoder ──► {"input_ids", "labels"}; labels are −100 where not learned
                                   └── collate_tokens ──► batch of padded tensors

Prompt and completion are tokenised separately and joined, so that the prompt's tokens in training are those
that generation and choice ranking start from, whatever a tokenizer would merge at the boundary. Training,
evaluation and predict read special tokens in one way: a text opens as the tokenizer opens it and ends with
its end token, each once, also where the data brings them along.
"""

from __future__ import annotations

__all__ = ["IGNORED", "OverlongError", "TextEncoder", "collate_tokens"]

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from thawline.data.text.chat import ChatTemplate, without_end
from thawline.data.text.rows import Example
from thawline.errors import ConfigError, DataError

IGNORED = -100
"""Label of a token that is not learned; PyTorch's cross-entropy and transformers skip it."""


class OverlongError(DataError):
    """A row of more tokens than are taken, where it may not be cut."""


@dataclass(eq=False)
class TextEncoder:
    """Convert examples to token ids and labels, for one tokenizer and one kind of model.

    Args:
        tokenizer: any of transformers' tokenizers.
        max_length: longest sequence; longer prompts are cut at the start, longer completions at the end.
        cut: cut longer examples; False: raise OverlongError.
        n_tokens: number of tokens that the model knows; None: all of the tokenizer's.
        learn_prompt: learn prompts too (and, in chats, the turns of every role).
        seq2seq: prompt to the encoder, completion to the decoder.
        chat_template: Jinja file for `messages`, "plain", or None for the tokenizer's own template.
        chat_options: variables of the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    max_length: int = 512
    cut: bool = True
    n_tokens: int | None = None
    learn_prompt: bool = False
    seq2seq: bool = False
    chat_template: str | None = None
    chat_options: Mapping[str, Any] = field(default_factory=dict)
    n_cut: int = field(default=0, init=False)
    """Number of examples and prompts cut so far."""

    def __post_init__(self) -> None:
        chosen = self.chat_template
        if chosen not in (None, "plain") and not Path(chosen).is_file():
            raise ConfigError(
                f"`data.chat_template`: no such file '{chosen}'. Give a Jinja file, or \"plain\"."
            )
        self.chat = ChatTemplate(self.tokenizer, chosen, self.chat_options)

    def __call__(self, example: Example) -> dict[str, list[int]]:
        """Return the token ids and labels of one example.

        Raises: DataError: if no token of the example would be learned, or the chat template drops some.
            OverlongError: if it is longer than `max_length` and may not be cut. ConfigError: for a token that
            the model does not know.
        """
        if example.messages:
            example = self.chat.without_ends(example)
        if example.messages and not self.seq2seq:
            ids, is_learned = self.chat.tokens(example, learn_all=self.learn_prompt)
            labels = [token if learned else IGNORED for token, learned in zip(ids, is_learned, strict=True)]
            row = {"input_ids": self._known(ids[: self.max_length]), "labels": labels[: self.max_length]}
            length = len(ids)
        else:
            if example.messages:
                self._check_last_turn(example)
            prompt, answer = self._full_prompt(example), self.answer_ids(example.answer)
            if prompt == self.opening_ids == answer[: len(prompt)] and len(answer) > len(prompt):
                prompt = []  # the text of the data brings its opening tokens along
            row = self.join(prompt, answer)
            length = max(len(prompt), len(answer)) if self.seq2seq else len(prompt) + len(answer)
        self._is_long(length, example)
        # A causal LM never predicts its first token.
        if all(label == IGNORED for label in row["labels"][not self.seq2seq :]):
            raise DataError(
                f"{example.where}: nothing is left to learn in max_length={self.max_length} tokens of "
                f"{length}. Raise `data.max_length`, or set `data.overlong` to drop."
            )
        return row

    def join(self, prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
        """Join the tokens of a prompt and of the answer to learn; too long a prompt is cut at its start."""
        self._known([*prompt, *answer])
        if self.seq2seq:
            return {"input_ids": self._keep_end(prompt, self.max_length), "labels": answer[: self.max_length]}
        answer = answer[: self.max_length - bool(prompt)]
        prompt = self._keep_end(prompt, self.max_length - len(answer))
        prompt_labels = prompt if self.learn_prompt else [IGNORED] * len(prompt)
        return {"input_ids": prompt + answer, "labels": prompt_labels + answer}

    def text_ids(self, text: str, example: Example | None = None) -> list[int]:
        """Return the tokens of a text as an encoder takes it, opened and closed, cut to `max_length`.

        Args:
            example: the row that the text is of, if its length is to be checked.
        """
        ids = list(self.tokenizer(text).input_ids)
        if self._is_long(len(ids), example):
            ids = list(self.tokenizer(text, truncation=True, max_length=self.max_length).input_ids)
        return self._known(ids)

    def prompt_ids(self, example: Example, max_length: int | None = None) -> list[int]:
        """Return the tokens that an answer continues: opening tokens and prompt, without an end token.

        Too long a prompt is cut as in training: it keeps its opening tokens and loses what follows them.

        Args:
            max_length: most tokens, where the model has no room for more. None: the encoder's.
        """
        ids = self._full_prompt(example)
        length = min(self.max_length, max_length or self.max_length)
        self.n_cut += len(ids) > length
        return self._known(self._keep_end(ids, length))

    def answer_ids(self, text: str) -> list[int]:
        """Return the tokens of an answer, followed by one end-of-sequence token."""
        end = self.tokenizer.eos_token_id
        ids = self._ids(self.without_end(text))
        return ids if end is None else [*ids, end]

    def without_end(self, text: str) -> str:
        """Return a text without the end-of-sequence token that it may close with."""
        return without_end(text, self.tokenizer.eos_token)

    def stop_ids(self, generation_config: Any, *, is_chat: bool) -> list[int]:
        """Return the tokens that end a generated answer.

        These are the end tokens of the model's generation config, the tokenizer's, and for chats the one that
        closes the assistant's turn.
        """
        ends = getattr(generation_config, "eos_token_id", None)
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        ends += [self.tokenizer.eos_token_id, self.chat.turn_end if is_chat else None]
        return [token for token in dict.fromkeys(ends) if token is not None]

    @cached_property
    def opening_ids(self) -> list[int]:
        """Tokens that open every text (Llama's <s>, OPT's </s>), without those that close one (T5's </s>)."""
        whole, plain = list(self.tokenizer("a").input_ids), self._ids("a")
        n_added = len(whole) - len(plain)
        start = next((i for i in range(n_added) if whole[i : i + len(plain)] == plain), n_added)
        return whole[:start]

    def _full_prompt(self, example: Example) -> list[int]:
        if example.messages:
            turns = self.chat.without_ends(example).asked
            return self._ids(self.chat.text(example, turns, add_generation_prompt=True))
        if self.seq2seq:
            return list(self.tokenizer(example.prompt).input_ids)
        ids = self._ids(example.prompt)
        return ids if ids[: len(self.opening_ids)] == self.opening_ids else self.opening_ids + ids

    def _is_long(self, length: int, example: Example | None) -> bool:
        """Count what has to be cut. Raises: OverlongError: if it is an example that may not be."""
        if length > self.max_length:
            if example is not None and not self.cut:
                raise OverlongError(
                    f"{example.where}: {length} tokens, more than max_length={self.max_length}."
                )
            self.n_cut += 1
        return length > self.max_length

    def _known(self, ids: list[int]) -> list[int]:
        """Return tokens as they are. Raises: ConfigError: for one that the model does not know."""
        highest = max(ids, default=0)
        if self.n_tokens is not None and highest >= self.n_tokens:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise ConfigError(
                f"The tokenizer gives {token!r} the number {highest}, and the base has embeddings of "
                f"{self.n_tokens} tokens. Give in `base.model` a base with the tokenizer that it was trained "
                f"with, or save it after `model.resize_token_embeddings({len(self.tokenizer)})`."
            )
        return ids

    def _check_last_turn(self, example: Example) -> None:
        """Check a chat for an encoder-decoder, which learns the last turn alone."""
        self.chat.check_complete(example)
        last = example.messages[-1]
        if last["role"] != "assistant" or last.get("tool_calls") or not last.get("weight", 1):
            raise DataError(
                f"{example.where}: an encoder-decoder learns the last turn of a chat, which must be "
                "the assistant's, of text alone, and not of weight 0."
            )

    def _keep_end(self, ids: list[int], length: int) -> list[int]:
        """Cut `ids` to `length` tokens: the opening tokens, where they stand, and the end of the rest."""
        if len(ids) <= length:
            return ids
        opening = self.opening_ids or [self.tokenizer.bos_token_id]
        opening = opening[:length] if ids[: len(opening)] == opening else []
        return opening + ids[len(ids) - (length - len(opening)) :]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def collate_tokens(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to the longest: `input_ids`, `attention_mask` (B, T), `labels` (B, L).

    Keys that hold one number per row (a class, a task id) become (B,). Text (a task's name) is dropped.
    """
    batch = {}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    for key, first in rows[0].items():
        if isinstance(first, int):
            batch[key] = torch.tensor([row[key] for row in rows])
        elif not isinstance(first, str):
            padding = {"labels": IGNORED, "attention_mask": 0}.get(key, pad_token_id)
            values = [torch.tensor(row[key], dtype=torch.long) for row in rows]
            batch[key] = pad_sequence(values, batch_first=True, padding_value=padding)
    return batch
