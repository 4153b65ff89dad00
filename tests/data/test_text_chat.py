"""Chats: learned is what the row says, and a template that leaves out something of the row is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.text import byte_tokenizer
from thawline.data.text import IGNORED, Example, TextEncoder, load_examples
from thawline.errors import ConfigError, DataError

ASK, ANSWER = {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "18 degrees"}
MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last %}<think></think>{% endif %}{{ m.content }};{% endgeneration %}"
    "{% else %}{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CALLS = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}(%s){% endfor %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def read(folder: Path, **row: object) -> Example:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    [example] = load_examples(file)
    return example


def encoder(folder: Path, template: str = "plain", **options: Any) -> TextEncoder:
    if template != "plain":
        (folder / "chat.jinja").write_text(template)
        template = str(folder / "chat.jinja")
    return TextEncoder(byte_tokenizer(), chat_template=template, **options)


def learned(encode: TextEncoder, example: Example) -> str:
    return encode.tokenizer.decode([label for label in encode(example)["labels"] if label != IGNORED])


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": "0"}, {"train": False}, {"loss": "false"}, {"masked": True}]
)
def test_a_turn_of_weight_0_is_not_learned(tmp_path: Path, mark: dict) -> None:
    last = {"role": "assistant", "content": "4", "weight": 1}
    example = read(tmp_path, messages=[ASK, {**ANSWER, **mark}, {**ASK, "content": "Oslo?"}, last])
    assert learned(encoder(tmp_path), example) == " 4</s>\n"
    assert learned(encoder(tmp_path, MARKED), example) == "<think></think>4;"
    everything = learned(encoder(tmp_path, learn_prompt=True), example)
    assert everything == "<s>user: Rome?\nassistant:user: Oslo?\nassistant: 4</s>\n"


def test_weights_that_leave_nothing_or_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: every turn of the assistant has weight 0"):
        read(tmp_path, messages=[ASK, {**ANSWER, "weight": 0}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: turn 2: the 'weight' must be 0 .* got 0.5"):
        read(tmp_path, messages=[ASK, {**ANSWER, "weight": 0.5}])
    one_block = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    chat = read(tmp_path, messages=[ASK, {**ANSWER, "weight": 0}, ASK, ANSWER])
    with pytest.raises(DataError, match="marks 1 parts as the assistant's and the chat has 2 such turns"):
        encoder(tmp_path, one_block)(chat)


def test_a_template_that_rewrites_turns_is_learned_as_it_writes_them_at_last(tmp_path: Path) -> None:
    example = read(tmp_path, messages=[ASK, ANSWER, ASK, ANSWER])
    for template in (MARKED, MARKED.replace("loop.last", "not loop.last")):
        unmarked = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        found = learned(encoder(tmp_path, template), example)
        assert found.replace("<think></think>", "") == "18 degrees;18 degrees;" != found
        assert learned(encoder(tmp_path, unmarked), example) == found


@pytest.mark.parametrize("template", ["plain", MARKED], ids=["plain", "marked"])
def test_of_a_prompt_of_turns_the_answers_are_learned_only_with_the_whole(tmp_path: Path, template) -> None:
    example = read(tmp_path, system="Brief.", prompt=[ASK, ANSWER, ASK], completion=[ANSWER])
    only = learned(encoder(tmp_path, template), example)
    assert only.count("18 degrees") == 1
    everything = learned(encoder(tmp_path, template, learn_prompt=True), example)
    assert everything.count("18 degrees") == 2
    assert "Brief." in everything


def test_any_turn_may_be_learned_by_its_weight(tmp_path: Path) -> None:
    chat = [{**ASK, "train": True}, {**ANSWER, "train": False}, ASK, ANSWER]
    example = read(tmp_path, messages=chat)
    assert learned(encoder(tmp_path), example) == "<s>user: Rome?\n 18 degrees</s>\n"
    with pytest.raises(DataError, match="so turns of weight 0 cannot be located"):
        encoder(tmp_path, MARKED)(example)


@pytest.mark.parametrize("end", ["</s>", "</s>\n", "<|end|>", ""])
def test_an_end_that_an_answer_brings_along_is_not_doubled(tmp_path: Path, end: str) -> None:
    example = read(
        tmp_path, messages=[ASK, {**ANSWER, "content": f"18{end}"}, ASK, {**ANSWER, "content": end}]
    )
    encode = encoder(tmp_path, "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>\n{% endfor %}")
    encode.tokenizer.add_tokens(["<|end|>"])
    text = encode.tokenizer.decode(encode(example)["input_ids"])
    assert text == "user:Rome?<|end|>\nassistant:18<|end|>\nuser:Rome?<|end|>\nassistant:<|end|>\n"


THINKING = (
    "{% for m in messages %}{{ m.role }}:{% set found = m.content.split('</think>') %}"
    "{% if KEEPS and found | length > 1 %}<think>{{ found[0].split('<think>')[-1] }}</think>{% endif %}"
    "{% if loop.last and m.role == 'assistant' and found | length == 1 %}<think></think>{% endif %}"
    "{{ found[-1] }}{% for c in m.tool_calls or [] %}({{ c.function.name }} "
    "{{ c.function.arguments | tojson }}){% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Takes thoughts out of the content, as Qwen3's template does, and writes those of the last turn alone."""


