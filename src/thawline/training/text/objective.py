"""The text objective: next tokens of a causal or encoder-decoder model, or the label of a classifier."""

from __future__ import annotations

__all__ = ["TextObjective", "head_of", "loader_of"]

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from thawline.data.text.encode import IGNORED
from thawline.data.text.packing import AUTO_FILL, collate_packs, fill, flatten, pack_rows
from thawline.data.text.rows import Example
from thawline.errors import ConfigError, DataError, did_you_mean
from thawline.metrics.text import METRICS, exact_match, most_likely, rouge_l
from thawline.recipe import RunConfig, TextBase, TextSettings
from thawline.training.objective import ReadRows
from thawline.training.text.base import Row, RowObjective, judged_row
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
"""Most tokens generated per answer in evaluation where the recipe does not say."""


class TextObjective(RowObjective):
    """Rows of text and the language model or classifier that answers them.

    Raises: DataError: for rows that cannot be read as asked. ConfigError: for settings that do not fit them.
    """

    settings: TextSettings

    def __init__(self, config: RunConfig, *, read: ReadRows = "all", described: Mapping[str, Any]) -> None:
        super().__init__(config, read=read, described=described)
        self.base_config = load_pretrained(AutoConfig, self.base)
        self.head = head_of(self.base, self.base_config)
        self.labels = tuple(described.get("labels", ()))
        self.metrics = ()
        if not self.has_weights:
            return
        self.encoder = self.build_encoder(
            learn_prompt=self.settings.loss_on == "all",
            seq2seq=self.head == "seq2seq-lm",
            chat_template=self.data.chat_template,
            chat_options=self.data.chat_options,
        )
        if not self.labels and self.head == "classifier":
            self.labels = self._read_labels()
        self.encode_rows()
        self._warn_of_endless_answers()
        if self.data.packing and self.train_rows:
            self._pack()
        chosen = self._choose_metrics()
        self.metrics = tuple(name for name in METRICS if name in chosen)

    def load_base(self, source: str | None = None) -> nn.Module:
        """Load the pretrained model, or one saved in `source`; a classifier gets the data's labels."""
        changes: dict[str, Any] = {}
        if self.head == "causal-lm" and getattr(self.base_config, "is_decoder", True) is False:
            changes = {"is_decoder": True}  # BERT and the like, which else see the token to predict
        if self.labels and tuple(self.base_config.id2label.values()) != self.labels:
            changes = {
                "id2label": dict(enumerate(self.labels)),
                "label2id": {name: i for i, name in enumerate(self.labels)},
                "ignore_mismatched_sizes": True,
            }
        model = self.load_model(loader_of(self.head, self.base_config), source, **changes)
        # Padding is masked everywhere but in a decoder's classifier, which finds its last token by it.
        if self.processor is not None:
            model.config.get_text_config().pad_token_id = self.processor.pad_token_id
        # Saved with a model trained whole, so that other programs stop where its turns end.
        if self.head != "classifier" and any(example.messages for example in self.train_examples):
            model.generation_config.eos_token_id = self.encoder.stop_ids(
                model.generation_config, is_chat=True
            )
        return model

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Build a padded batch: `input_ids`, `attention_mask` (B, T), `labels` (B, L); (B,) for a classifier.

        Where tasks are routed, `task_ids` too. Packs have a batch of their own (`collate_packs`), with a task
        id for every token.
        """
        if "position_ids" not in rows[0]:
            return self.pad(rows, "input_ids", "labels")
        if "flash" in (self.base.attn_implementation or ""):
            rows = [flatten(rows)]
        batch = collate_packs(rows, self.processor.pad_token_id)
        if self.task_ids is not None:
            width = batch["input_ids"].shape[1]
            tasks = [row["tasks"] + row["tasks"][-1:] * (width - len(row["tasks"])) for row in rows]
            batch["task_ids"] = [[self.task_ids[task] for task in one] for one in tasks]
        return batch

    def preview(self) -> str:
        """Return one training row, decoded: what is learned stands in ⟦ ⟧."""
        row, decode = self.train_rows[0], self.processor.decode
        if self.head == "classifier":
            return f"{decode(row['input_ids'])} → ⟦{self.labels[row['labels']]}⟧"
        if self.head == "seq2seq-lm":
            return f"{decode(row['input_ids'])} → ⟦{decode(row['labels'])}⟧"
        text = ""
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        for is_learned, span in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
            part = decode([token for token, _ in span])
            text += f"⟦{part}⟧" if is_learned else part
        return text

    def describe(self) -> dict[str, Any]:
        """Return the prompt's format, the tasks, and a classifier's labels."""
        return {**super().describe(), "labels": list(self.labels)}

    def encode(self, example: Example) -> dict[str, Any]:
        """Return an example's `input_ids` and `labels`.

        Raises: DataError: for a row that is no prompt with an answer, which a classifier needs.
        """
        if self.head != "classifier":
            return self.encoder(example)
        if example.messages or example.format == "text":
            raise DataError(
                f"{example.where}: a classifier needs a prompt and an answer, got '{example.format}'."
            )
        ids = self.encoder.text_ids(example.prompt, example)
        return {"input_ids": ids, "labels": self.labels.index(example.completion)}

    def judge(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[dict[str, Any]]:
        """Judge each row by a classifier's label or a language model's answer."""
        judge = self._judge_labels if self.head == "classifier" else self._judge_answers
        return judge(model, rows, batch_size)

    def answer(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, **sampling: Any
    ) -> list[str]:
        """Answer each example: freely, by the most likely of its choices, or by a classifier's label.

        Args:
            sampling: forwarded to `generate` (max_new_tokens, do_sample, temperature, top_p, …).
        """
        if self.head == "classifier":
            rows = [{"input_ids": self.encoder.text_ids(one.prompt), "task": one.task} for one in examples]
            found = score_labels(model, rows, self.collate, batch_size)
            return [self.labels[logits.argmax()] for logits in found]
        if any(example.choices for example in examples):
            return self._choose(model, examples, batch_size)
        return [text.strip() for text in self._generate(model, examples, batch_size, **sampling)]

    def _choose(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> list[str]:
        """Return the most likely choice of each example, by mean log-likelihood per token."""
        rows = [
            self.encoder.join(self.encoder.prompt_ids(example), self.encoder.answer_ids(choice))
            | {"task": example.task}
            for example in examples
            for choice in example.choices
        ]
        scores = iter(self._score(model, rows, batch_size))
        chosen = []
        for example in examples:
            likelihoods, n_tokens = zip(*(next(scores) for _ in example.choices), strict=True)
            chosen.append(example.choices[most_likely(likelihoods, n_tokens)])
        return chosen

    def _generate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, **sampling: Any
    ) -> list[str]:
        """Return what the model writes after each example's prompt."""
        n_tokens = [sum(label != IGNORED for label in row["labels"]) for row in self.held_out_rows]
        n_new = sampling.pop("max_new_tokens", None) or self.settings.max_new_tokens
        positions, room = self.limits.positions, None
        if n_new is None:
            n_new = min(max(n_tokens, default=LONGEST_ANSWER), LONGEST_ANSWER, (positions or 2**31) // 2)
        if positions is not None:
            if n_new >= positions:
                raise ConfigError(
                    f"`max_new_tokens: {n_new}` leaves no room for a prompt: '{self.base.model}' has "
                    f"{positions} positions. Lower it."
                )
            room = None if self.head == "seq2seq-lm" else positions - n_new
        return generate_answers(
            model,
            [self.encoder.prompt_ids(example, room) for example in examples],
            self.processor,
            stop_ids=self.encoder.stop_ids(
                model.generation_config, is_chat=any(e.messages for e in examples)
            ),
            max_new_tokens=n_new,
            batch_size=batch_size,
            extras=self.ids_of(example.task for example in examples),
            **sampling,
        )

    def _judge_answers(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[dict[str, Any]]:
        scores = self._score(model, rows, batch_size)
        judged = [judged_row(row, **score._asdict()) for row, score in zip(rows, scores, strict=True)]
        examples = [row["example"] for row in rows]
        closed = [i for i, one in enumerate(examples) if "choice_accuracy" in self.metrics and one.choices]
        choices = self._choose(model, [examples[i] for i in closed], batch_size)
        for i, choice in zip(closed, choices, strict=True):
            judged[i] |= {"choice": choice, "choice_accuracy": float(choice == examples[i].answer)}
        written = {"exact_match": exact_match, "rouge_l": rouge_l}
        if metrics := {name: metric for name, metric in written.items() if name in self.metrics}:
            # Where both kinds of metric are given by name, rows with choices are answered freely too.
            is_auto = self.settings.metrics == "auto"
            asked = [i for i, example in enumerate(examples) if not (is_auto and example.choices)]
            answers = self._generate(model, [examples[i] for i in asked], batch_size)
            for i, text in zip(asked, answers, strict=True):
                values = {
                    name: metric(text, self.encoder.without_end(examples[i].answer))
                    for name, metric in metrics.items()
                }
                judged[i] |= {"prediction": text.strip(), **values}
        return judged

    def _judge_labels(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[dict[str, Any]]:
        judged = []
        for row, logits in zip(rows, score_labels(model, rows, self.collate, batch_size), strict=True):
            label = self.labels[logits.argmax()]
            likelihood = logits.log_softmax(-1)[row["labels"]].item()
            accuracy = float(label == row["example"].answer)
            judged.append(judged_row(row, likelihood, prediction=label, accuracy=accuracy))
        return judged

    def _score(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Score]:
        shifted = self.head == "causal-lm"
        return score_answers(model, rows, self.collate, batch_size=batch_size, shifted=shifted)

    def _read_labels(self) -> tuple[str, ...]:
        """Return the classes of the rows, sorted. Raises: DataError: if the training rows have one alone."""
        trained, held_out = (
            {label for one in examples for label in one.choices or [one.completion]}
            for examples in (self.train_examples, self.held_out_examples)
        )
        if len(trained) == 1:
            raise DataError(
                f"All {len(self.train_examples)} training rows have the answer {min(trained)!r}: a "
                "classifier needs two or more."
            )
        if self.train_examples and held_out - trained:
            unseen = ", ".join(map(repr, sorted(held_out - trained)[:4]))
            logger.warning("Held-out rows have classes that no training row has: %s.", unseen)
        return tuple(sorted(trained | held_out))

    def _warn_of_endless_answers(self) -> None:
        """Warn of answers that end by no token at which writing stops."""
        if not self.train_examples or self.head == "classifier":
            return
        has_chats = any(example.messages for example in self.train_examples)
        if not has_chats and self.processor.eos_token_id is None:
            logger.warning(
                "The tokenizer of '%s' has no end token: the model cannot learn to stop, and will answer "
                "up to `max_new_tokens`. Set its `eos_token`.",
                self.base.model,
            )
        if has_chats and self.head == "causal-lm" and self.encoder.chat.turn_end is None:
            logger.warning(
                "The chat template ends an answer by no special token: the model cannot learn to stop, and "
                "will answer up to `max_new_tokens`. Let `data.chat_template` write {{ eos_token }} there."
            )

    def _pack(self) -> None:
        """Pack the training rows, or say why not. Raises: ConfigError: if they must be and cannot."""
        length = self.encoder.max_length
        share = fill(self.train_rows, length)
        refusal = self._why_not_packed()
        if self.data.packing == "auto" and (refusal or share >= AUTO_FILL):
            logger.info("packing: off, %s", refusal or f"rows fill {share:.0%} of max_length={length}")
            return
        if refusal:
            raise ConfigError(f"`data.packing: true` needs a causal language model: {refusal}.")
        self.unpacked_rows = self.train_rows
        self.train_rows = pack_rows(self.unpacked_rows, length)
        logger.info(
            "packing: on, %d rows in %d sequences of up to %d tokens; padding %.0f %%, up to %.0f %% before",
            len(self.unpacked_rows), len(self.train_rows), length,
            100 * (1 - fill(self.train_rows, length)), 100 * (1 - share),
        )  # fmt: skip

    def _why_not_packed(self) -> str | None:
        if self.head != "causal-lm":
            return f"'{self.base.model}' is used as a {self.head}"
        if self.data.sampling != "each":
            return f"`data.sampling: {self.data.sampling}` draws tasks"
        kind: Any = AutoModelForCausalLM._model_mapping.get(type(self.base_config), None)
        source = inspect.getsource(sys.modules[kind.__module__]) if inspect.isclass(kind) else ""
        if "position_ids=position_ids" not in source or "create_causal_mask" not in source:
            return f"{getattr(kind, '__name__', 'the model')} does not make masks from positions"
        return None

    def _choose_metrics(self) -> tuple[str, ...]:
        wanted, examples = self.settings.metrics, self.held_out_examples
        if wanted == "auto":
            if self.head == "classifier":
                return ("accuracy",)
            has_choices = any(example.choices for example in examples)
            has_short = any(not one.choices and one.format in SHORT_ANSWERS for one in examples)
            return ("choice_accuracy",) * has_choices + ("exact_match", "rouge_l") * has_short
        for name in wanted:
            if name not in METRICS:
                raise ConfigError(
                    f"Unknown metric '{name}' in `objective.metrics`. {did_you_mean(name, METRICS)}"
                )
        open_example = next((example for example in examples if not example.choices), None)
        if "choice_accuracy" in wanted and open_example is not None:
            raise DataError(f"{open_example.where}: `choice_accuracy` needs `choices` in every held-out row.")
        if ("accuracy" in wanted) != (self.head == "classifier"):
            raise ConfigError(
                "`accuracy` is the metric of a classifier (`base.head: classifier`), and its only one."
            )
        return tuple(wanted)


def loader_of(head: str, config: Any) -> Any:
    """Return the Auto class of a head; some language models are only known with their part for images."""
    known = AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping
    is_larger = [type(config) in mapping for mapping in known] == [False, True]
    return AutoModelForImageTextToText if head == "causal-lm" and is_larger else HEADS[head]


def head_of(base: TextBase, config: Any) -> Literal["causal-lm", "seq2seq-lm", "classifier"]:
    """Return what a base computes: `base.head`, or what its config says. Raises: ConfigError: if nothing."""
    if base.head != "auto":
        return base.head
    name = (config.architectures or ["no architecture"])[0]
    if name.endswith("ForSequenceClassification"):
        return "classifier"
    if config.is_encoder_decoder:
        return "seq2seq-lm"
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "causal-lm"  # a vision-language model too, on text alone
    raise ConfigError(
        f"Cannot tell from its config ({name}) what '{base.model}' should compute. "
        "Set `base.head` to causal-lm, seq2seq-lm or classifier."
    )
