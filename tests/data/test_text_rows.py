"""Rows of text: every format is found by looking, and a faulty row is named by file and line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.support.text import byte_tokenizer
from thawline.data.text import (
    IGNORED,
    Example,
    TextEncoder,
    collate_tokens,
    load_examples,
    prompt_example,
    split_examples,
)
from thawline.errors import ConfigError, DataError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "format", "prompt", "answer"),
    [
        ({"prompt": "1+1=", "completion": "2"}, "prompt-completion", "1+1=", "2"),
        ({"input": "Tom", "output": "male"}, "input-output", "Tom\n", "male"),
        ({"text": "Once upon a time"}, "text", "", "Once upon a time"),
        ({"messages": CHAT}, "messages", "", "So long"),
        (
            {"instruction": "Add.", "output": "2"},
            "instruction",
            "### Instruction:\nAdd.\n\n### Response:\n",
            "2",
        ),
        (
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            "instruction",
            "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n",
            "2",
        ),
    ],
)
def test_the_format_is_found_by_looking(tmp_path: Path, row, format, prompt, answer) -> None:
    [example] = load_examples(write(tmp_path / "rows.jsonl", row))
    assert (example.format, example.prompt, example.answer) == (format, prompt, answer)
    assert example.task == "rows"


def test_a_chat_may_come_as_prompt_and_completion_lists(tmp_path: Path) -> None:
    [example] = load_examples(write(tmp_path / "a.jsonl", {"prompt": CHAT[:-1], "completion": CHAT[-1:]}))
    assert [turn["content"] for turn in example.messages] == [turn["content"] for turn in CHAT]
    encode = TextEncoder(byte_tokenizer(), chat_template="plain")
    assert learned_text(encode, encode(example)) == " So long</s>\n"


def test_a_json_list_reads_like_jsonl_and_a_folder_like_its_files(tmp_path: Path) -> None:
    rows = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    write(tmp_path / "one.jsonl", *rows)
    (tmp_path / "two.json").write_text(json.dumps(rows))
    (tmp_path / "manifest.json").write_text("{}")
    examples = load_examples(str(tmp_path))
    assert [example.task for example in examples] == ["one", "one", "two", "two"]
    assert [example.prompt for example in examples[2:]] == ["a\n", "c\n"]


def test_the_template_makes_the_prompt_of_any_field(tmp_path: Path) -> None:
    row = {"input": "Tom", "output": "male", "lang": "en"}
    path = write(tmp_path / "rows.jsonl", row)
    [example] = load_examples(path, template="[{lang}] {input} is")
    assert example.prompt == "[en] Tom is"
    with pytest.raises(DataError, match=r"rows.jsonl:1: the template asks for 'name', the row has 'input'"):
        load_examples(path, template="{name}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"rows.jsonl:2: not JSON: .* at column 2"),
        ("[1]", r"rows.jsonl:2: expected an object with keys, got list"),
        ({"question": "a"}, r"rows.jsonl:2: a row of format 'input-output' needs 'input', got 'question'"),
        ({"input": "a", "output": 0.5}, r"rows.jsonl:2: 'output' must be text, got float 0.5"),
        ({"input": "a", "output": True}, r"rows.jsonl:2: 'output' must be text, got bool True"),
        ({"input": None, "output": "a"}, r"rows.jsonl:2: 'input' must be text, got null"),
        (
            {"input": "a", "output": "b", "choices": ["c"]},
            r"rows.jsonl:2: the answer 'b' is not among .*\['c'\]",
        ),
    ],
)
def test_a_faulty_row_is_named_by_file_and_line(tmp_path: Path, row, message) -> None:
    path = write(tmp_path / "rows.jsonl", {"input": "x", "output": "y"}, row)
    with pytest.raises(DataError, match=message):
        load_examples(path)


def test_faulty_chats_missing_files_and_unknown_formats_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl:1: no format has the keys 'q'. Known: messages"):
        load_examples(write(tmp_path / "a.jsonl", {"q": "a"}))
    with pytest.raises(DataError, match="turn 1 needs 'from' and 'value'"):
        load_examples(write(tmp_path / "a.jsonl", {"messages": [{"from": "human"}]}))
    with pytest.raises(DataError, match="no turn of role 'assistant'"):
        load_examples(write(tmp_path / "a.jsonl", {"messages": CHAT[:2]}))
    with pytest.raises(DataError, match=r"No such file or folder: '.*nowhere'"):
        load_examples(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no rows"):
        load_examples(write(tmp_path / "empty.jsonl"))
    with pytest.raises(ConfigError, match="Unknown format 'txt'.*Did you mean 'text'"):
        load_examples(str(tmp_path), format="txt")


def test_held_out_rows_are_those_given_then_marked_then_drawn(tmp_path: Path) -> None:
    rows = [{"input": str(i), "output": "x", "split": "test" if i % 5 == 0 else "train"} for i in range(10)]
    marked = load_examples(write(tmp_path / "rows.jsonl", *rows))
    assert [len(part) for part in split_examples(marked)] == [8, 2]
    assert [len(part) for part in split_examples(marked, marked[:3])] == [8, 3]
    plain = load_examples(write(tmp_path / "plain.jsonl", *({**row, "split": ""} for row in rows)))
    assert [len(part) for part in split_examples(plain)] == [10, 0]
    drawn = split_examples(plain, fraction=0.3, seed=1)
    assert [len(part) for part in drawn] == [7, 3]
    assert drawn == split_examples(plain, fraction=0.3, seed=1) != split_examples(plain, fraction=0.3, seed=2)
    assert {e.where for e in drawn.train} | {e.where for e in drawn.held_out} == {e.where for e in plain}


def test_files_named_by_split_take_their_task_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "sums").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "sums" / f"{split}.jsonl", {"input": "a", "output": "b"})
    examples = load_examples(str(tmp_path / "sums"))
    assert {(example.task, example.split) for example in examples} == {("sums", "train"), ("sums", "test")}


def learned_text(encoder: TextEncoder, row: dict[str, list[int]]) -> str:
    return encoder.tokenizer.decode([token for token in row["labels"] if token != IGNORED])


def test_only_the_completion_and_its_end_are_learned(tmp_path: Path) -> None:
    [example] = load_examples(write(tmp_path / "a.jsonl", {"input": "Tom", "output": "male"}))
    encode = TextEncoder(byte_tokenizer())
    row = encode(example)
    assert encode.tokenizer.decode(row["input_ids"]) == "<s>Tom\nmale</s>"
    assert learned_text(encode, row) == "male</s>"
    assert row["input_ids"][: len(encode.prompt_ids(example))] == encode.prompt_ids(example)
    everything = TextEncoder(byte_tokenizer(), learn_prompt=True)(example)
    assert everything["labels"] == everything["input_ids"]


def test_plain_text_is_learned_whole(tmp_path: Path) -> None:
    [example] = load_examples(write(tmp_path / "a.jsonl", {"text": "Once"}))
    encode = TextEncoder(byte_tokenizer())
    assert learned_text(encode, encode(example)) == "Once</s>"


def test_only_the_assistants_turns_of_a_chat_are_learned(tmp_path: Path) -> None:
    [example] = load_examples(write(tmp_path / "a.jsonl", {"messages": CHAT}))
    encode = TextEncoder(byte_tokenizer(), chat_template="plain")
    row = encode(example)
    assert encode.tokenizer.decode(row["input_ids"]) == (
        "<s>system: Be brief.\nuser: Hi\nassistant: Hello</s>\nuser: Bye\nassistant: So long</s>\n"
    )
    assert learned_text(encode, row) == " Hello</s>\n So long</s>\n"
    assert encode.tokenizer.decode(encode.prompt_ids(example)).endswith("user: Bye\nassistant:")


def test_chat_masks_agree_with_the_tokenizers_own_generation_marks(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "A:{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m['role'] }}:{{ m['content'] }};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    [example] = load_examples(write(tmp_path / "a.jsonl", {"messages": CHAT}))
    row = TextEncoder(tokenizer, chat_template=str(file))(example)
    marked = tokenizer.apply_chat_template(
        CHAT, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert row["input_ids"] == marked["input_ids"]
    assert [label != IGNORED for label in row["labels"]] == [bool(m) for m in marked["assistant_masks"]]


TOOLS = [{"type": "function", "function": {"name": "clock", "description": "Tells the time."}}]
TOOL_CHAT = [
    {"role": "user", "content": "Late?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
    {"role": "tool", "content": "23:50"},
    {"role": "assistant", "content": "Yes"},
]
TOOL_TEMPLATE = (
    "{% if tools %}tools: {{ tools | map(attribute='function.name') | join(', ') }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: "
    "{% for call in m.tool_calls or [] %}call {{ call.function.name }}{% endfor %}{{ m.content or '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON text"])
def test_a_chats_tools_stand_in_its_prompt_and_its_calls_are_learned(tmp_path: Path, tools: object) -> None:
    file, rows = tmp_path / "tools.jinja", tmp_path / "rows.jsonl"
    file.write_text(TOOL_TEMPLATE)
    [example] = load_examples(write(rows, {"messages": TOOL_CHAT, "tools": tools}))
    tokenizer = byte_tokenizer()
    encode = TextEncoder(tokenizer, chat_template=str(file))
    row = encode(example)
    assert tokenizer.decode(row["input_ids"]) == (
        "tools: clock\nuser: Late?\nassistant: call clock\ntool: 23:50\nassistant: Yes\n"
    )
    learned = [token for token, label in zip(*row.values(), strict=True) if label != IGNORED]
    assert tokenizer.decode(learned) == "call clock\nYes\n"
    assert tokenizer.decode(encode.prompt_ids(example)).startswith("tools: clock\nuser: Late?")


def test_tools_that_a_chat_template_would_drop_are_refused(tmp_path: Path) -> None:
    [example] = load_examples(write(tmp_path / "a.jsonl", {"messages": CHAT, "tools": TOOLS}))
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template does not write the row's `tools`"):
        TextEncoder(byte_tokenizer(), chat_template="plain")(example)
    with pytest.raises(DataError, match=r"b.jsonl:1: `tools` must be a list of JSON schemas.*'clock'"):
        load_examples(write(tmp_path / "b.jsonl", {"messages": CHAT, "tools": ["clock"]}))
    [example] = load_examples(write(tmp_path / "c.jsonl", {"messages": CHAT, "tools": None}))
    assert TextEncoder(byte_tokenizer(), chat_template="plain")(example)


def test_a_chat_without_template_and_one_that_rewrites_turns_are_refused(tmp_path: Path) -> None:
    [example] = load_examples(write(tmp_path / "a.jsonl", {"messages": CHAT}))
    with pytest.raises(ConfigError, match="has no chat template.*`data.chat_template`"):
        TextEncoder(byte_tokenizer())(example)
    file = tmp_path / "last.jinja"
    file.write_text("{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template opens an answer by .* turn 3 without"):
        TextEncoder(byte_tokenizer(), chat_template=str(file))(example)
    file.write_text(
        "{% for m in messages %}{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}.{% else %};{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template rewrites earlier turns.*turn 3"):
        TextEncoder(byte_tokenizer(), chat_template=str(file))(example)


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end(tmp_path: Path) -> None:
    rows = [{"prompt": "abcdefgh", "completion": "xy"}, {"prompt": "ab", "completion": "stuvwxyz"}]
    long_prompt, long_answer = load_examples(write(tmp_path / "a.jsonl", *rows))
    encode = TextEncoder(byte_tokenizer(), max_length=7)
    assert encode.tokenizer.decode(encode(long_prompt)["input_ids"]) == "<s>fghxy</s>"
    row = encode(long_answer)
    assert len(row["input_ids"]) == 7
    assert learned_text(encode, row) == "stuvwx"
    assert encode.n_cut == 2


def test_encoder_decoders_get_prompt_and_answer_apart(tmp_path: Path) -> None:
    [example] = load_examples(write(tmp_path / "a.jsonl", {"input": "Tom", "output": "male"}))
    encode = TextEncoder(byte_tokenizer(), seq2seq=True)
    row = encode(example)
    assert encode.tokenizer.decode(row["input_ids"]) == "<s>Tom\n"
    assert encode.tokenizer.decode(row["labels"]) == "male</s>"


def test_batches_are_padded_on_the_right_and_padding_is_masked() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "task_ids": 3},
        {"input_ids": [8], "labels": [8], "task_ids": 1},
    ]
    batch = collate_tokens(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["task_ids"].tolist() == [3, 1]


def test_a_new_text_takes_the_place_of_the_formats_first_field() -> None:
    assert prompt_example("Tom", "input-output", None).prompt == "Tom\n"
    assert prompt_example("Tom", "input-output", "Name: {input}").prompt == "Name: Tom"
    assert prompt_example("Hi", "messages", None).messages == ({"role": "user", "content": "Hi"},)
    assert prompt_example("Once", "text", None).prompt == "Once"


def test_real_tasks_all_read(shared: Path) -> None:
    tasks = shared / "data" / "text"
    manifest = {entry["task"]: entry for entry in json.loads((tasks / "manifest.json").read_text())}
    examples = load_examples(str(tasks))
    assert {example.task for example in examples} == set(manifest)
    train, held_out = split_examples(examples)
    assert len(train) == sum(entry["n_train"] for entry in manifest.values())
    assert len(held_out) == sum(entry["n_test"] for entry in manifest.values())


def test_a_manifest_gives_choices_and_instruction(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    write(tmp_path / "tasks" / "sky.jsonl", {"input": "noon", "output": "blue"})
    write(tmp_path / "tasks" / "own.jsonl", {"input": "b", "output": "c", "choices": ["c", "d"]})
    manifest = [{"task": "sky", "choices": ["blue", "black"], "instruction": "What colour?"}, {"task": "own"}]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    own, sky = load_examples(tmp_path)
    assert (own.choices, sky.choices) == (("c", "d"), ("blue", "black"))
    [sky] = [one for one in load_examples(tmp_path / "tasks") if one.task == "sky"]
    assert sky.choices == ()
    manifest[1]["instruction"] = "Which?"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    own, sky = load_examples(tmp_path, template="{instruction} {input}:")
    assert (own.prompt, sky.prompt) == ("Which? b:", "What colour? noon:")
    manifest[0]["choices"] = "blue"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match="manifest.json: `choices` of 'sky' must be a list of texts, got 'blue'"
    ):
        load_examples(tmp_path)


def test_a_dataset_is_read_by_its_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "source": datasets.Value("string"),
        }
    )
    rows = {"sentence": ["fine", "dull"], "label": [1, 0], "source": ["films", "books"]}
    splits = {name: datasets.Dataset.from_dict(rows, features=features) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "reviews")
    columns = {"input": "sentence", "output": "label", "task": "source"}
    examples = load_examples(tmp_path / "reviews", columns=columns)
    assert [(e.task, e.split, e.prompt, e.completion, e.choices) for e in examples[:2]] == [
        ("films", "train", "fine\n", "good", ("bad", "good")),
        ("books", "train", "dull\n", "bad", ("bad", "good")),
    ]
    assert {example.split for example in examples} == {"train", "validation"}
    with pytest.raises(DataError, match="`data.columns` asks for 'text', the row has"):
        load_examples(tmp_path / "reviews", columns={"input": "text"})


@pytest.fixture
def reviews():
    """Splits with answers and tasks by class label; the test split has no answers, as GLUE's."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "source": datasets.ClassLabel(names=["books", "films"]),
        }
    )
    rows = {"sentence": ["fine", "dull"], "label": [1, 0], "source": [1, 0]}
    unlabelled = {**rows, "label": [-1, -1]}
    splits = {"train": rows, "validation": rows, "test": unlabelled}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(values, features=features) for name, values in splits.items()}
    )