def test_thoughts_may_be_left_out_of_earlier_turns_but_not_of_all(tmp_path: Path) -> None:
    thoughtful = {**ANSWER, "content": "<think>Hm.</think>18"}
    example = read(tmp_path, messages=[ASK, thoughtful, ASK, thoughtful])
    assert (
        learned(encoder(tmp_path, THINKING.replace("KEEPS", "loop.last")), example)
        == "18;<think>Hm.</think>18;"
    )
    with pytest.raises(DataError, match="does not write what stands before </think>"):
        encoder(tmp_path, THINKING.replace("KEEPS", "false"))(example)


def test_calls_are_learned_where_the_template_writes_last_turns_differently(tmp_path: Path) -> None:
    calls = {"role": "assistant", "tool_calls": [call({"city": "Oslo"}), call({"city": "Rome"})]}
    example = read(tmp_path, messages=[ASK, calls, {"role": "tool", "content": "18"}, ANSWER])
    both = '(weather {"city": "Oslo"})(weather {"city": "Rome"});<think></think>18 degrees;'
    assert learned(encoder(tmp_path, THINKING.replace("KEEPS", "loop.last")), example) == both


def test_an_earlier_turn_may_end_in_another_special_token_than_the_last(tmp_path: Path) -> None:
    """Ends as those of gpt-oss (return) and Phi-3 (an end token behind the last turn)."""
    for last in ("<|return|>", "<|end|>{{ eos_token }}"):
        ends = "{% if loop.last and m.role == 'assistant' %}LAST{% else %}<|end|>{% endif %}".replace(
            "LAST", last
        )
        encode = encoder(
            tmp_path, "{% for m in messages %}{{ m.role }}:{{ m.content }}" + ends + "{% endfor %}"
        )
        encode.tokenizer.add_tokens(["<|end|>", "<|return|>"], special_tokens=True)
        text = learned(encode, read(tmp_path, messages=[ASK, ANSWER, ASK, ANSWER]))
        assert text.replace("assistant:", "") == f"18 degrees<|end|>18 degrees{last}".replace(
            "{{ eos_token }}", "</s>"
        )


OPENING = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and (loop.last or SHOWS) %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking | default(true) %}<think>{% endif %}"
    "{% endif %}"
)


def test_what_opens_an_answer_may_be_left_out_of_earlier_turns_alone(tmp_path: Path) -> None:
    encode = encoder(tmp_path, OPENING.replace("SHOWS", "false"))
    example = read(tmp_path, messages=[ASK, ANSWER, ASK, {**ANSWER, "reasoning_content": "Hm."}])
    assert learned(encode, example) == "18 degrees;Hm.</think>18 degrees;"
    bare = OPENING.replace("loop.last or SHOWS", "false")
    plain = read(tmp_path, messages=[ASK, ANSWER])
    with pytest.raises(
        DataError, match=r"opens an answer by '<think>', but writes turn 2 without.*chat_options"
    ):
        encoder(tmp_path, bare)(plain)
    silent = encoder(tmp_path, bare, chat_options={"enable_thinking": False})
    assert learned(silent, plain) == "18 degrees;"
    assert silent.tokenizer.decode(silent.prompt_ids(plain)).endswith("assistant:")


