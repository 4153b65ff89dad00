"""The text objective: next tokens of a causal or encoder-decoder model, or the label of a classifier."""

from __future__ import annotations

__all__ = ["TextObjective"]

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from thawline.data.text.encode import IGNORED, TextEncoder, collate_tokens
from thawline.data.text.rows import Example
from thawline.errors import ConfigError, DataError, did_you_mean
from thawline.metrics.text import METRICS, exact_match, most_likely, rouge_l
from thawline.recipe import RunConfig, TextBase, TextSettings
from thawline.training.objective import ReadRows
from thawline.training.text.base import RowObjective, judged_row
from thawline.training.text.pretrained import load_pretrained
from thawline.training.text.scoring import Score, generate_answers, score_answers, score_labels

logger = logging.getLogger(__name__)

HEADS = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
}
SHORT_ANSWERS = ("input-output", "prompt-completion")
"""Formats whose open answers are compared word for word where metrics are chosen automatically."""
LONGEST_ANSWER = 256
"""Tokens generated at most in evaluation where the recipe does not say."""


class TextObjective(RowObjective):
    """Rows of text, the model that reads them, and how its answers are judged.

    Raises: DataError: for rows that cannot be read as asked. ConfigError: for settings that do not fit them.
    """

    settings: TextSettings

    def __init__(self, config: RunConfig, *, read: ReadRows = "all", described: Mapping[str, Any]) -> None:
        super().__init__(config, read=read, described=described)
        self.base_config = load_pretrained(AutoConfig, self.base)
        self.head = _head(self.base, self.base_config)
        self.encode = TextEncoder(
            self.processor,
            max_length=self.data.max_length,
            learn_prompt=self.settings.loss_on == "all",
            seq2seq=self.head == "seq2seq-lm",
            chat_template=self.data.chat_template,
        )
        examples = [*self.train_examples, *self.held_out_examples]
        self.labels = tuple(described.get("labels", ()))
        if not self.labels and self.head == "classifier":
            self.labels = _labels(examples)
        self.train_rows = self._encode_all(self.train_examples)
        self.held_out_rows = self._encode_all(self.held_out_examples)
        chosen = self._choose_metrics()
        self.metrics = tuple(name for name in METRICS if name in chosen)

    def load_base(self, source: str | None = None) -> nn.Module:
        """The pretrained model on the CPU, or one saved in `source`; a classifier gets the data's labels."""
        extra: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": self.base.attn_implementation}
        if self.labels and tuple(self.base_config.id2label.values()) != self.labels:
            names = dict(enumerate(self.labels))
            extra |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
            extra["ignore_mismatched_sizes"] = True
        base = self.base if source is None else dataclasses.replace(self.base, model=source, revision=None)
        model = load_pretrained(HEADS[self.head], base, **extra)
        # Padding is masked everywhere but in a decoder's classifier, which finds its last token by it.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.processor.pad_token_id
        return model

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A padded batch: `input_ids`, `attention_mask` (B, T), `labels` (B, L), or (B,) of a classifier.

        Where tasks are routed also `task_ids`, a list: ids are read on the host.
        """
        tokens = collate_tokens(rows, self.processor.pad_token_id)
        return {**tokens, **self.ids_of(row["task"] for row in rows)}

    def preview(self) -> str:
        """One training row, decoded: what is learned stands in ⟦ ⟧."""
        row = self.train_rows[0]
        decode = self.processor.decode
        if self.head == "classifier":
            return f"{decode(row['input_ids'])} → ⟦{self.labels[row['labels']]}⟧"
        if self.head == "seq2seq-lm":
            return f"{decode(row['input_ids'])} → ⟦{decode(row['labels'])}⟧"
        parts: list[str] = []
        start = 0
        for end in range(1, len(row["labels"]) + 1):
            learned = row["labels"][start] != IGNORED
            if end == len(row["labels"]) or (row["labels"][end] != IGNORED) != learned:
                text = decode(row["input_ids"][start:end])
                parts.append(f"⟦{text}⟧" if learned else text)
                start = end
        return "".join(parts)

    def describe(self) -> dict[str, Any]:
        """How a text becomes a prompt, the tasks, and a classifier's labels."""
        return {**super().describe(), "labels": list(self.labels)}

    def judge(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        rows: Sequence[Mapping[str, Any]],
        batch_size: int,
    ) -> list[dict[str, Any]]:
        """One judged row an example: of a classifier's labels, or a language model's answers."""
        judge = self._judge_labels if self.head == "classifier" else self._judge_answers
        return judge(model, examples, rows, batch_size)

    def answer(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, **sampling: Any
    ) -> list[str]:
        """Answer each example: written freely, picked from its choices, or a classifier's label.

        Args:
            sampling: forwarded to `generate` (max_new_tokens, do_sample, temperature, top_p, …).
        """
        if self.head == "classifier":
            rows = [{"input_ids": self._classifier_ids(one), "task": one.task} for one in examples]
            found = score_labels(model, rows, self.collate, batch_size)
            return [self.labels[logits.argmax()] for logits in found]
        if any(example.choices for example in examples):
            return self.choose(model, examples, batch_size)
        return [text.strip() for text in self.generate(model, examples, batch_size, **sampling)]

    def choose(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> list[str]:
        """For each example the choice the model finds most likely, by mean log-likelihood a token."""
        rows = [
            self.encode.join(self.encode.prompt_ids(example), self.encode.answer_ids(choice))
            | {"task": example.task}
            for example in examples
            for choice in example.choices
        ]
        scores = iter(self._score(model, rows, batch_size))
        chosen = []
        for example in examples:
            found = [next(scores) for _ in example.choices]
            best = most_likely([score.log_likelihood for score in found], [score.n_tokens for score in found])
            chosen.append(example.choices[best])
        return chosen

    def generate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, **sampling: Any
    ) -> list[str]:
        """For each example what the model writes after its prompt."""
        n_tokens = [sum(label != IGNORED for label in row["labels"]) for row in self.held_out_rows]
        longest = sampling.pop("max_new_tokens", None) or self.settings.max_new_tokens
        longest = longest or min(max(n_tokens, default=LONGEST_ANSWER), LONGEST_ANSWER)
        prompts = [self.encode.prompt_ids(example)[-self.data.max_length :] for example in examples]
        return generate_answers(
            model, prompts, self.processor,
            max_new_tokens=longest, batch_size=batch_size,
            extras=self.ids_of(example.task for example in examples), **sampling,
        )  # fmt: skip

    def _judge_answers(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        encoded: Sequence[Mapping[str, Any]],
        batch_size: int,
    ) -> list[dict[str, Any]]:
        scores = self._score(model, encoded, batch_size)
        rows = [judged_row(one, **score._asdict()) for one, score in zip(examples, scores, strict=True)]
        given: list[int] = []
        opened: list[int] = []
        for i, example in enumerate(examples):
            (given if "choice_accuracy" in self.metrics and example.choices else opened).append(i)
        for i, choice in zip(
            given, self.choose(model, [examples[i] for i in given], batch_size), strict=True
        ):
            rows[i] |= {"choice": choice, "choice_accuracy": float(choice == rows[i]["answer"])}
        if {"exact_match", "rouge_l"} & set(self.metrics):
            # Where both kinds of metric were asked for by name, rows with choices are generated for too.
            asked = opened if self.settings.metrics == "auto" else range(len(examples))
            answers = self.generate(model, [examples[i] for i in asked], batch_size)
            for row, text in zip([rows[i] for i in asked], answers, strict=True):
                row["prediction"] = text.strip()
                if "exact_match" in self.metrics:
                    row["exact_match"] = exact_match(text, row["answer"])
                if "rouge_l" in self.metrics:
                    row["rouge_l"] = rouge_l(text, row["answer"])
        return rows

    def _judge_labels(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        encoded: Sequence[Mapping[str, Any]],
        batch_size: int,
    ) -> list[dict[str, Any]]:
        rows = []
        all_logits = score_labels(model, encoded, self.collate, batch_size)
        for example, row, logits in zip(examples, encoded, all_logits, strict=True):
            label = self.labels[logits.argmax()]
            likelihood = logits.log_softmax(-1)[row["labels"]].item()
            rows.append(
                judged_row(example, likelihood, prediction=label, accuracy=float(label == example.answer))
            )
        return rows

    def _score(self, model: nn.Module, rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[Score]:
        shifted = self.head == "causal-lm"
        return score_answers(model, rows, self.collate, batch_size=batch_size, shifted=shifted)

    def _encode_all(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        before = self.encode.n_cut
        rows: list[dict[str, Any]] = [
            (self._encode_label(example) if self.head == "classifier" else self.encode(example))
            | {"task": example.task}
            for example in tqdm(
                examples, desc="tokens", unit="row", leave=False, disable=len(examples) < 5000
            )
        ]
        if (n_cut := self.encode.n_cut - before) > 0:
            logger.warning(
                "%d of %d rows were cut to max_length=%d tokens.", n_cut, len(rows), self.data.max_length
            )
        return rows

    def _encode_label(self, example: Example) -> dict[str, Any]:
        if example.messages or example.format == "text":
            raise DataError(
                f"{example.where}: a classifier needs a prompt and an answer, got '{example.format}'."
            )
        return {"input_ids": self._classifier_ids(example), "labels": self.labels.index(example.completion)}

    def _classifier_ids(self, example: Example) -> list[int]:
        return list(
            self.processor(example.prompt, truncation=True, max_length=self.data.max_length).input_ids
        )

    def _choose_metrics(self) -> tuple[str, ...]:
        examples = self.held_out_examples
        has_choices = bool(examples) and all(example.choices for example in examples)
        if self.settings.metrics == "auto":
            if self.head == "classifier":
                return ("accuracy",)
            is_short = any(not one.choices and one.format in SHORT_ANSWERS for one in examples)
            return (
                *(("choice_accuracy",) if any(example.choices for example in examples) else ()),
                *(("exact_match", "rouge_l") if is_short else ()),
            )
        for name in self.settings.metrics:
            if name not in METRICS:
                raise ConfigError(
                    f"Unknown metric '{name}' in `objective.metrics`. {did_you_mean(name, METRICS)}"
                )
        if "choice_accuracy" in self.settings.metrics and examples and not has_choices:
            where = next(example.where for example in examples if not example.choices)
            raise DataError(f"{where}: `choice_accuracy` needs `choices` in every held-out row.")
        if ("accuracy" in self.settings.metrics) != (self.head == "classifier"):
            raise ConfigError(
                "`accuracy` is the metric of a classifier (`base.head: classifier`), and its only one."
            )
        return tuple(self.settings.metrics)


def _head(base: TextBase, config: Any) -> Literal["causal-lm", "seq2seq-lm", "classifier"]:
    if base.head != "auto":
        return base.head
    if config.is_encoder_decoder:
        return "seq2seq-lm"
    names = config.architectures or [""]
    if names[0].endswith("ForSequenceClassification"):
        return "classifier"
    if names[0].endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    raise ConfigError(
        f"Cannot tell from its config ({names[0] or 'no architecture'}) what '{base.model}' should compute. "
        "Set `base.head` to causal-lm, seq2seq-lm or classifier."
    )


def _labels(examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(
        sorted({label for example in examples for label in (example.choices or (example.completion,))})
    )
