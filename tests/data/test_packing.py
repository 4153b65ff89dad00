"""Packed rows learn what padded rows learn."""

from __future__ import annotations

import json
import logging
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from transformers import modeling_flash_attention_utils

import thawline
from tests.support.text import byte_tokenizer, save_tiny_bert, save_tiny_t5
from tests.support.text_runs import logged, stop_at_batch, weights
from thawline.data.text.packing import collate_packs, pack_rows
from thawline.errors import ConfigError
from thawline.recipe import RunConfig
from thawline.run import run
from thawline.training.text.objective import TextObjective

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
BASES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **HEADS)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SIZES, **HEADS, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=259, n_embd=16, n_layer=2, n_head=4, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
        )
    ),
}
LENGTH = 32


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    lines = [
        {"input": "ab" * (1 + i % 4), "output": "c" * (1 + i % 3), "task": f"t{i % 2}"} for i in range(9)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def recipe(model: Path, rows: str, **sections: object) -> RunConfig:
    data = {"path": rows, "max_length": LENGTH, "packing": True} | sections.pop("data", {})
    values = {"base": str(model), "data": data, "folder": str(Path(rows).parent / "runs"), **sections}
    return RunConfig.from_mapping({"training": {"batch_size": 2, "max_steps": 4, "log_every": 1}} | values)


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    BASES[name]().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_packs_hold_every_row_once_and_are_full() -> None:
    lengths = [9, 1, 5, 7, 3, 3, 2, 8]
    rows = [
        {"input_ids": [i] * n, "labels": [i] * n, "task": str(i), "example": None}
        for i, n in enumerate(lengths)
    ]
    packs = pack_rows(rows, 10)
    assert sorted(token for pack in packs for token in pack["input_ids"]) == sorted(
        i for i, n in enumerate(lengths) for _ in range(n)
    )
    assert [len(pack["input_ids"]) for pack in packs] == [10, 10, 10, 8]
    assert packs[0]["position_ids"] == [*range(9), 0]
    assert [packs[0]["labels"][i] for i in (0, 1, 9)] == [-100, 0, -100]
    batch = collate_packs(packs, 99)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (4, 10)
    assert batch["position_ids"][3, -2:].tolist() == [0, 1]
    assert "attention_mask" not in batch


@pytest.mark.filterwarnings("ignore:apply_lean")
@pytest.mark.parametrize("method", ["paca", "lora", "mhr"])
@pytest.mark.parametrize("base", BASES)
def test_logits_and_gradients_are_those_of_padded_rows(
    tmp_path: Path, rows: str, base: str, method: str
) -> None:
    tuner = {"method": method, "r": 4} | ({"n_heads": 2, "n_skills": 2} if method == "mhr" else {})
    objective = TextObjective(recipe(save(base, tmp_path / base), rows, tuner=tuner), described={})
    model = objective.build_model().train()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:  # adapters start at zero, where tasks do not differ
            torch.nn.init.normal_(parameter, std=0.05)
    assert len(objective.train_rows) < len(objective.unpacked_rows) == 9

    def gradients(batch_rows: object) -> tuple[dict, torch.Tensor]:
        model.zero_grad()
        batch = dict(objective.collate(batch_rows))
        n_learned = (batch["labels"][:, 1:] != -100).sum()
        output = model(**batch)
        output.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        learned = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
        return grads, n_learned, output.logits[learned].detach()

    packed, n_packed, packed_logits = gradients(objective.train_rows)
    padded, n_padded, padded_logits = gradients(objective.unpacked_rows)
    assert n_packed == n_padded
    distance = torch.cdist(packed_logits, padded_logits, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.amin(1).max() < 1e-5  # every logit of the packs is one of the rows', in another order
    assert distance.amin(0).max() < 1e-5
    assert packed.keys() == padded.keys()
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["lora", "mhr"])
def test_a_packed_run_that_was_killed_resumes_bit_for_bit(
    tmp_path: Path, rows: str, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="thawline")
    base = save("llama", tmp_path / "llama")

    def config(name: str) -> RunConfig:
        training = {"batch_size": 1, "max_steps": 6, "log_every": 1, "save_every": 2}
        tuner = {"method": method, "r": 4, "dropout": 0.2}
        return recipe(base, rows, name=name, tuner=tuner, training=training)

    straight = run(config("straight"))
    assert "packing: on, 9 rows in " in caplog.text
    pid = os.fork()
    if pid == 0:
        try:
            stop_at_batch(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
            run(config("killed"))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    resumed = run(config("killed"), resume=True)
    assert "Resuming from " in caplog.text
    assert "checkpoint-" in caplog.text.partition("Resuming from ")[2]
    assert logged(resumed.folder) == logged(straight.folder)
    for name, value in weights(straight.folder).items():
        assert torch.equal(weights(resumed.folder)[name], value), name


def test_packs_are_planned_with_their_masks(tmp_path: Path, rows: str) -> None:
    config = recipe(save("llama", tmp_path / "llama"), rows, tuner={"method": "paca", "r": 4})
    plan = thawline.plan(config)
    assert plan.bytes["saved"] > thawline.plan(config, **{"data.packing": False}).bytes["saved"]


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """Flash attention over sequences of several lengths, without its speed; q, k, v are (N, heads, D)."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    ends = cu_seqlens_q.tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            q[:, start:end], k[:, start:end], v[:, start:end], is_causal=True, scale=options["softmax_scale"]
        )
        for start, end in pairwise(ends)
    ]
    return torch.cat(parts, 1).transpose(0, 1)


def test_flash_attention_gets_the_boundaries_of_all_rows(
    tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers looks for them only in batches of one sequence."""
    base = {"model": str(save("llama", tmp_path / "llama")), "attn_implementation": "flash_attention_2"}
    objective = TextObjective(recipe(Path(), rows, base=base), described={})
    batch = objective.collate(objective.train_rows)
    assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in objective.unpacked_rows))
    model = BASES["llama"]().eval()
    expected = model(**objective.collate(objective.unpacked_rows))
    seen = []

    def varlen(*args, **options):
        seen.append(len(options["cu_seqlens_q"]) - 1)
        return varlen_attention(*args, **options)

    functions = (None, varlen, None, None, None), (lambda **options: options, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: functions)
    model.config._attn_implementation = "flash_attention_2"
    output = model(**batch)
    assert seen == [9, 9]  # rows, in both layers
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="Cannot load .*flash"):
        objective.load_base()