COLUMNS = {"input": "sentence", "output": "label", "task": "source"}
REVIEWS = {("films", "fine\n", "good", ("bad", "good")), ("books", "dull\n", "bad", ("bad", "good"))}


def summaries(examples) -> set[tuple]:
    return {(e.task, e.prompt, e.completion, e.choices) for e in examples}


def test_tasks_and_answers_may_be_class_labels_and_splits_without_any_are_left_out(
    reviews, tmp_path: Path, caplog
) -> None:
    reviews.save_to_disk(tmp_path / "reviews")
    with caplog.at_level(logging.WARNING, "thawline.data.text.datasets"):
        examples = load_examples(tmp_path / "reviews", columns=COLUMNS)
    assert "reviews[test]: no row has a label; left out." in caplog.text
    assert summaries(examples) == REVIEWS
    assert {example.split for example in examples} == {"train", "validation"}
    # One that lacks some answers is not without labels: the row is named.
    torn = reviews["train"].map(lambda row, i: {"label": -1 if i else row["label"]}, with_indices=True)
    torn.save_to_disk(tmp_path / "torn")
    with pytest.raises(DataError, match="torn:1: 'output' must be text, got null"):
        load_examples(tmp_path / "torn", columns=COLUMNS)


def test_parquet_files_are_read_as_the_library_does(reviews, tmp_path: Path) -> None:
    import datasets

    for name in ("train-00000-of-00001", "validation"):
        reviews[name.split("-")[0]].to_parquet(tmp_path / f"{name}.parquet")
    examples = load_examples(tmp_path, columns=COLUMNS)
    assert summaries(examples) == REVIEWS
    split = split_examples(examples)
    assert summaries(split.train) == summaries(split.held_out) == REVIEWS
    # The oracle: the library's own reading of the folder, its numbers looked up.
    theirs = datasets.load_dataset(str(tmp_path))
    names = {key: theirs["train"].features[key].names for key in ("label", "source")}
    for name, ours in zip(("train", "validation"), split, strict=True):
        found = {(names["source"][r["source"]], names["label"][r["label"]]) for r in theirs[name]}
        assert found == {(example.task, example.completion) for example in ours}
    # A file for each task, and the folder's manifest.
    by_task = tmp_path / "tasks"
    by_task.mkdir()
    plain = reviews["train"].cast_column("label", datasets.Value("string")).remove_columns("source")
    plain.rename_columns({"sentence": "input", "label": "output"}).to_parquet(by_task / "sky-2.parquet")
    (by_task / "manifest.json").write_text(json.dumps([{"task": "sky-2", "choices": ["0", "1"]}]))
    assert summaries(load_examples(by_task)) == {
        ("sky-2", "fine\n", "1", ("0", "1")), ("sky-2", "dull\n", "0", ("0", "1")),
    }  # fmt: skip


