"""The text objective: next tokens of a causal or encoder-decoder model, or the label of a classifier."""

from __future__ import annotations

__all__ = ["TextObjective", "load_processor"]

import dataclasses
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from thawline.data.text import (
    IGNORED,
    Example,
    TextEncoder,
    collate_tokens,
    load_examples,
    prompt_example,
    split_examples,
)
from thawline.errors import ConfigError, DataError, did_you_mean
from thawline.metrics.text import METRICS, exact_match, most_likely, rouge_l
from thawline.recipe import TextBase, TextData, TextSettings
from thawline.training.objective import Evaluation
from thawline.training.scoring import Score, generate_answers, score_answers, score_labels

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


class TextObjective:
    """Rows of text, the model that reads them, and how its answers are judged.

    Args:
        settings: the recipe's objective.
        base: the model.
        data: the rows.
        dtype: of the weights.
        seed: draws `max_rows` and `eval_fraction`.
        read: which rows to read; predicting needs none, evaluating the held-out ones.
        labels: of a classifier, where no rows are read.

    Raises: DataError: for rows that cannot be read as asked. ConfigError: for settings that do not fit them.
    """

    smaller_is_better: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        settings: TextSettings,
        base: TextBase,
        data: TextData,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        read: Literal["all", "held-out", "none"] = "all",
        labels: Sequence[str] = (),
    ) -> None:
        self.settings, self.base, self.data, self.dtype = settings, base, data, dtype
        self.config = _load(AutoConfig, base)
        self.head = _head(base, self.config)
        self.processor = load_processor(base)
        self.encode = TextEncoder(
            self.processor,
            max_length=data.max_length,
            learn_prompt=settings.loss_on == "all",
            seq2seq=self.head == "seq2seq-lm",
            chat_template=data.chat_template,
        )
        examples = _read(data, data.path) if read != "none" else []
        held_out = _read(data, data.eval_path) if read != "none" and data.eval_path is not None else None
        split = split_examples(examples, held_out, fraction=data.eval_fraction, seed=seed)
        self.format = examples[0].format if examples else data.format
        self.labels = tuple(labels) or (_labels(examples) if self.head == "classifier" else ())
        self.held_out_examples = _draw(split.held_out, data.max_eval_rows, seed)
        self.train_examples = _draw(split.train, data.max_rows, seed) if read == "all" else []
        if read == "all" and not self.train_examples:
            raise DataError(f"'{data.path}' holds no row to train on: every row is marked as held out.")
        self.train_rows = self._encode_all(self.train_examples)
        self.held_out_rows = self._encode_all(self.held_out_examples)
        self.metrics = self._choose_metrics()

    def load_base(self, source: str | None = None) -> nn.Module:
        """The pretrained model on the CPU, or one saved in `source`; a classifier gets the data's labels."""
        extra: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": self.base.attn_implementation}
        if self.labels and tuple(self.config.id2label.values()) != self.labels:
            names = dict(enumerate(self.labels))
            extra |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
            extra["ignore_mismatched_sizes"] = True
        base = self.base if source is None else dataclasses.replace(self.base, model=source, revision=None)
        model = _load(HEADS[self.head], base, **extra)
        # Padding is masked everywhere but in a decoder's classifier, which finds its last token by it.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.processor.pad_token_id
        return model

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A padded batch: `input_ids`, `attention_mask` (B, T), `labels` (B, L), or (B,) of a classifier."""
        return collate_tokens(rows, self.processor.pad_token_id)

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

    def save_pictures(self, folder: Path) -> None:
        """Text has none."""

    def describe(self) -> dict[str, Any]:
        """How a text becomes a prompt, and a classifier's labels."""
        return {"format": self.format, "template": self.data.template, "labels": list(self.labels)}

    def evaluate(self, model: nn.Module, batch_size: int) -> Evaluation:
        """Loss and metrics on the held-out rows, over all of them and by task."""
        model.eval()
        judge = self._judge_labels if self.head == "classifier" else self._judge_answers
        rows = judge(model, batch_size)
        names = [name for name in METRICS if name in ("loss", *self.metrics)]
        tasks: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            tasks.setdefault(row["task"], []).append(row)
        parts = {
            task: {"rows": len(found), **_average(found, names)} for task, found in sorted(tasks.items())
        }
        return Evaluation(metrics=_average(rows, names), parts=parts, rows=rows)

    def predict(
        self,
        model: nn.Module,
        inputs: Sequence[str],
        *,
        described: Mapping[str, Any],
        choices: Sequence[str] = (),
        batch_size: int = 8,
        **sampling: Any,
    ) -> list[str]:
        """One answer a text: written, chosen from `choices`, or a classifier's label."""
        format, template = described.get("format", "text"), described.get("template")
        examples = [prompt_example(text, format, template, choices) for text in inputs]
        if self.head == "classifier":
            rows = [{"input_ids": self._classifier_ids(example)} for example in examples]
            return [
                self.labels[logits.argmax()] for logits in score_labels(model, rows, self.collate, batch_size)
            ]
        if choices:
            return self.choose(model, examples, batch_size)
        return [text.strip() for text in self.answer(model, examples, batch_size, **sampling)]

    def choose(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> list[str]:
        """For each example the choice the model finds most likely, by mean log-likelihood a token."""
        rows = [
            self.encode.join(self.encode.prompt_ids(example), self.encode.answer_ids(choice))
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

    def answer(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, **sampling: Any
    ) -> list[str]:
        """For each example what the model writes after its prompt."""
        n_tokens = [sum(label != IGNORED for label in row["labels"]) for row in self.held_out_rows]
        longest = sampling.pop("max_new_tokens", None) or self.settings.max_new_tokens
        longest = longest or min(max(n_tokens, default=LONGEST_ANSWER), LONGEST_ANSWER)
        prompts = [self.encode.prompt_ids(example)[-self.data.max_length :] for example in examples]
        return generate_answers(
            model, prompts, self.processor, max_new_tokens=longest, batch_size=batch_size, **sampling
        )

    def _judge_answers(self, model: nn.Module, batch_size: int) -> list[dict[str, Any]]:
        """One judged row a held-out example: a language model's."""
        examples = self.held_out_examples
        scores = self._score(model, self.held_out_rows, batch_size)
        rows: list[dict[str, Any]] = [
            {"task": example.task, "where": example.where, "answer": example.answer, **score._asdict()}
            for example, score in zip(examples, scores, strict=True)
        ]
        if "choice_accuracy" in self.metrics:
            for row, choice in zip(rows, self.choose(model, examples, batch_size), strict=True):
                row |= {"choice": choice, "choice_accuracy": float(choice == row["answer"])}
        if {"exact_match", "rouge_l"} & set(self.metrics):
            for row, text in zip(rows, self.answer(model, examples, batch_size), strict=True):
                row["prediction"] = text.strip()
                if "exact_match" in self.metrics:
                    row["exact_match"] = exact_match(text, row["answer"])
                if "rouge_l" in self.metrics:
                    row["rouge_l"] = rouge_l(text, row["answer"])
        return rows

    def _judge_labels(self, model: nn.Module, batch_size: int) -> list[dict[str, Any]]:
        """One judged row a held-out example: a classifier's."""
        rows = []
        all_logits = score_labels(model, self.held_out_rows, self.collate, batch_size)
        for example, row, logits in zip(self.held_out_examples, self.held_out_rows, all_logits, strict=True):
            label = self.labels[logits.argmax()]
            rows.append(
                {
                    "task": example.task,
                    "where": example.where,
                    "answer": example.answer,
                    "log_likelihood": logits.log_softmax(-1)[row["labels"]].item(),
                    "n_tokens": 1,
                    "prediction": label,
                    "accuracy": float(label == example.answer),
                }
            )
        return rows

    def _score(self, model: nn.Module, rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[Score]:
        shifted = self.head == "causal-lm"
        return score_answers(model, rows, self.collate, batch_size=batch_size, shifted=shifted)

    def _encode_all(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        before = self.encode.n_cut
        rows = [
            self._encode_label(example) if self.head == "classifier" else self.encode(example)
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
            if has_choices:
                return ("choice_accuracy",)
            return ("exact_match", "rouge_l") if examples and examples[0].format in SHORT_ANSWERS else ()
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


def load_processor(base: TextBase) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token. Raises: ConfigError: if there is none."""
    tokenizer = _load(AutoTokenizer, base)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"The tokenizer of '{base.model}' has neither a padding nor an end token.")
        # Never seen by the loss or by attention, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(loader: Any, base: TextBase, **extra: Any) -> Any:
    """`from_pretrained`, with a one-line error for what a user can mend."""
    folder = Path(base.model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"'{base.model}' is an adapter: give its base as `base.model`, and it as `tuner.start_from`."
        )
    try:
        return loader.from_pretrained(
            base.model, revision=base.revision, trust_remote_code=base.trust_remote_code, **extra
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"Cannot load '{base.model}': {reason}") from error


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


def _read(data: TextData, path: str | list[str]) -> list[Example]:
    return load_examples(path, format=data.format, template=data.template)


def _labels(examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(
        sorted({label for example in examples for label in (example.choices or (example.completion,))})
    )


def _draw(examples: list[Example], n: int | None, seed: int) -> list[Example]:
    if n is None or n >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), n))]


def _average(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Means over rows; the loss is a mean over tokens."""
    averages = {name: sum(row[name] for row in rows) / max(len(rows), 1) for name in names if name != "loss"}
    n_tokens = sum(row["n_tokens"] for row in rows)
    return {"loss": -sum(row["log_likelihood"] for row in rows) / max(n_tokens, 1), **averages}
