"""Text runs on files, tokenizers and bases as people have them: what works, and what is said of the rest."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.text import byte_tokenizer, save_tiny_bert, save_tiny_t5
from tests.support.text_runs import TextRecipes, strict_json
from thawline.cli import main
from thawline.errors import ConfigError, DataError, MissingExtraError
from thawline.recipe import RunConfig
from thawline.report.run_report import build_report
from thawline.run import evaluate, predict, run
from thawline.training.callbacks import BrokenLoss
from thawline.training.objective import Objective, build_objective

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_llama(folder: Path, tokenizer) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, *rows: object) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


def test_a_model_trained_on_chats_is_saved_with_the_end_of_its_turns(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    chat = [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": "blue"}]
    data = write_rows(tmp_path / "chats.jsonl", {"messages": chat})
    recipe = TextRecipes(save_llama(tmp_path / "base", tokenizer), data, tmp_path / "runs")
    result = run(recipe("chats", "none", max_steps=1))
    saved = GenerationConfig.from_pretrained(result.folder / "model").eos_token_id
    assert set(saved) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def built(base: Path, data: str, *, kind: str = "text", head: str = "auto", **settings: object) -> Objective:
    """Build the objective of a recipe whose data section has `settings`."""
    return build_objective(
        RunConfig.from_mapping(
            {
                "base": {"model": str(base), "head": head},
                "data": {"path": data, **settings},
                "objective": kind,
            }
        )
    )


def test_a_chat_template_that_ends_no_answer_is_said(tmp_path: Path, caplog) -> None:
    base = save_llama(tmp_path / "base", byte_tokenizer())
    chat = [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": "blue"}]
    data = write_rows(tmp_path / "chats.jsonl", {"messages": chat})
    (tmp_path / "endless.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    for template, is_endless in (("plain", False), (str(tmp_path / "endless.jinja"), True)):
        caplog.clear()
        built(base, data, chat_template=template)
        assert ("cannot learn to stop" in caplog.text) == is_endless


def test_answers_without_an_end_are_said(tmp_path: Path, caplog) -> None:
    tokenizer = byte_tokenizer()
    base = save_llama(tmp_path / "base", tokenizer)
    data = write_rows(tmp_path / "pairs.jsonl", {"input": "a", "output": "b"})
    built(base, data)
    assert "cannot learn to stop" not in caplog.text
    tokenizer.eos_token = None
    tokenizer.save_pretrained(base)
    built(base, data)
    assert "has no end token: the model cannot learn to stop" in caplog.text


def test_an_encoder_that_writes_does_not_see_the_token_to_predict(tmp_path: Path) -> None:
    base = save_tiny_bert(tmp_path)
    data = write_rows(tmp_path / "pairs.jsonl", {"input": "a", "output": "b"})
    model = built(base, data, head="causal-lm").load_base().eval()
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    first, second = model(ids).logits[:, :2]
    torch.testing.assert_close(first, second)


def test_a_classifier_needs_two_classes_and_names_those_that_it_never_sees(tmp_path: Path, caplog) -> None:
    base = save_tiny_bert(tmp_path)
    one, two = {"input": "a", "output": "no"}, {"input": "b", "output": "yes"}
    with pytest.raises(DataError, match="All 2 training rows have the answer 'no'"):
        built(base, write_rows(tmp_path / "one.jsonl", one, one), head="classifier")
    held_out = {"input": "c", "output": "maybe", "split": "test"}
    objective = built(base, write_rows(tmp_path / "rows.jsonl", one, two, held_out), head="classifier")
    assert objective.labels == ("maybe", "no", "yes")
    assert "classes that no training row has: 'maybe'" in caplog.text


def test_a_base_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", byte_tokenizer())
    for file in base.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="base': it holds no tokenizer. Save the base's there"):
        built(base, write_rows(tmp_path / "pairs.jsonl", {"input": "a", "output": "b"}))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_base_whose_files_hold_no_settings_is_named(tmp_path: Path, name: str) -> None:
    base = save_llama(tmp_path / "base", byte_tokenizer())
    (base / name).write_text("[]")
    with pytest.raises(ConfigError, match=r"Cannot load '.*base': "):
        built(base, write_rows(tmp_path / "pairs.jsonl", {"input": "a", "output": "b"}))


def test_settings_of_prompts_that_no_row_reads_are_refused(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", byte_tokenizer())
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = write_rows(tmp_path / "chats.jsonl", {"messages": chat})
    texts = write_rows(tmp_path / "texts.jsonl", {"text": "plain"})
    pairs = write_rows(tmp_path / "pairs.jsonl", {"input": "a", "output": "b"})
    for data, name, value in (
        (chats, "template", "{input}!"), (texts, "template", "{text}!"), (pairs, "chat_template", "plain"),
        (texts, "chat_options", {"enable_thinking": False}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"`data.{name}` is for .*Leave it out"):
            built(base, data, **{"chat_template": "plain" if data == chats else None, name: value})
    assert built(base, pairs, template="{input}!").train_rows


@pytest.fixture
def bases(tmp_path: Path) -> dict[str, dict]:
    """Bases of every kind, with the settings that they need."""
    llama = save_llama(tmp_path / "llama", byte_tokenizer())
    return {
        "causal": {"base": llama},
        "classifier": {"base": llama, "head": "classifier"},
        "seq2seq": {"base": save_tiny_t5(tmp_path / "t5")},
        "match": {"base": save_tiny_bert(tmp_path / "bert"), "kind": "match"},
    }


@pytest.mark.parametrize("kind", ["causal", "classifier", "seq2seq", "match"])
def test_overlong_rows_are_cut_dropped_or_named_all(tmp_path: Path, bases, kind: str, caplog) -> None:
    inputs = ["a", "b" * 40, "c" * 50, "d"]
    rows = [{"input": text, "output": "x", "choices": ["x", "y"]} for text in inputs]
    data = write_rows(tmp_path / "rows.jsonl", *rows, {**rows[2], "split": "test"})
    options = {**bases[kind], "data": data, "max_length": 16}
    with caplog.at_level(logging.WARNING, "thawline"):
        cut = built(**options)
        assert len(cut.train_rows) == 4
        assert max(len(row["input_ids"]) for row in cut.train_rows) == 16
        dropped = built(**options, overlong="drop")
        assert [row["example"].where[-1] for row in dropped.train_rows] == ["1", "4"]
        assert not dropped.held_out_rows
    assert [record.message for record in caplog.records] == [
        "3 of 5 rows were cut to max_length=16 tokens.",
        "3 of 5 rows are longer than max_length=16 tokens and left out.",
    ]
    with pytest.raises(
        DataError, match=r"^3 rows cannot be used:\n.*:2: 4\d tokens, more than.*\n.*:3: .*\n.*:5: "
    ):
        built(**options, overlong="error")
    with pytest.raises(DataError, match="All rows are longer than max_length=2 tokens"):
        built(**options | {"max_length": 2}, overlong="drop")


def test_rows_that_leave_nothing_to_learn_are_named_all(tmp_path: Path, bases) -> None:
    chat = [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b"}]
    data = write_rows(tmp_path / "chats.jsonl", *[{"messages": chat}] * 3)
    options = {**bases["causal"], "data": data, "chat_template": "plain"}
    with pytest.raises(
        DataError, match=r"^3 rows cannot be used:\n.*:1: nothing is left to learn in max_length=20"
    ):
        built(**options, max_length=20)
    assert len(built(**options).train_rows) == 3


def test_empty_answers_are_said(tmp_path: Path, bases, caplog) -> None:
    (tmp_path / "rows.csv").write_text("input,output\na,x\nb,\n")
    with caplog.at_level(logging.WARNING, "thawline"):
        built(**bases["causal"], data=str(tmp_path / "rows.csv"))
    assert "1 of 2 rows have an empty answer, first" in caplog.text


def save_gpt2(folder: Path, n_positions: int, n_tokens: int | None = None) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = GPT2Config(
        vocab_size=n_tokens or len(tokenizer), n_positions=n_positions, n_embd=8, n_layer=1, n_head=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_and_prompts_are_cut_to_the_positions_of_the_base(tmp_path: Path, caplog) -> None:
    rows = [{"prompt": "p" * 40, "completion": "c" * 5}, {"prompt": "p", "completion": "c"}]
    data = write_rows(tmp_path / "rows.jsonl", *rows, {**rows[0], "split": "test"})
    base = save_gpt2(tmp_path / "base", 24)
    with caplog.at_level(logging.WARNING, "thawline"):
        result = run(TextRecipes(base, data, tmp_path / "runs")("long", max_steps=1))
    assert "2 of 3 rows were cut to max_length=24 tokens, all positions of the base." in caplog.text
    assert evaluate(result.folder).metrics == result.metrics
    caplog.clear()
    with caplog.at_level(logging.WARNING, "thawline"):
        predict(result.folder, ["q" * 60, "q"], max_new_tokens=20)
    assert "1 of 2 texts were cut: the model takes max_length=24 tokens" in caplog.text
    predict(result.folder, ["q" * 60])
    with pytest.raises(ConfigError, match=r"`max_new_tokens: 24` leaves no room .* has 24 positions"):
        predict(result.folder, ["q"], max_new_tokens=24)
    with pytest.raises(DataError, match="more than max_length=24"):
        built(base, data, overlong="error")


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_positions_of_learned_prompts_are_not_for_rows(tmp_path: Path, method: str, caplog) -> None:
    data = write_rows(tmp_path / "rows.jsonl", {"prompt": "p" * 40, "completion": "c"})
    recipe = TextRecipes(save_gpt2(tmp_path / "base", 24), data, tmp_path / "runs")
    result = run(recipe("prompt", {"method": method, "args": {"num_virtual_tokens": 5}}, max_steps=1))
    assert "cut to max_length=19 tokens, all positions of the base." in caplog.text
    assert predict(result.folder, ["q" * 60], max_new_tokens=4)


def test_an_encoder_of_few_positions_matches_long_texts(tmp_path: Path, bases, caplog) -> None:
    data = write_rows(tmp_path / "rows.jsonl", {"input": "a" * 90, "output": "x", "choices": ["x", "y" * 90]})
    with caplog.at_level(logging.WARNING, "thawline"):
        objective = built(**bases["match"], data=data)
    assert "1 of 1 rows were cut to max_length=64 tokens, all positions of the base." in caplog.text
    model = objective.load_base()
    assert objective.loss(model, objective.collate(objective.train_rows)).isfinite()
    assert objective.predict(model, ["b" * 90], choices=["x", "z" * 90])


def test_a_token_that_the_base_does_not_know_is_named_before_training(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    base = save_llama(tmp_path / "base", byte_tokenizer())
    tokenizer.save_pretrained(base)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = write_rows(tmp_path / "chats.jsonl", {"messages": chat})
    message = r"gives .<\|im_(start|end)\|>. the number 2.* embeddings of 259.*resize_token_embeddings\(261\)"
    with pytest.raises(ConfigError, match=message):
        built(base, chats)
    plain = write_rows(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    result = run(TextRecipes(base, plain, tmp_path / "runs")("plain", max_steps=1))
    for choices in ([], ["a", "<|im_end|>"]):
        with pytest.raises(ConfigError, match=message):
            predict(result.folder, ["a" if choices else "<|im_end|>"], choices=choices)


def test_a_padding_token_that_the_base_does_not_know_is_replaced(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    base = save_llama(tmp_path / "base", byte_tokenizer())
    tokenizer.save_pretrained(base)
    rows = [
        {"prompt": "a" * n, "completion": "b", "split": split} for n in (1, 5) for split in ("train", "test")
    ]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    result = run(TextRecipes(base, data, tmp_path / "runs")("padded", max_steps=1))
    assert predict(result.folder, ["a", "aaaa"], max_new_tokens=2)


SPLITS = [
    {"prompt": f"{i}", "completion": "x", "split": "test" if i % 4 == 0 else "train"} for i in range(16)
]
BROKEN = {"lr": 1e30, "max_grad_norm": 0, "warmup": 0, "schedule": "constant", "max_steps": 6, "log_every": 1}


@pytest.mark.parametrize("kind", ["text", "match"])
def test_a_loss_that_is_not_finite_ends_the_run_or_is_said(tmp_path: Path, bases, kind: str, caplog) -> None:
    rows = [{**row, "input": row["prompt"], "output": "x", "choices": ["x", "y"]} for row in SPLITS]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    base = bases["match" if kind == "match" else "causal"]["base"]

    def recipe(name: str, **training: object) -> RunConfig:
        config = TextRecipes(base, data, tmp_path / "runs")(name, "none", **BROKEN, **training)
        return RunConfig.from_mapping({**config.to_mapping(), "objective": {"kind": kind}})

    stopped = recipe("stopped", save_every=1)
    with pytest.raises(
        ConfigError, match=r"the loss was nan at step (\d) \(epoch .*`training.lr`.* 1e\+30 here"
    ):
        run(stopped)
    steps = {line["step"] for line in strict_json(stopped.run_folder / "metrics.jsonl")}
    assert not [path for path in stopped.run_folder.glob("checkpoint-*") if int(path.name[11:]) > max(steps)]
    caplog.clear()
    result = run(recipe("on", on_broken_loss="warn", patience=None))
    assert caplog.text.count("Training broke: the loss was nan at step") == 1
    assert "of 4 held-out rows is not finite: " in caplog.text
    found = strict_json(*result.folder.rglob("*.json"), *result.folder.rglob("*.jsonl"))
    assert {"loss": None} in [{"loss": value["loss"]} for value in found if "loss" in value]
    assert build_report(result.folder).is_file()


def test_weights_that_break_in_the_last_step_are_neither_saved_nor_evaluated(tmp_path: Path, bases) -> None:
    data = write_rows(tmp_path / "rows.jsonl", *SPLITS)
    recipe = TextRecipes(bases["causal"]["base"], data, tmp_path / "runs")
    config = recipe("last", "none", **{**BROKEN, "lr": 1e39, "max_steps": 1})
    with pytest.raises(ConfigError, match=r"Training broke: step 1 made '.*' infinite or NaN"):
        run(config)
    assert not (config.run_folder / "model").exists()
    assert not list(config.run_folder.glob("checkpoint-*"))


def test_a_gpu_is_read_where_it_is_read_anyway_and_the_step_is_the_right_one() -> None:
    import torch

    args = SimpleNamespace(device=torch.device("cuda"), learning_rate=1.0)
    flags = ("should_evaluate", "should_save", "should_training_stop", "should_log")
    quiet = SimpleNamespace(**dict.fromkeys(flags, False))
    for flag in flags:
        callback = BrokenLoss("stop")
        for step, value in enumerate((1.0, 2.0, torch.inf, torch.nan), 1):
            callback.losses.append((step, torch.tensor(value)))
            callback.on_step_end(args, SimpleNamespace(global_step=step, epoch=0.5), quiet)
        asked = SimpleNamespace(**{**dict.fromkeys(flags, False), flag: True})
        with pytest.raises(ConfigError, match=r"the loss was inf at step 3 \(epoch 0.50\)"):
            callback.on_step_end(args, SimpleNamespace(global_step=5, epoch=0.5), asked)
        assert not callback.losses


def test_texts_to_answer_are_read_as_rows_are(tmp_path: Path, bases, capsys, monkeypatch) -> None:
    model, file = str(bases["causal"]["base"]), tmp_path / "texts.txt"
    command = ["predict", model, "--json", "--max_new_tokens", "1"]
    file.write_bytes("one\u2028two\r\nä\r\n".encode("utf-16"))
    assert main([*command, "--file", str(file)]) == 0
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("one\u2028two\nä".encode())))
    assert main(command) == 0
    lines = [json.loads(line)["input"] for line in capsys.readouterr().out.split("\n") if line]
    assert lines == ["one\u2028two", "ä"] * 2
    file.write_bytes("one\nä".encode("cp1252"))
    assert main([*command, "--file", str(file)]) == 1
    assert "texts.txt:2: not UTF-8 text (byte 4: 0xe4)" in capsys.readouterr().err
    assert main([*command, "half of an emoji: \ud83d"]) == 1
    assert "the text: half of a character, \\ud83d, stands behind" in capsys.readouterr().err


def test_a_quantised_base_is_for_adapters_and_needs_its_library(tmp_path: Path, monkeypatch) -> None:
    data = write_rows(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    recipe = TextRecipes(save_llama(tmp_path / "base", byte_tokenizer()), data, tmp_path / "runs")

    def quantised(config: RunConfig) -> RunConfig:
        return dataclasses.replace(config, base=dataclasses.replace(config.base, quantization="nf4"))

    with pytest.raises(ConfigError, match="`base.quantization: nf4` freezes the weights"):
        run(quantised(recipe("whole", "none")))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"needs bitsandbytes: .*thawline\[quant\]"):
        run(quantised(recipe("adapter", "paca")))


def test_a_resumed_run_says_that_its_rows_have_changed(tmp_path: Path, caplog) -> None:
    base = save_llama(tmp_path / "base", byte_tokenizer())
    rows = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    recipe = TextRecipes(base, write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "runs")
    run(recipe("run", max_steps=1))
    (tmp_path / "runs/run/metrics.jsonl").write_bytes(b"\xff\x00 damaged")
    run(recipe("run", max_steps=2), resume=True)
    assert "training rows are not those" not in caplog.text
    write_rows(tmp_path / "rows.jsonl", rows[0], {**rows[1], "output": "e"})
    run(recipe("run", max_steps=3), resume=True)
    assert "training rows are not those of before (2 then, 2 now, or with other contents)" in caplog.text


def test_a_chat_template_in_another_encoding_is_named(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", byte_tokenizer())
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write_rows(tmp_path / "chats.jsonl", {"messages": chat})
    (tmp_path / "chat.jinja").write_bytes("{# für #}{{ messages[0].content }}".encode("cp1252"))
    with pytest.raises(DataError, match=r"chat.jinja:1: not UTF-8 text .* Save it as UTF-8"):
        built(base, data, chat_template=str(tmp_path / "chat.jinja"))
