"""The match objective: an input and its choices are embedded by one encoder, and the nearest choice wins.

    score(x, c) = scale · cos(e(x), e(c)),  e: mean of the last hidden states over a text's tokens
    loss = cross-entropy of the scores over the choices of x's own row

Any classification task goes through one model without a head of its own, an untrained one included
(zero-shot). It is the bi-encoder of Sentence-BERT (Reimers & Gurevych, 2019), with a row's choices in the
place of in-batch negatives; 20 is the scale its library trains with.

A choice is embedded once a batch for each task whose rows have it, and under that task's routing, however
many rows share it.
"""

from __future__ import annotations

__all__ = ["MatchObjective", "match_loss", "mean_pooled"]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from thawline.data.text.encode import collate_tokens
from thawline.data.text.rows import Example
from thawline.errors import ConfigError, DataError
from thawline.recipe import MatchSettings, RunConfig
from thawline.training.objective import ReadRows
from thawline.training.text.base import RowObjective, judged_row
from thawline.training.text.pretrained import load_pretrained
from thawline.training.text.scoring import by_length, on_device

NO_CHOICE = -1
"""Fills up the rows of `choice_index`."""


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
        if load_pretrained(AutoConfig, base).is_encoder_decoder:
            raise ConfigError(f"`objective: match` needs an encoder; '{base.model}' is an encoder-decoder.")
        self._tokens: dict[str, list[int]] = {}
        self.train_rows = self._encode_all(self.train_examples)
        self.held_out_rows = self._encode_all(self.held_out_examples)

    def load_base(self, source: str | None = None) -> nn.Module:
        """The pretrained encoder on the CPU, or one saved in `source`; without a pooler, which has no part in
        the mean."""
        base = self.base if source is None else dataclasses.replace(self.base, model=source, revision=None)
        model: nn.Module = load_pretrained(
            AutoModel, base, dtype=self.dtype, attn_implementation=base.attn_implementation
        )
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None
        return model

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A padded batch: `input_ids`, `attention_mask` (B, T), `labels` (B,) the place of the right choice;
        `choice_ids`, `choice_mask` (N, L) the distinct choices, `choice_index` (B, C) whose they are.

        Where tasks are routed also `task_ids` and `choice_task_ids`, lists: ids are read on the host.
        """
        places: dict[tuple[str, str], int] = {}
        index = [[places.setdefault((row["task"], c), len(places)) for c in row["choices"]] for row in rows]
        width = max(map(len, index))
        inputs = self._pad([row["input_ids"] for row in rows])
        choices = self._pad([self._choice_tokens(text) for _, text in places])
        batch: dict[str, Any] = {
            **inputs,
            "labels": torch.tensor([row["labels"] for row in rows]),
            "choice_ids": choices["input_ids"],
            "choice_mask": choices["attention_mask"],
            "choice_index": torch.tensor([row + [NO_CHOICE] * (width - len(row)) for row in index]),
        }
        batch |= self.ids_of(row["task"] for row in rows)
        return batch | self.ids_of((task for task, _ in places), "choice_task_ids")

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Mean cross-entropy of the right choices, in nats."""
        ids, choice_ids = (
            {"task_ids": batch[k]} if k in batch else {} for k in ("task_ids", "choice_task_ids")
        )
        embeddings = mean_pooled(model, batch["input_ids"], batch["attention_mask"], **ids)
        choices = mean_pooled(model, batch["choice_ids"], batch["choice_mask"], **choice_ids)
        return match_loss(embeddings, choices, batch["choice_index"], batch["labels"], self.settings.scale)

    def preview(self) -> str:
        """One training row, and its right choice in ⟦ ⟧."""
        row = self.train_rows[0]
        text = self.processor.decode(row["input_ids"])
        told = (f"⟦{c}⟧" if i == row["labels"] else c for i, c in enumerate(row["choices"]))
        return f"{text} → {' | '.join(told)}"

    def judge(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        rows: Sequence[Mapping[str, Any]],
        batch_size: int,
    ) -> list[dict[str, Any]]:
        """One judged row an example: the nearest choice, and how likely the right one was."""
        found = []
        for example, row, scores in zip(examples, rows, self._scores(model, rows, batch_size), strict=True):
            choice = row["choices"][int(scores.argmax())]
            likelihood = scores.log_softmax(-1)[row["labels"]].item()
            is_right = float(choice == example.answer)
            found.append(judged_row(example, likelihood, choice=choice, choice_accuracy=is_right))
        return found

    def answer(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, **sampling: Any
    ) -> list[str]:
        """Pick the nearest of each example's choices.

        Raises: ConfigError: without choices, or with options of free writing.
        """
        if sampling:
            raise ConfigError(f"`objective: match` picks among choices and takes no {', '.join(sampling)}.")
        if not all(example.choices for example in examples):
            raise ConfigError(
                "`objective: match` picks among choices, and the task's rows share none. Give --choices A,B."
            )
        rows = [self._encode(example, labels=0) for example in examples]
        scores = self._scores(model, rows, batch_size)
        return [one.choices[int(found.argmax())] for one, found in zip(examples, scores, strict=True)]

    @torch.no_grad()
    def _scores(self, model: nn.Module, rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[Tensor]:
        """The scores of each row's choices (C,), float32 on the CPU. A task's choices are embedded once."""
        device = next(model.parameters()).device
        pairs = dict.fromkeys((row["task"], choice) for row in rows for choice in row["choices"])
        tokens = [{"input_ids": self._choice_tokens(choice), "task": task} for task, choice in pairs]
        found = zip(pairs, self._embed(model, tokens, batch_size, device), strict=True)
        choices = {pair: F.normalize(one, dim=-1) for pair, one in found}
        embedded = self._embed(model, rows, batch_size, device)
        return [
            self.settings.scale
            * (
                torch.stack([choices[row["task"], c] for c in row["choices"]]) @ F.normalize(one, dim=-1)
            ).cpu()
            for row, one in zip(rows, embedded, strict=True)
        ]

    def _embed(
        self, model: nn.Module, rows: Sequence[Mapping[str, Any]], batch_size: int, device: torch.device
    ) -> list[Tensor]:
        """The embedding (D,) of each row's text, in the order given, float32."""
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for indices in by_length(rows, batch_size, "embedding"):
            batch = on_device(self._pad([rows[i]["input_ids"] for i in indices]), device)
            ids = self.ids_of(rows[i]["task"] for i in indices)
            embeddings = mean_pooled(model, batch["input_ids"], batch["attention_mask"], **ids)
            for i, one in zip(indices, embeddings, strict=True):
                found[i] = one
        return found

    def _encode_all(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        open_tasks = sorted({example.task for example in examples if not example.choices})
        if open_tasks:
            where = next(example.where for example in examples if not example.choices)
            shown = ", ".join(open_tasks[:4]) + (", …" if len(open_tasks) > 4 else "")
            raise DataError(
                f"{where}: no `choices`, which `objective: match` picks among. Leave out {shown} "
                "(`data.exclude_tasks`), or give them choices in the rows or in the folder's manifest.json."
            )
        return [self._encode(one, labels=one.choices.index(one.completion)) for one in examples]

    def _encode(self, example: Example, labels: int) -> dict[str, Any]:
        return {
            "input_ids": self._text_tokens(example.prompt),
            "labels": labels,
            "choices": example.choices,
            "task": example.task,
        }

    def _choice_tokens(self, choice: str) -> list[int]:
        if choice not in self._tokens:
            self._tokens[choice] = self._text_tokens(self.settings.choice_template.format(choice=choice))
        return self._tokens[choice]

    def _text_tokens(self, text: str) -> list[int]:
        ids = self.processor(text, truncation=True, max_length=self.data.max_length).input_ids
        # Not every tokenizer opens or closes a text, and the mean over no tokens has no direction.
        return list(ids) or [self.processor.pad_token_id]

    def _pad(self, texts: Sequence[list[int]]) -> dict[str, Tensor]:
        return collate_tokens([{"input_ids": ids} for ids in texts], self.processor.pad_token_id)


def mean_pooled(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> Tensor:
    """Mean of the last hidden states over a text's tokens: (B, T) → (B, D), float32."""
    hidden = model(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state.float()
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def match_loss(
    embeddings: Tensor, choices: Tensor, choice_index: Tensor, labels: Tensor, scale: float
) -> Tensor:
    """Cross-entropy of scale · cosine over each row's own choices, a mean over rows.

    Args:
        embeddings: of the inputs, (B, D).
        choices: embeddings of the distinct choices, (N, D).
        choice_index: which of them are a row's, (B, C) int64; rows of fewer choices end in −1.
        labels: place of the right choice within its row, (B,) int64.
    """
    scores = scale * F.normalize(embeddings, dim=-1) @ F.normalize(choices, dim=-1).T
    is_choice = choice_index != NO_CHOICE
    own = scores.gather(1, choice_index.clamp(min=0)).masked_fill(~is_choice, -torch.inf)
    return F.cross_entropy(own, labels)
