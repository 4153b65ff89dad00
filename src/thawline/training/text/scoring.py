"""Log-likelihoods of given answers, label logits and generated answers, in batches of similar length."""

from __future__ import annotations

__all__ = ["Score", "batches_by_length", "generate_answers", "score_answers", "score_labels"]

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from thawline.data.text.encode import IGNORED

Rows = Sequence[Mapping[str, Any]]
Collate = Callable[[Rows], Mapping[str, Any]]


class Score(NamedTuple):
    """Log-likelihood of a row's learned tokens, in nats, and their number."""

    log_likelihood: float
    n_tokens: int


@torch.no_grad()
def score_answers(
    model: nn.Module, rows: Rows, collate: Collate, *, batch_size: int, shifted: bool = True
) -> list[Score]:
    """Compute the log-likelihood of every row's labels under the model, teacher-forced.

    Args:
        model: a language model whose forward returns `logits` (B, T, V).
        rows: token rows with `input_ids` and `labels`; label −100 is not counted.
        collate: builds a batch of rows.
        batch_size: rows per forward pass.
        shifted: logits at t predict label t + 1 (causal LMs); False: label t (encoder-decoders).

    Returns: one score per row, in the order given.
    """
    scores: list[Score] = [Score(0.0, 0)] * len(rows)
    for indices, batch in batches_by_length(model, rows, collate, batch_size, "scoring"):
        labels = batch["labels"]
        # Prompt tuning puts tokens of its own in front.
        logits = model(**batch).logits[:, -labels.shape[1] :]
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        learned = labels != IGNORED
        # Only the learned positions are widened to float32: a vocabulary is large.
        losses = torch.zeros(labels.shape, device=labels.device)
        losses[learned] = F.cross_entropy(logits[learned].float(), labels[learned], reduction="none")
        for i, total, n in zip(indices, losses.sum(1).tolist(), learned.sum(1).tolist(), strict=True):
            scores[i] = Score(-total, n)
    return scores


@torch.no_grad()
def score_labels(model: nn.Module, rows: Rows, collate: Collate, batch_size: int) -> list[Tensor]:
    """Compute a classifier's logits (C,) for every row, float32 on the CPU, in the order given."""
    logits: list[Tensor] = [torch.empty(0)] * len(rows)
    for indices, batch in batches_by_length(model, rows, collate, batch_size, "scoring"):
        for i, found in zip(indices, model(**batch).logits.float().cpu(), strict=True):
            logits[i] = found
    return logits


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    extras: Mapping[str, Sequence[int]] | None = None,
    **sampling: Any,
) -> list[str]:
    """Generate an answer to each prompt, greedily unless `sampling` says otherwise.

    Args:
        model: a model with `generate`.
        prompts: token ids.
        tokenizer: the prompts' tokenizer.
        stop_ids: tokens that end an answer.
        max_new_tokens: longest answer.
        batch_size: prompts at a time.
        extras: further arguments of `generate`, one value per prompt (task ids).
        sampling: forwarded to `generate` (do_sample, temperature, top_p, num_beams, …).

    Returns: one text per prompt, in the order given, without special tokens and ending before the first
    of the base's stop strings.
    """
    answers = [""] * len(prompts)
    stops = sampling.get("stop_strings", model.generation_config.stop_strings) or []
    end = "|".join(map(re.escape, [stops] if isinstance(stops, str) else stops))
    is_seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))

    def pad_left(rows: Rows) -> dict[str, Tensor]:
        """Pad to the left, so that every answer starts right after its prompt."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            start = longest - len(row["input_ids"])
            ids[i, start:] = torch.tensor(row["input_ids"])
            mask[i, start:] = 1
        return {"input_ids": ids, "attention_mask": mask}

    rows = [{"input_ids": prompt} for prompt in prompts]
    for indices, batch in batches_by_length(model, rows, pad_left, batch_size, "answering"):
        written = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=list(stop_ids) or None,
            use_cache=True,  # Trainer switches the cache off in the model's config
            tokenizer=tokenizer,  # for the stop strings of a generation config
            **{"do_sample": False, "num_return_sequences": 1, **sampling},
            **{name: [values[i] for i in indices] for name, values in (extras or {}).items()},
        )
        # A decoder of its own starts from one token, which may be an end token (BART).
        written = written[:, 1 if is_seq2seq else batch["input_ids"].shape[1] :]
        for i, ids in zip(indices, written.tolist(), strict=True):
            ids = list(takewhile(lambda token: token not in stop_ids, ids))
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            answers[i] = re.split(end, answer, maxsplit=1)[0] if end else answer
    return answers


def batches_by_length(
    model: nn.Module, rows: Rows, collate: Collate, batch_size: int, title: str
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield batches of rows of similar length on the model's device, and their indices, with a progress bar.

    The longest come first, so that memory runs out at once or never.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    # disable=None: no bar where stderr is not a terminal.
    for indices in tqdm(chunks, desc=title, unit="batch", leave=False, dynamic_ncols=True, disable=None):
        batch = collate([rows[i] for i in indices])
        # Task ids are a list and stay on the host.
        yield (
            indices,
            {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()},
        )