def test_a_template_of_an_image_model_gets_its_parts(tmp_path: Path) -> None:
    parts = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %};"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encode = encoder(tmp_path, parts)
    example = read(tmp_path, messages=[ASK, ANSWER, ASK, ANSWER])
    assert learned(encode, example) == "18 degrees;18 degrees;"
    assert encode.tokenizer.decode(encode.prompt_ids(example)).endswith("user:Rome?;assistant:")


def test_tools_choose_the_template_made_for_them(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    plain = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools | tojson }}" + plain}
    encode = TextEncoder(tokenizer)
    assert learned(encode, read(tmp_path, messages=[ASK, ANSWER])).endswith("18 degrees;")
    with_tools = read(tmp_path, messages=[ASK, ANSWER], tools=[{"name": "clock"}])
    assert tokenizer.decode(encode(with_tools)["input_ids"]).startswith('[{"name": "clock"}]user:')


def test_a_template_that_checks_ids_of_calls_gets_objects(tmp_path: Path) -> None:
    check = "{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    checks = CALLS.replace("{{ c.function.name }}(%s)", check + "{{ c.function | tojson }}")
    nine = {**call({"city": "Rome"}), "id": "callrome9"}
    example = read(tmp_path, messages=[ASK, {"role": "assistant", "tool_calls": [nine]}])
    assert '"arguments": {"city": "Rome"}' in learned(encoder(tmp_path, checks), example)


def call(arguments: object) -> dict:
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


@pytest.mark.parametrize(
    "arguments",
    [{"city": "Rome"}, '{"city": "Rome"}', '"{\\"city\\": \\"Rome\\"}"'],
    ids=["object", "JSON text", "JSON text in JSON text"],
)
@pytest.mark.parametrize(
    "written",
    ["{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}", "{{ c.function.arguments }}"],
    ids=["of an object", "of text", "of either"],
)
def test_a_calls_arguments_are_learned_as_one_json_object(tmp_path: Path, arguments, written: str) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    example = read(tmp_path, messages=[ASK, calls, {"role": "tool", "content": "18 C"}, ANSWER])
    encode = encoder(tmp_path, CALLS.replace("%s", written))
    assert learned(encode, example) == 'weather({"city": "Rome"})\n18 degrees\n'


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        ({"content": None, "tool_calls": [call({})]}, "the `tool_calls` of turn 2"),
        ({"tool_calls": [call("{}")]}, "the `tool_calls` of turn 2"),
        ({"content": "", "function_call": {"name": "weather"}}, "the `tool_calls` of turn 2"),
        ({"content": "18", "reasoning_content": "Hm."}, "the row's `reasoning_content`"),
        ({"content": "18", "thinking": "Hm."}, "the row's `thinking`"),
    ],
)
def test_what_the_template_does_not_write_is_refused(tmp_path: Path, turn: dict, what: str) -> None:
    example = read(tmp_path, messages=[ASK, {"role": "assistant", **turn}, ASK, ANSWER])
    with pytest.raises(DataError, match=f"rows.jsonl:1: the chat template does not write {what}"):
        encoder(tmp_path)(example)


def test_a_template_that_writes_the_first_call_alone_or_skips_a_role_is_refused(tmp_path: Path) -> None:
    first = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]").replace("%s", "")
    both = {"role": "assistant", "tool_calls": [call({}), call({})]}
    with pytest.raises(DataError, match="does not write the `tool_calls` of turn 2"):
        encoder(tmp_path, first)(read(tmp_path, messages=[ASK, both]))
    two_roles = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    system = {"role": "system", "content": "Be brief."}
    with pytest.raises(DataError, match=r"does not write the content of turn 1 \(system\)"):
        encoder(tmp_path, two_roles)(read(tmp_path, messages=[system, ASK, ANSWER]))


def test_keys_without_a_value_are_as_if_absent_and_nothing_reads_none(tmp_path: Path) -> None:
    filled = {"tool_calls": None, "weight": None, "name": None, "reasoning_content": None}
    example = read(tmp_path, messages=[{**ASK, **filled}, {**ANSWER, **filled}])
    assert example.messages == (ASK, ANSWER)
    assert learned(encoder(tmp_path), example) == " 18 degrees</s>\n"
    with pytest.raises(DataError, match="turn 2 needs 'role' and text as 'content'"):
        read(tmp_path, messages=[ASK, {"role": "assistant", "content": None}])
    for value, kind in ((None, "null"), (["a"], "list"), ({"a": 1}, "dict")):
        (tmp_path / "own.jsonl").write_text(json.dumps({"input": "a", "output": "b", "note": value}))
        with pytest.raises(DataError, match=f"own.jsonl:1: the template asks for 'note', which is {kind}"):
            load_examples(tmp_path / "own.jsonl", template="{input} {note}")


