"""How likely a language model finds given answers, and what it answers itself; batched by length."""

from __future__ import annotations

__all__ = ["Score", "by_length", "generate_answers", "on_device", "score_answers", "score_labels"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from thawline.data.text.encode import IGNORED

Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]
"""Makes a batch of rows."""


class Score(NamedTuple):
    """Log-likelihood of a row's learned tokens, in nats, and their number."""

    log_likelihood: float
    n_tokens: int


@torch.no_grad()
def score_answers(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    collate: Collate,
    *,
    batch_size: int,
    shifted: bool = True,
) -> list[Score]:
    """Log-likelihood of every row's labels under the model, teacher-forced.

    Args:
        model: a language model whose forward returns `logits` (B, T, V).
        rows: token rows with `input_ids` and `labels`; label −100 is not counted.
        collate: makes a batch of rows.
        batch_size: rows a forward.
        shifted: logits at t predict label t + 1 (causal LMs); False: label t (encoder-decoders).

    Returns: one score a row, in the order given.
    """
    scores: list[Score] = [Score(0.0, 0)] * len(rows)
    device = _device(model)
    for indices in by_length(rows, batch_size, "scoring"):
        batch = on_device(collate([rows[i] for i in indices]), device)
        labels = batch["labels"]
        # Prompt tuning puts tokens of its own in front.
        logits = model(**batch).logits[:, -labels.shape[1] :]
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        learned = labels != IGNORED
        # Only the learned positions are widened to float32: a vocabulary is large.
        losses = torch.zeros(labels.shape, device=device)
        losses[learned] = F.cross_entropy(logits[learned].float(), labels[learned], reduction="none")
        for i, total, n in zip(indices, losses.sum(1).tolist(), learned.sum(1).tolist(), strict=True):
            scores[i] = Score(-total, n)
    return scores


@torch.no_grad()
def score_labels(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], collate: Collate, batch_size: int
) -> list[Tensor]:
    """A classifier's logits (C,) for every row, float32 on the CPU, in the order given."""
    logits: list[Tensor] = [torch.empty(0)] * len(rows)
    device = _device(model)
    for indices in by_length(rows, batch_size, "scoring"):
        batch = on_device(collate([rows[i] for i in indices]), device)
        for i, found in zip(indices, model(**batch).logits.float().cpu(), strict=True):
            logits[i] = found
    return logits


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    batch_size: int,
    extras: Mapping[str, Sequence[int]] | None = None,
    **sampling: Any,
) -> list[str]:
    """What the model writes after each prompt, greedily unless `sampling` says otherwise.

    Args:
        model: a model with `generate`.
        prompts: token ids.
        tokenizer: the prompts' own.
        max_new_tokens: longest answer.
        batch_size: prompts at a time.
        extras: one value a prompt for further arguments of `generate` (task ids).
        sampling: forwarded to `generate` (do_sample, temperature, top_p, num_beams, …).

    Returns: one text a prompt, in the order given, without special tokens.
    """
    answers = [""] * len(prompts)
    device = _device(model)
    is_seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    rows = [{"input_ids": prompt} for prompt in prompts]
    for indices in by_length(rows, batch_size, "answering"):
        longest = max(len(prompts[i]) for i in indices)
        # Padding goes to the left, so that every answer starts right after its prompt.
        ids = torch.full((len(indices), longest), tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        more = {name: [values[i] for i in indices] for name, values in (extras or {}).items()}
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            # Trainer switches the cache off in the model's config.
            use_cache=True,
            **{"do_sample": False, **sampling},
            **more,
        )
        texts = tokenizer.batch_decode(
            written if is_seq2seq else written[:, longest:], skip_special_tokens=True
        )
        for i, text in zip(indices, texts, strict=True):
            answers[i] = text
    return answers


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on `device`; what else it holds (task ids) stays as it is."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def by_length(rows: Sequence[Mapping[str, Any]], batch_size: int, what: str) -> Iterator[list[int]]:
    """Indices of batches of similar length, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    # disable=None: no bar where stderr is not a terminal.
    yield from tqdm(batches, desc=what, unit="batch", leave=False, dynamic_ncols=True, disable=None)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
