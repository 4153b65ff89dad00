"""Special tokens are read once, in one way: how a text opens, where it ends, what a cut keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import processors

from tests.support.text import byte_tokenizer
from thawline.data.text import IGNORED, Example, TextEncoder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def opened_by(token: str, *, closed_by: str = ""):
    """Build a tokenizer whose texts open with `token`, which may be its end token too, as OPT's does."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = token or None
    single = f"{token} $A {closed_by}".strip()
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in {token, closed_by} - {""}]
    post = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def completion(prompt: str, answer: str) -> Example:
    return Example(prompt=prompt, completion=answer, format="prompt-completion")


@pytest.mark.parametrize(
    ("bos", "closed_by"), [("<s>", ""), ("</s>", ""), ("<s>", "</s>"), ("", "")],
    ids=["Llama", "OPT", "BART", "GPT-2"],
)  # fmt: skip
def test_a_row_and_a_prompt_open_as_the_tokenizer_opens_a_text(bos: str, closed_by: str) -> None:
    encode = TextEncoder(opened_by(bos, closed_by=closed_by))
    decode = encode.tokenizer.decode
    assert decode(encode(completion("q", "a"))["input_ids"]) == f"{bos}qa</s>"
    assert decode(encode(Example(completion="text"))["input_ids"]) == f"{bos}text</s>"
    assert decode(encode.prompt_ids(completion("q", "a"))) == f"{bos}q"


@pytest.mark.parametrize("bos", ["<s>", "</s>"])
@pytest.mark.parametrize("end", ["</s>", "</s>\n", "</s></s>", ""])
def test_special_tokens_that_the_data_brings_along_are_not_doubled(bos: str, end: str) -> None:
    encode = TextEncoder(opened_by(bos))
    row, text = encode(completion(f"{bos}q", f"a{end}")), encode(Example(completion=f"{bos}a{end}"))
    assert encode.tokenizer.decode(row["input_ids"]) == f"{bos}qa</s>"
    assert encode.tokenizer.decode(text["input_ids"]) == f"{bos}a</s>"
    assert encode.without_end(f"a{end}") == "a"


def test_an_encoder_decoders_answer_ends_once() -> None:
    encode = TextEncoder(opened_by("", closed_by="</s>"), seq2seq=True)
    row = encode(completion("q", "a</s>"))
    assert [encode.tokenizer.decode(ids) for ids in row.values()] == ["q</s>", "a</s>"]


@pytest.mark.parametrize("bos", ["<s>", "</s>", ""])
def test_a_long_prompt_is_cut_alike_in_training_and_in_predict(bos: str) -> None:
    encode = TextEncoder(opened_by(bos), max_length=6)
    example, decode = completion("abcdefghijk", ""), encode.tokenizer.decode
    assert decode(encode.prompt_ids(example)) == (bos + "ghijk" if bos else "fghijk")
    assert decode(encode(example)["input_ids"]) == (bos + "hijk</s>" if bos else "ghijk</s>")


def test_a_cut_chat_keeps_its_opening_token_and_gets_none_that_it_lacked() -> None:
    chat = Example(messages=({"role": "user", "content": "abcdefgh"},), format="messages")
    tokenizer = opened_by("<s>")
    encode = TextEncoder(tokenizer, max_length=12, chat_template="plain")
    assert tokenizer.decode(encode.prompt_ids(chat)) == "<s>\nassistant:"
    tokenizer.chat_template = CHATML
    assert tokenizer.decode(TextEncoder(tokenizer, max_length=12).prompt_ids(chat)) == "|>assistant\n"


def test_answers_end_with_the_bases_ends_the_tokenizers_and_the_turns() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])  # not marked as special, as in some tokenizers
    tokenizer.chat_template = CHATML
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    encode, end = TextEncoder(tokenizer), tokenizer.eos_token_id
    assert encode.stop_ids(SimpleNamespace(eos_token_id=[7, end]), is_chat=True) == [7, end, turn_end]
    assert encode.stop_ids(SimpleNamespace(eos_token_id=7), is_chat=False) == [7, end]
    assert encode.stop_ids(None, is_chat=True) == [end, turn_end]
    assert TextEncoder(tokenizer, chat_template="plain").chat.turn_end == end
    # Closed by text, refused by the template, and no template at all.
    by_text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for template in (by_text, "{{ raise_exception('no') }}", None):
        tokenizer.chat_template = template
        assert TextEncoder(tokenizer).chat.turn_end is None


def test_the_opening_token_is_not_learned_where_it_is_the_end_token() -> None:
    row = TextEncoder(opened_by("</s>"))(completion("q", "a"))
    assert row["labels"][:2] == [IGNORED, IGNORED]