def test_text_may_come_in_parts_and_other_parts_are_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Ro"}, {"type": "text", "text": "me?"}]
    assert read(tmp_path, messages=[{**ASK, "content": parts}, ANSWER]).messages == (ASK, ANSWER)
    with pytest.raises(
        DataError, match="turn 1: of a content only parts of type 'text' can be read, got 'image_url'"
    ):
        read(tmp_path, messages=[{**ASK, "content": [{"type": "image_url"}]}, ANSWER])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (call("{city"), "the arguments of 'weather': not JSON"),
        (call("[1]"), r"the arguments of 'weather' must be an object, or its JSON text, got '\[1\]'"),
        (call(3), "the arguments of 'weather' must be an object, or its JSON text, got 3"),
        ({"id": "1"}, "a tool call needs a function with a 'name'"),
        ("weather", "a tool call needs a function with a 'name'"),
    ],
)
def test_calls_that_cannot_be_read_are_refused(tmp_path: Path, broken: object, message: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:1: turn 2: {message}"):
        read(tmp_path, messages=[ASK, {"role": "assistant", "tool_calls": [broken]}])


@pytest.mark.parametrize("key", ["arguments", "parameters", "input"])
def test_arguments_have_the_names_of_several_apis(tmp_path: Path, key: str) -> None:
    turn = {"role": "assistant", "tool_calls": [{"name": "weather", key: {"city": "Rome"}}]}
    [called] = read(tmp_path, messages=[ASK, turn]).messages[1]["tool_calls"]
    assert called["function"] == {"name": "weather", "arguments": {"city": "Rome"}}


def test_arguments_are_those_that_are_given_and_given_once(tmp_path: Path) -> None:
    def read_call(**arguments: object) -> Example:
        calls = [{"name": "weather", **arguments}]
        return read(tmp_path, messages=[ASK, {"role": "assistant", "tool_calls": calls}])

    [called] = read_call(arguments=None, parameters={"a": 1}).messages[1]["tool_calls"]
    assert called["function"] == {"name": "weather", "arguments": {"a": 1}}
    with pytest.raises(DataError, match="arguments of 'weather' are given twice, as 'arguments' and 'input'"):
        read_call(arguments={"a": 1}, input={"b": 2})


def test_functions_are_wrapped_once_and_no_second_list_of_tools(tmp_path: Path) -> None:
    chat, bare = {"messages": [ASK, ANSWER]}, {"name": "weather"}
    tool = {"type": "function", "function": bare}
    assert read(tmp_path, **chat, functions=[tool]).tools == (tool,)
    assert read(tmp_path, **chat, tools=[tool], functions=[bare]).tools == (tool,)
    with pytest.raises(DataError, match="rows.jsonl:1: the row's `tools` and `functions` differ"):
        read(tmp_path, **chat, tools=[tool], functions=[{"name": "add"}])


def test_functions_are_tools(tmp_path: Path) -> None:
    example = read(tmp_path, messages=[ASK, ANSWER], functions=[{"name": "weather"}])
    assert example.tools == ({"type": "function", "function": {"name": "weather"}},)
    with pytest.raises(DataError, match="`functions` must be a list of JSON schemas"):
        read(tmp_path, messages=[ASK, ANSWER], functions="3")


@pytest.mark.parametrize(
    "mark",
    [{"label": False}, {"label": "false"}, {"kto_tag": "False"}, {"weight": 0}],
    ids=lambda mark: next(iter(mark)),
)
def test_a_row_whose_answer_is_not_to_be_learned_is_refused(tmp_path: Path, mark: dict) -> None:
    for row in ({"messages": [ASK, ANSWER]}, {"prompt": "a", "completion": "b"}):
        name = next(iter(mark))
        with pytest.raises(DataError, match=f"l:1: the row's '{name}' is .* not to be .*`data.columns`"):
            read(tmp_path, **row, **mark)
    with pytest.raises(DataError, match="the row's 'kto_tag'"):
        read(tmp_path, instruction="a", output="b", kto_tag=False)
    read(tmp_path, prompt="a", completion="b", label=0, weight=1)


@pytest.mark.parametrize(
    ("row", "other"),
    [
        ({"text": "a"}, {"label": "false", "mask": 1, "weight": 0}),
        ({"text": "a"}, {"label": False}),
        ({"input": "a", "output": "b"}, {"label": False, "choices": ["b", "c"], "weight": 0}),
        ({"input": "a", "output": "b"}, {"train": False, "split": "test", "loss": 0.0}),
        ({"instruction": "a", "output": "b"}, {"label": "False", "weight": 0.0}),
        ({"prompt": "a", "completion": "b"}, {"loss": 0.0, "masked": True}),
        ({"messages": [ASK, ANSWER]}, {"train": False, "mask": 1}),
    ],
)
def test_ordinary_keys_are_no_marks_of_a_row(tmp_path: Path, row: dict, other: dict) -> None:
    assert read(tmp_path, **row, **other).answer


@pytest.mark.parametrize("key", ["label", "weight"])
def test_a_key_that_is_read_as_the_answer_is_no_mark(tmp_path: Path, key: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"sentence": "a", key: "false"}) + "\n")
    [example] = load_examples(file, columns={"prompt": "sentence", "completion": key})
    assert example.answer == "false"


