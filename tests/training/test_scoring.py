"""Scores and answers equal those of one row at a time, whatever the batching."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from tests.support.text import byte_tokenizer
from thawline.data.text.encode import IGNORED, collate_tokens
from thawline.training.text.scoring import generate_answers, score_answers, score_labels

ROWS = [
    {"input_ids": [1, 9, 17, 33, 40], "labels": [IGNORED, IGNORED, IGNORED, 33, 40]},
    {"input_ids": [1, 70], "labels": [IGNORED, 70]},
    {"input_ids": [1, 12, 13, 14, 15, 16, 18], "labels": [IGNORED, 12, 13, 14, 15, 16, 18]},
]
collate = partial(collate_tokens, pad_token_id=0)


def test_scores_are_the_models_own_loss_row_by_row(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    scores = score_answers(model, ROWS, collate, batch_size=2)
    for row, score in zip(ROWS, scores, strict=True):
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        assert score.n_tokens == sum(label != IGNORED for label in row["labels"][1:])
        # The model's own loss is a mean over learned tokens; float32 sums differ in their last digits.
        assert -score.log_likelihood == pytest.approx(model(**batch).loss.item() * score.n_tokens, rel=1e-5)


def test_scores_of_an_encoder_decoder_are_not_shifted() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=80, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    rows = [{"input_ids": [5, 6, 7], "labels": [9, 1]}, {"input_ids": [8], "labels": [11, 12, 13, 1]}]
    scores = score_answers(model, rows, collate, batch_size=2, shifted=False)
    for row, score in zip(rows, scores, strict=True):
        loss = model(
            input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])
        ).loss.item()
        assert score.n_tokens == len(row["labels"])
        assert -score.log_likelihood == pytest.approx(loss * score.n_tokens, rel=1e-5)


def test_answers_do_not_depend_on_the_batch_they_are_written_in(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompts = [tokenizer(text).input_ids for text in ("Hello there", "A", "What is it?")]
    options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": 6}
    together = generate_answers(model, prompts, tokenizer, **options, batch_size=3)
    alone = [generate_answers(model, [p], tokenizer, **options, batch_size=1)[0] for p in prompts]
    assert together == alone
    by_hand = model.generate(torch.tensor([prompts[1]]), max_new_tokens=6, do_sample=False)
    assert alone[1] == tokenizer.decode(by_hand[0, len(prompts[1]) :], skip_special_tokens=True)


def test_settings_of_a_generation_config_that_need_more_than_a_model_work(tiny_llama: Path) -> None:
    """Stop strings need the tokenizer, and several answers per prompt would shift them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompts = [tokenizer(text).input_ids for text in ("Hello there", "A")]
    options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": 6, "batch_size": 2}
    whole = generate_answers(model, prompts, tokenizer, **options)
    model.generation_config.update(stop_strings=[whole[0][:2]], num_return_sequences=2, do_sample=True)
    first, second = generate_answers(model, prompts, tokenizer, **options)
    assert len(first) < len(whole[0])
    assert (whole[0][: len(first)], second) == (first, whole[1])


@pytest.mark.parametrize("stops", ["\nQ:", ["(never)", "Q:", "\nQ"]])
def test_an_answer_does_not_hold_the_stop_string_that_ended_it(tiny_llama: Path, monkeypatch, stops) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompt, written = (tokenizer(text, add_special_tokens=False).input_ids for text in ("Q:", "18\nQ:"))
    monkeypatch.setattr(model, "generate", lambda **_: torch.tensor([prompt + written]))
    model.generation_config.stop_strings = stops
    options = {"stop_ids": [], "max_new_tokens": 6, "batch_size": 1}
    assert generate_answers(model, [prompt], tokenizer, **options) == ["18"]
    assert generate_answers(model, [prompt], tokenizer, **options, stop_strings=["8"]) == ["1"]


def test_an_answer_ends_at_any_of_the_stop_tokens(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompt = tokenizer("Hello there").input_ids
    written = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[
        0, len(prompt) :
    ].tolist()
    end = tokenizer.eos_token_id
    for stop in written:
        [answer] = generate_answers(
            model, [prompt], tokenizer, stop_ids=[end, stop], max_new_tokens=6, batch_size=1
        )
        assert answer == tokenizer.decode(written[: written.index(stop)], skip_special_tokens=True)


def test_label_logits_come_back_in_the_order_of_the_rows() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    for row, logits in zip(rows, score_labels(model, rows, collate, batch_size=2), strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-6)
