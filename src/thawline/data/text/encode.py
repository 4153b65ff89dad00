"""Token ids and labels of text examples, and batches of them.

    Example ── TextEncoder ──► {"input_ids", "labels"}; labels are −100 where not learned
                                   └── collate_tokens ──► batch of padded tensors

Prompt and completion are tokenised separately and joined, so that the prompt's tokens in training are those
that generation and choice ranking start from, whatever a tokenizer would merge at the boundary.
"""

from __future__ import annotations

__all__ = ["IGNORED", "TextEncoder", "collate_tokens"]

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from thawline.data.text.rows import Example
from thawline.errors import ConfigError, DataError

IGNORED = -100
"""Label of a token that is not learned; PyTorch's cross-entropy and transformers skip it."""

# No space ends the generation prompt: many tokenizers would merge it with the answer's first word.
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(eq=False)
class TextEncoder:
    """Convert examples to token ids and labels, for one tokenizer and one kind of model.

    Args:
        tokenizer: any of transformers' tokenizers.
        max_length: longest sequence; longer prompts are cut at the start, longer completions at the end.
        learn_prompt: learn prompts too (and, in chats, the turns of every role).
        seq2seq: prompt to the encoder, completion to the decoder.
        chat_template: Jinja file for `messages`, "plain", or None for the tokenizer's own template.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    max_length: int = 512
    learn_prompt: bool = False
    seq2seq: bool = False
    chat_template: str | None = None
    n_cut: int = field(default=0, init=False)
    """Number of examples cut to `max_length` so far."""

    def __post_init__(self) -> None:
        self.chat_template = _load_chat_template(self.tokenizer, self.chat_template)

    def __call__(self, example: Example) -> dict[str, list[int]]:
        """Return the token ids and labels of one example.

        Raises: DataError: if no token of the example would be learned, or the template drops its tools.
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
        """Join the tokens of a prompt and of the answer to learn; too long a prompt is cut at its start."""
        if self.seq2seq:
            self.n_cut += max(len(prompt), len(answer)) > self.max_length
            return {"input_ids": self._keep_end(prompt, self.max_length), "labels": answer[: self.max_length]}
        self.n_cut += len(prompt) + len(answer) > self.max_length
        answer = answer[: self.max_length - bool(prompt)]
        prompt = self._keep_end(prompt, self.max_length - len(answer))
        prompt_labels = prompt if self.learn_prompt else [IGNORED] * len(prompt)
        return {"input_ids": prompt + answer, "labels": prompt_labels + answer}

    def prompt_ids(self, example: Example) -> list[int]:
        """Return the tokens that an answer continues: opening tokens and prompt, without an end token."""
        if example.messages:
            turns = example.messages[:-1] if example.messages[-1]["role"] == "assistant" else example.messages
            return self._ids(self._chat_text(example, turns, add_generation_prompt=True))
        if self.seq2seq:
            return list(self.tokenizer(example.prompt).input_ids)
        return self._opening_ids() + self._ids(example.prompt)

    def answer_ids(self, text: str) -> list[int]:
        """Return the tokens of an answer, followed by the end-of-sequence token."""
        end = self.tokenizer.eos_token_id
        return self._ids(text) + ([] if end is None else [end])

    def _encode_chat(self, example: Example) -> dict[str, list[int]]:
        """Encode a whole chat; the assistant's turns are learned."""
        text = self._chat_text(example, example.messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = labels = list(encoded.input_ids)
        if not self.learn_prompt:
            spans = self._answer_spans(example, text)
            labels = [
                token if any(start < stop and end > first for first, stop in spans) else IGNORED
                for token, (start, end) in zip(ids, encoded.offset_mapping, strict=True)
            ]
        self.n_cut += len(ids) > self.max_length
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}

    def _answer_spans(self, example: Example, text: str) -> list[tuple[int, int]]:
        """Locate the assistant's turns in the chat's text: a turn is what it adds to those before it."""
        spans = []
        for i, turn in enumerate(example.messages):
            if turn["role"] != "assistant":
                continue
            before = self._chat_text(example, example.messages[:i], add_generation_prompt=True)
            after = self._chat_text(example, example.messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{example.where}: the chat template rewrites earlier turns, so the text of turn {i + 1} "
                    'cannot be located. Use another `data.chat_template` (a Jinja file, or "plain").'
                )
            spans.append((len(before), len(after)))
        return spans

    def _check_tools(self, example: Example) -> None:
        """Refuse chat templates that silently leave out `tools`, as many do."""
        without = replace(example, tools=())
        if self._chat_text(example, example.messages) == self._chat_text(without, example.messages):
            raise DataError(
                f"{example.where}: the chat template does not write the row's `tools`, so the model would "
                "not see them. Set `data.chat_template` to a Jinja file that does, or remove `tools`."
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
                f"{example.where}: the chat template does not accept this chat: {error}. Correct the row, or "
                'set `data.chat_template` to a Jinja file, or to "plain".'
            ) from error

    def _keep_end(self, ids: list[int], length: int) -> list[int]:
        """Cut `ids` to `length` tokens: the opening tokens and the end of the rest."""
        if len(ids) <= length:
            return ids
        opening = self._opening_ids()[:length]
        return opening + ids[len(ids) - (length - len(opening)) :]

    def _opening_ids(self) -> list[int]:
        """Return the tokens put before every text (Llama's <s>), without a closing one (T5's </s>)."""
        return [token for token in self.tokenizer("").input_ids if token != self.tokenizer.eos_token_id]

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


def _load_chat_template(tokenizer: PreTrainedTokenizerBase, chosen: str | None) -> str | None:
    if chosen is None or chosen == "plain":
        return PLAIN_CHAT if chosen else tokenizer.chat_template
    file = Path(chosen)
    if not file.is_file():
        raise ConfigError(f"`data.chat_template`: no such file '{chosen}'. Give a Jinja file, or \"plain\".")
    return file.read_text(encoding="utf-8")