def test_csv_files_have_tasks_by_column_and_an_empty_one_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "reviews.csv"
    file.write_text('sentence,label,source\n"fine, all in all",good,films\ndull,bad,books\n')
    assert summaries(load_examples(file, columns=COLUMNS)) == {
        ("films", "fine, all in all\n", "good", ()), ("books", "dull\n", "bad", ()),
    }  # fmt: skip
    with pytest.raises(DataError, match=r"reviews.csv:2: `data.columns` asks for 'topic', the row has"):
        load_examples(file, columns={**COLUMNS, "task": "topic"})
    file.write_text("sentence,label,source\nfine,good,films\ndull,bad,\n")
    with pytest.raises(DataError, match=r"reviews.csv:3: the row's task is empty"):
        load_examples(file, columns=COLUMNS)
    file.write_text("sentence,label,source\nfine,good,0\n")
    [example] = load_examples(file, columns=COLUMNS)
    assert example.task == "0"
    pytest.importorskip("datasets").Dataset.from_dict({"input": [], "output": []}).to_parquet(
        tmp_path / "empty.parquet"
    )
    with pytest.raises(DataError, match=r"empty.parquet: no rows"):
        load_examples(str(tmp_path / "empty.parquet"))
    broken = tmp_path / "broken.parquet"
    broken.write_text("no table")
    with pytest.raises(DataError, match=r"Cannot load '.*broken.parquet': .*arquet"):
        load_examples(broken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"empty' holds no .jsonl, .ndjson, .json, .csv, .tsv or .parquet file"
    ):
        load_examples(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"prompt": "one\u2028two\x85", "completion": "b"}\n', "b"),  # line separators within a text
        ('\ufeff{"prompt": "a", "completion": "b"}\r\n', "b"),
    ],
)
def test_only_a_line_break_ends_a_row(tmp_path: Path, text: str, answer: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text.encode())
    assert [example.completion for example in load_examples(file)] == [answer]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "x", "output": "1", "choices": "12"}, "`choices` must be a list of texts, got '12'"),
        ({"input": "x", "output": "1", "choices": [0.5]}, "`choices`: each must be text, got float 0.5"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text"}]},
                    {"role": "assistant", "content": "x"},
                ]
            },
            "turn 1: the 'content' must be text, got None",
        ),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path: Path, row: dict, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl:1: {message}"):
        load_examples(file)


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_a_template_gets_no_missing_value_and_only_what_fits(tmp_path: Path, value: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"input": "a", "topic": {value}, "output": "b"}}\n')
    with pytest.raises(DataError, match="rows.jsonl:1: the template asks for 'topic', which is null here"):
        load_examples(file, template="{topic}: {input}")
    with pytest.raises(DataError, match=r"rows.jsonl:1: `data.template` '{input:d}' does not fit the row"):
        load_examples(file, template="{input:d}")