def test_a_part_of_a_turn_cannot_be_left_out(tmp_path: Path) -> None:
    detail = [{"begin_offset": 0, "end_offset": 4, "train": False}]
    with pytest.raises(DataError, match="turn 2: 'train_detail' is not read"):
        read(tmp_path, messages=[ASK, {**ANSWER, "train_detail": detail}])


def test_sharegpt_rows_are_chats(tmp_path: Path) -> None:
    weather = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    turns = [
        {"from": "human", "value": "Rome?"}, {"from": "function_call", "value": weather},
        {"from": "observation", "value": "18 C"}, {"from": "gpt", "value": "18 degrees"},
    ]  # fmt: skip
    example = read(tmp_path, conversations=turns, system="Be brief.")
    assert [turn["role"] for turn in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.format == "messages"
    encode = encoder(tmp_path, CALLS.replace("%s", "{{ c.function.arguments | tojson }}"))
    assert learned(encode, example) == 'weather({"city": "Rome"})\n18 degrees\n'
    assert read(tmp_path, conversations=[ASK, ANSWER]).messages == (ASK, ANSWER)
    unlearned = [turns[0], {**turns[3], "weight": 0}, turns[0], turns[3]]
    assert learned(encoder(tmp_path), read(tmp_path, conversations=unlearned)) == " 18 degrees</s>\n"
    for wrong in ("hal", ["human"]):
        with pytest.raises(DataError, match=r"turn 1: 'from' is .*(hal|human)"):
            read(tmp_path, conversations=[{"from": wrong, "value": "no"}])


@pytest.mark.parametrize(
    ("ask", "call", "result", "answer"),
    [
        ("human", "function_call", "observation", "gpt"),
        ("user", "tool_call", "tool_response", "model"),
        ("human", "function_call", "function", "bing"),
    ],
)
@pytest.mark.parametrize(("name", "value"), [("from", "value"), ("role", "content")])
def test_roles_have_other_names_too(tmp_path: Path, ask, call, result, answer, name, value) -> None:
    said = [
        (ask, "Rome?"),
        (call, '{"name": "weather", "arguments": "{}"}'),
        (result, "18 C"),
        (answer, "18"),
    ]
    example = read(tmp_path, conversations=[{name: role, value: text} for role, text in said])
    assert [turn["role"] for turn in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("template", ["plain", MARKED.replace("<think></think>", "")])
def test_a_chat_that_the_assistant_opens_is_learned_from_its_first_word(tmp_path: Path, template) -> None:
    opened = read(tmp_path, messages=[{**ANSWER, "content": "Hello"}, ASK, ANSWER])
    ends = ("</s>\n", "</s>\n") if template == "plain" else (";", ";")
    space = " " * (template == "plain")
    heard = learned(encoder(tmp_path, template), opened)
    assert heard == f"Hello{ends[0]}{space}18 degrees{ends[1]}"


def test_what_follows_the_last_answer_is_not_judged_as_one(tmp_path: Path) -> None:
    more = read(tmp_path, messages=[ASK, ANSWER, {**ASK, "content": "Oslo?"}])
    assert (more.question, more.answer) == ("Rome?", "18 degrees")
    encode = encoder(tmp_path)
    assert encode.prompt_ids(more) == encode.prompt_ids(read(tmp_path, messages=[ASK, ANSWER]))


def test_roles_are_read_in_any_case(tmp_path: Path) -> None:
    shouted = read(tmp_path, messages=[{**ASK, "role": " User "}, {**ANSWER, "role": "ASSISTANT"}])
    assert shouted.messages == (ASK, ANSWER)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "Be kind."}, ASK, ANSWER], "system": "Be short."},
        {"messages": [ASK, ANSWER], "system": ["Be short."]},
        {"messages": [ASK, ANSWER], "documents": [{"text": "Rome has 18 degrees."}]},
        {"messages": [ASK, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
        {"instruction": "Rome?", "output": "18 degrees", "system": "Be short."},
        {"instruction": "Rome?", "output": "18 degrees", "history": [["Oslo?", "4"]]},
        {"instruction": "Rome?", "output": "18 degrees", "system_prompt": "Be short."},
        {"prompt": "Rome?", "completion": "18 degrees", "system_prompt": "Be short."},
        {"prompt": "Rome?", "completion": "18 degrees", "tools": [{"name": "weather"}]},
        {"input": "Rome?", "output": "18 degrees", "functions": '[{"name": "weather"}]'},
    ],
)
def test_what_a_row_says_beside_its_turns_is_read_or_refused(tmp_path: Path, row: dict) -> None:
    with pytest.raises(DataError, match="l:1: the row's '(system|documents|chat_|history|tools|functions)"):
        read(tmp_path, **row)


