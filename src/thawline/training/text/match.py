"""The match objective: one encoder embeds an input and its choices, and the nearest choice wins.

    score(x, c) = scale · cos(e(x), e(c)),  e: mean of the last hidden states over a text's tokens
    loss = cross-entropy of the scores over the choices of x's row

Any classification task fits one model that has no head, an untrained one included (zero-shot). It is the
bi-encoder of Sentence-BERT (Reimers & Gurevych, 2019), with a row's choices in place of in-batch negatives;
20 is the scale its library trains with.

A choice is embedded once per batch for each task whose rows have it, under that task's routing, however many
rows share it.
"""

from __future__ import annotations

__all__ = ["MatchObjective", "match_loss", "mean_pooled"]

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from thawline.data.text.rows import Example
from thawline.errors import ConfigError, DataError
from thawline.recipe import MatchSettings, RunConfig
from thawline.training.objective import ReadRows
from thawline.training.text.base import Row, RowObjective, judged_row
from thawline.training.text.pretrained import load_pretrained
from thawline.training.text.rows import name_some
from thawline.training.text.scoring import batches_by_length

NO_CHOICE = -1
"""Padding of `choice_index`."""


class MatchObjective(RowObjective):
    """Rows of text with choices, the encoder that compares them, and how often it is right.

    Every row needs choices, from the row or from the folder's manifest.

    Raises: DataError: for rows that cannot be read as asked, or have no choices.
        ConfigError: for an encoder-decoder, or another setting that cannot work.
    """

    settings: MatchSettings
    metrics = ("choice_accuracy",)
    needs_choices = True

    def __init__(self, config: RunConfig, *, read: ReadRows = "all", described: Mapping[str, Any]) -> None:
        super().__init__(config, read=read, described=described)
        base = self.base
        if base.head != "auto":
            raise ConfigError(f"`objective: match` has no head, got `base.head: {base.head}`. Leave it out.")
        if self.data.packing is True:
            raise ConfigError(
                "`data.packing: true` needs a causal language model; `objective: match` has none."
            )
        if load_pretrained(AutoConfig, base).is_encoder_decoder:
            raise ConfigError(f"`objective: match` needs an encoder; '{base.model}' is an encoder-decoder.")
        self._known_ids: dict[str, list[int]] = {}
        self.encoder = self.build_encoder()
        self.encode_rows()

    def load_base(self, source: str | None = None) -> nn.Module:
        """Load the pretrained encoder, or one saved in `source`, without its pooler: the mean bypasses it."""
        model = self.load_model(AutoModel, source)
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None
        return model

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Build a padded batch of inputs and of the choices of all rows.

        `input_ids`, `attention_mask` (B, T); `labels` (B,), index of the right choice within its row;
        `choice_ids`, `choice_mask` (N, L), the distinct choices; `choice_index` (B, C), a row's choices among
        them. Where tasks are routed, `task_ids` and `choice_task_ids` too.
        """
        places: dict[tuple[str, str], int] = {}
        index = [
            [places.setdefault((row["task"], c), len(places)) for c in row["example"].choices] for row in rows
        ]
        width = max(map(len, index))
        choices = self._pad_texts(self._choice_rows(places))
        batch: dict[str, Any] = {
            **self._pad_texts(rows),
            "labels": torch.tensor([row["labels"] for row in rows]),
            "choice_ids": choices["input_ids"],
            "choice_mask": choices["attention_mask"],
            "choice_index": torch.tensor([row + [NO_CHOICE] * (width - len(row)) for row in index]),
        }
        if "task_ids" in choices:
            batch["choice_task_ids"] = choices["task_ids"]
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean cross-entropy of the right choices, in nats."""
        task_ids, choice_task_ids = batch.get("task_ids"), batch.get("choice_task_ids")
        embeddings = mean_pooled(model, batch["input_ids"], batch["attention_mask"], task_ids)
        choices = mean_pooled(model, batch["choice_ids"], batch["choice_mask"], choice_task_ids)
        return match_loss(embeddings, choices, batch["choice_index"], batch["labels"], self.settings.scale)

    def preview(self) -> str:
        """Return one training row, its right choice in ⟦ ⟧."""
        row = self.train_rows[0]
        choices = [f"⟦{c}⟧" if i == row["labels"] else c for i, c in enumerate(row["example"].choices)]
        return f"{self.processor.decode(row['input_ids'])} → {' | '.join(choices)}"

    def encode(self, example: Example) -> dict[str, Any]:
        """Return the `input_ids` of an example's prompt, and as `labels` the index of the right choice.

        Raises: DataError: for a row without choices, naming all tasks that have such rows.
        """
        if not example.choices:
            examples = (*self.train_examples, *self.held_out_examples)
            tasks = sorted({one.task for one in examples if not one.choices})
            raise DataError(
                f"{example.where}: no `choices`, which `objective: match` picks among. Leave out "
                f"{name_some(tasks)} (`data.exclude_tasks`), or give them choices in the rows or in the "
                "folder's manifest.json."
            )
        labels = example.choices.index(example.completion)
        return {"input_ids": self._text_ids(example.prompt, example), "labels": labels}

    def judge(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[dict[str, Any]]:
        """Judge each row by its nearest choice, with the log-likelihood of the right one."""
        judged = []
        for row, scores in zip(rows, self._scores(model, rows, batch_size), strict=True):
            choice = row["example"].choices[int(scores.argmax())]
            likelihood = scores.log_softmax(-1)[row["labels"]].item()
            accuracy = float(choice == row["example"].answer)
            judged.append(judged_row(row, likelihood, choice=choice, choice_accuracy=accuracy))
        return judged

    def answer(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, **sampling: Any
    ) -> list[str]:
        """Pick the nearest of each example's choices.

        Raises: ConfigError: without choices, or with options of `generate`.
        """
        if sampling:
            raise ConfigError(f"`objective: match` picks among choices and takes no {', '.join(sampling)}.")
        if not all(example.choices for example in examples):
            raise ConfigError(
                "`objective: match` picks among choices, and the task's rows share none. Give --choices A,B."
            )
        rows = [
            {"input_ids": self._text_ids(one.prompt), "task": one.task, "example": one} for one in examples
        ]
        scores = self._scores(model, rows, batch_size)
        return [one.choices[int(found.argmax())] for one, found in zip(examples, scores, strict=True)]

    @torch.no_grad()
    def _scores(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Tensor]:
        """Return the scores of each row's choices (C,), float32 on the CPU."""
        pairs = dict.fromkeys((row["task"], choice) for row in rows for choice in row["example"].choices)
        embedded = self._embed(model, self._choice_rows(pairs), batch_size)
        choices = dict(zip(pairs, embedded, strict=True))
        return [
            self.settings.scale
            * (torch.stack([choices[row["task"], c] for c in row["example"].choices]) @ one).cpu()
            for row, one in zip(rows, self._embed(model, rows, batch_size), strict=True)
        ]

    def _embed(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Tensor]:
        """Return the unit embedding (D,) of each row's text, in the order given, float32."""
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for indices, batch in batches_by_length(model, rows, self._pad_texts, batch_size, "embedding"):
            for i, one in zip(indices, mean_pooled(model, **batch), strict=True):
                found[i] = F.normalize(one, dim=-1)
        return found

    def _pad_texts(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self.pad(rows, "input_ids")

    def _choice_rows(self, pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
        """Encode choices, given with their tasks."""
        return [{"input_ids": self._choice_ids(choice), "task": task} for task, choice in pairs]

    def _choice_ids(self, choice: str) -> list[int]:
        if choice not in self._known_ids:
            self._known_ids[choice] = self._text_ids(self.settings.choice_template.format(choice=choice))
        return self._known_ids[choice]

    def _text_ids(self, text: str, example: Example | None = None) -> list[int]:
        # Not every tokenizer opens or closes a text, and the mean over no tokens has no direction.
        return self.encoder.text_ids(text, example) or [self.processor.pad_token_id]


def mean_pooled(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, task_ids: list[int] | None = None
) -> Tensor:
    """Average the last hidden states over a text's tokens: (B, T) → (B, D), float32."""
    routed = {} if task_ids is None else {"task_ids": task_ids}
    output = model(input_ids=input_ids, attention_mask=attention_mask, **routed)
    hidden = output.last_hidden_state.float()
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def match_loss(
    embeddings: Tensor, choices: Tensor, choice_index: Tensor, labels: Tensor, scale: float
) -> Tensor:
    """Return the cross-entropy of scale · cosine over each row's choices, a mean over rows.

    Args:
        embeddings: embeddings of the inputs, (B, D).
        choices: embeddings of the distinct choices, (N, D).
        choice_index: a row's choices among them, (B, C) int64; rows of fewer choices end in −1.
        labels: index of the right choice within its row, (B,) int64.
    """
    scores = scale * F.normalize(embeddings, dim=-1) @ F.normalize(choices, dim=-1).T
    is_choice = choice_index != NO_CHOICE
    own = scores.gather(1, choice_index.clamp(min=0)).masked_fill(~is_choice, -torch.inf)
    return F.cross_entropy(own, labels)