def test_keys_that_are_not_read_are_named_once(tmp_path: Path, caplog) -> None:
    """Dolly's `context` would be lost where only `response` is renamed."""
    caplog.set_level("INFO")
    file = tmp_path / "dolly.jsonl"
    row = {"instruction": "a", "context": "b", "response": "c", "split": "train"}
    file.write_text(f"{json.dumps(row)}\n" * 2)
    for columns, template, n_said in (
        ({"output": "response"}, None, 1),
        ({"output": "response", "input": "context"}, None, 0),
        ({"output": "response"}, "{instruction} {context}", 0),
    ):
        caplog.clear()
        load_examples(file, columns=columns, template=template)
        assert caplog.text.count("dolly: rows have keys that are not read: 'context'.") == n_said


@pytest.mark.parametrize("template", ["{{ foo(", "{{ raise_exception('System turns are unknown') }}"])
def test_a_chat_template_that_does_not_work_is_said_to(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    encode = TextEncoder(tokenizer)
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})
    with pytest.raises(DataError, match="chats:7: the chat template does not accept this chat: "):
        encode(Example(messages=chat, format="messages", where="chats:7"))


@pytest.mark.parametrize("name", ["train.jsonl", "./test.jsonl", "sub/valid.json"])
def test_a_file_named_after_a_split_takes_its_folders_name_as_task(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its path does not name the folder: `--data train.jsonl`."""
    monkeypatch.chdir(tmp_path)
    file = Path(name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        json.dumps([{"input": "a", "output": "b"}]) if file.suffix == ".json" else '{"text": "a"}\n'
    )
    (example,) = load_examples(name)
    assert example.task == file.absolute().parent.name


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_keys_that_a_table_fills_in_are_not_learned(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")

    def call(name: str, **arguments: object) -> dict:
        return {"function": {"name": name, "arguments": arguments}}

    def tool(name: str, **properties: object) -> dict:
        return {"function": {"name": name, "parameters": {"properties": properties}}}

    calls = [call("weather", city="Rome"), call("add", a=1, b=[{"c": 2}, {"d": 3}])]
    tools = [tool("weather", city={"type": "string"}), tool("add", a={"minimum": 0})]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    table = datasets.Dataset.from_list([{"messages": turns, "tools": tools, "system": None}])
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows")
    table.to_parquet(str(path)) if kind == "parquet" else table.save_to_disk(str(path))
    [example] = load_examples(path)
    assert [one["function"] for one in example.messages[1]["tool_calls"]] == [
        one["function"] for one in calls
    ]
    assert list(example.tools) == tools


@pytest.mark.parametrize(
    "row", [{"text": "a", "kto_tag": True}, {"input": "a", "output": "b", "history": "c"}]
)
@pytest.mark.parametrize("template", ["{input", "input}"])
def test_a_template_that_is_no_format_string_is_refused_whatever_reads_it(
    tmp_path: Path, row: dict, template: str
) -> None:
    with pytest.raises(ConfigError, match="`data.template` .* is not a format string"):
        load_examples(write(tmp_path / "rows.jsonl", row), template=template)