def test_auto_packs_short_rows_of_causal_models_only(
    tmp_path: Path, rows: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="thawline")
    base, auto = save("llama", tmp_path / "llama"), {"packing": "auto"}
    assert TextObjective(recipe(base, rows, data=auto), described={}).unpacked_rows
    full = recipe(base, rows, data={"packing": "auto", "max_length": 9})
    assert not TextObjective(full, described={}).unpacked_rows
    assert "packing: off, rows fill " in caplog.text
    t5 = recipe(save_tiny_t5(tmp_path / "t5"), rows, data=auto)
    assert not TextObjective(t5, described={}).unpacked_rows


def test_what_cannot_be_packed_is_refused(tmp_path: Path, rows: str) -> None:
    with pytest.raises(ConfigError, match="packing: true.* needs a causal language model: .*seq2seq-lm"):
        TextObjective(recipe(save_tiny_t5(tmp_path / "t5"), rows), described={})
    bert = {"model": str(save_tiny_bert(tmp_path / "bert")), "head": "classifier"}
    with pytest.raises(ConfigError, match="classifier"):
        TextObjective(recipe(Path("x"), rows, base=bert), described={})
    with pytest.raises(ConfigError, match="`data.sampling: equal` draws tasks"):
        recipe(tmp_path, rows, data={"sampling": "equal"})
    bloom = transformers.BloomConfig(vocab_size=259, hidden_size=16, n_layer=1, n_head=4)
    transformers.BloomForCausalLM(bloom).save_pretrained(tmp_path / "bloom")
    byte_tokenizer().save_pretrained(tmp_path / "bloom")
    with pytest.raises(ConfigError, match="BloomForCausalLM does not make masks from positions"):
        TextObjective(recipe(tmp_path / "bloom", rows), described={})