def test_parts_of_a_prompt_that_are_empty_or_read_are_not_refused(tmp_path: Path) -> None:
    empty = {"system": "", "system_prompt": None, "history": [], "tools": "[]", "functions": float("nan")}
    assert read(tmp_path, prompt="a", completion="b", **empty).prompt == "a"
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"history": "a", "output": "b"}))
    assert load_examples(file, columns={"input": "history"})[0].prompt == "a\n"
    file.write_text(json.dumps({"prompt": "a", "completion": "b", "system": "s", "system_prompt": "t"}))
    with pytest.raises(DataError, match="the row's 'system' is in no prompt"):
        load_examples(file, template="{system_prompt} {prompt}")


def test_a_template_may_write_the_system_of_an_instruction(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b", "system": "s"}))
    [example] = load_examples(tmp_path / "rows.jsonl", template="{system}: {instruction}")
    assert example.prompt == "s: a"


def test_keys_of_turns_that_no_template_writes_are_named_once(tmp_path: Path, caplog) -> None:
    encode = encoder(tmp_path)
    for _ in range(2):
        encode(read(tmp_path, messages=[{**ASK, "name": "Bob", "id": ""}, {**ANSWER, "weight": 1}]))
    [said] = caplog.messages
    assert said.endswith("the chat template does not write what turns have as 'name'.")


def test_a_chat_without_an_answer_names_its_roles(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no turn of role 'assistant' \(roles: critic, user\)"):
        read(tmp_path, messages=[ASK, {**ANSWER, "role": "critic"}])
    with pytest.raises(DataError, match="turn 2 needs 'role' and text as 'content'"):
        read(tmp_path, messages=[ASK, {**ANSWER, "role": ["assistant"]}])


def test_an_encoder_decoder_learns_a_last_turn_of_text_alone(tmp_path: Path) -> None:
    assert (
        learned(encoder(tmp_path, seq2seq=True), read(tmp_path, messages=[ASK, ANSWER])) == "18 degrees</s>"
    )
    writes = encoder(tmp_path, CALLS.replace("%s", ""), seq2seq=True)
    for last in (ASK, {"role": "assistant", "tool_calls": [call({})]}, {**ANSWER, "weight": 0}):
        with pytest.raises(DataError, match="learns the last turn of a chat, which must be the assistant's"):
            writes(read(tmp_path, messages=[ASK, ANSWER, ASK, last]))


def test_a_tokenizer_without_offsets_is_refused_for_chats(tmp_path: Path, monkeypatch) -> None:
    encode, example = encoder(tmp_path), read(tmp_path, messages=[ASK, ANSWER])
    monkeypatch.setattr(type(encode.tokenizer), "is_fast", False)
    with pytest.raises(ConfigError, match="does not say where tokens stand"):
        encode(example)
