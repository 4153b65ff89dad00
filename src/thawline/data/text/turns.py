"""Turns of a chat as rows give them: OpenAI's keys or ShareGPT's, objects as such or as JSON text.

row ── read_chat ──► messages: turns with `role` and text as `content`; tools: JSON schemas
"""

from __future__ import annotations

__all__ = ["CHAT_KEYS", "is_learned", "parse_json", "read_chat"]

import json
from collections.abc import Mapping
from typing import Any

from thawline.errors import DataError, did_you_mean

ARGUMENTS = ("arguments", "parameters", "input")
"""Keys under which a call's function has its arguments: OpenAI's, Llama's, Anthropic's."""

USUAL_ROLES = ("system", "user", "assistant", "tool")

SHAREGPT_ROLES = {
    **{name: name for name in USUAL_ROLES},
    "human": "user",
    "gpt": "assistant",
    **dict.fromkeys(("chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool"),
}
"""ShareGPT's `from`, which some rows have as `role` → role."""

WEIGHTS = {"weight": True, "train": True, "training": True, "loss": True, "masked": False, "mask": False}
"""Key that says whether a turn is learned → the value of one that is."""
FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}

CHAT_KEYS = {"system", "system_prompt", "tools", "functions"}
"""Keys of a row that belong to its chat."""
UNREAD = {
    "documents": "Write it into a turn",
    "chat_template_kwargs": "Set `data.chat_options`, for all rows",
}
"""Key of a row that other tools give to the chat template → what to do here."""


def read_chat(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of an Example that hold a chat: `messages`, `n_asked`, `tools`.

    The turns stand in `messages` or `conversations`, or in `prompt` and `completion`.

    Raises: DataError: naming the turn that cannot be read, or if no turn would be learned.
    """
    asked: list[Any] = []
    turns = _decoded(row.get("messages", row.get("conversations")), f"{where}: the chat")
    if turns is None:
        asked, turns = list(row["prompt"]), row["completion"]
        turns = [{"role": "assistant", "content": turns}] if isinstance(turns, str) else turns
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"{where}: a chat must be a list of turns, got {turns!r}.")
    messages = [_turn(turn, f"{where}: turn {i}") for i, turn in enumerate([*asked, *turns], 1)]
    n_asked = len(asked)
    if system := row.get("system") or row.get("system_prompt"):
        if messages[0]["role"] == "system" or not isinstance(system, str):
            raise DataError(f"{where}: the row's 'system' must be text, and no turn of that role come first.")
        messages.insert(0, {"role": "system", "content": system})
        n_asked += bool(asked)
    if unread := [key for key in UNREAD if row.get(key)]:
        raise DataError(f"{where}: the row's '{unread[0]}' is not read. {UNREAD[unread[0]]}, or remove it.")
    answers = [turn for turn in messages[n_asked:] if turn["role"] == "assistant"]
    if not answers:
        roles = ", ".join(sorted({turn["role"] for turn in messages[n_asked:]}))
        raise DataError(
            f"{where}: no turn of role 'assistant' (roles: {roles}), so there is nothing to learn."
        )
    if not any(turn.get("weight", 1) for turn in answers):
        raise DataError(f"{where}: every turn of the assistant has weight 0, so there is nothing to learn.")
    return {"messages": tuple(messages), "n_asked": n_asked, "tools": _tools(row, where)}


def is_learned(key: str, value: Any) -> bool:
    """Return False if `key` says of what has it that it is not learned, and `value` means so."""
    return key not in WEIGHTS or FLAGS.get(str(value).lower(), WEIGHTS[key]) == WEIGHTS[key]


def parse_json(text: str, where: str) -> Any:
    """Parse JSON. Raises: DataError: with the place of the error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}.") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise DataError(f"{where}: JSON that cannot be read: {error}.") from error


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """Return a turn with `role`, text as `content`, and calls whose arguments are objects.

    Keys without a value are left out: tables fill in those that other turns have. A turn that only calls
    tools may have no text.
    """
    found = {key: value for key, value in turn.items() if value is not None} if _is_object(turn) else {}
    for key in ("role", "from"):
        if (role := str(found.get(key)).strip().lower()) in SHAREGPT_ROLES:
            found[key] = role
    if "role" not in found and "from" in found:
        found = _from_sharegpt(found, where)
    elif str(found.get("role")) in SHAREGPT_ROLES.keys() - USUAL_ROLES:
        role, content = found.pop("role"), found.pop("content", None)
        found = _from_sharegpt({"from": role, "value": content, **found}, where)
    if "function_call" in found:
        found["tool_calls"] = [found.pop("function_call")]
    if calls := _decoded(found.pop("tool_calls", None), f"{where}: the `tool_calls`"):
        found = {"content": "", **found, "tool_calls": [_tool_call(call, where) for call in calls]}
    if "content" not in found or not isinstance(found.get("role"), str):
        raise DataError(f"{where} needs 'role' and text as 'content', got {turn!r}.")
    found["content"] = _content(found["content"], where)
    if found.get("train_detail"):
        raise DataError(f"{where}: 'train_detail' is not read: a turn is learned whole, or has 'weight' 0.")
    for key in WEIGHTS.keys() & found.keys():
        value = found.pop(key)
        if str(value).lower() not in FLAGS:
            raise DataError(f"{where}: the '{key}' must be 0 or 1, false or true, got {value!r}.")
        found["weight"] = int(is_learned(key, value))
    return found


def _from_sharegpt(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a turn of ShareGPT's keys, `from` and `value`, under the usual ones."""
    rest = dict(turn)
    name, value = rest.pop("from"), rest.pop("value", None)
    if value is None:
        raise DataError(f"{where} needs 'from' and 'value', got {turn!r}.")
    if not isinstance(name, str) or name not in SHAREGPT_ROLES:
        raise DataError(f"{where}: 'from' is {name!r}. {did_you_mean(str(name), SHAREGPT_ROLES)}")
    if name not in ("function_call", "tool_call"):
        return {"role": SHAREGPT_ROLES[name], "content": value, **rest}
    calls = _decoded(value, f"{where}: the call")
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


def _content(content: Any, where: str) -> str:
    """Return the text of a turn, which may be given as a list of parts."""
    parts = content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]
    for part in parts:
        kind = part.get("type") if _is_object(part) else type(part).__name__
        if kind != "text":
            raise DataError(f"{where}: of a content only parts of type 'text' can be read, got {kind!r}.")
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}: the 'content' must be text, got {part.get('text')!r}.")
    return "".join(part["text"] for part in parts)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object; OpenAI's API gives them as JSON text."""
    call = call if _is_object(call) and "function" in call else {"function": call}
    function = call["function"]
    if not _is_object(function) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call needs a function with a 'name', got {function!r}.")
    names = [key for key in ARGUMENTS if function.get(key)]
    what = f"{where}: the arguments of '{function['name']}'"
    if len(names) > 1:
        raise DataError(f"{what} are given twice, as '{names[0]}' and '{names[1]}'. Keep one.")
    given = function[names[0]] if names else None
    arguments = _decoded(_decoded(given or {}, what) or {}, what)  # encoded twice by some tools
    if not _is_object(arguments):
        raise DataError(f"{what} must be an object, or its JSON text, got {given!r}.")
    plain = {key: value for key, value in function.items() if key not in ARGUMENTS}
    rest = {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **rest, "function": {**plain, "arguments": arguments}}


def _tools(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """Return a row's `tools`, or its `functions`: OpenAI's older key, of what a tool's `function` holds."""
    found: dict[str, list[Any]] = {}
    for key in ("tools", "functions"):
        given = _decoded(row.get(key) or [], f"{where}: `{key}`") or []
        if not isinstance(given, (list, tuple)) or not all(map(_is_object, given)):
            raise DataError(
                f"{where}: `{key}` must be a list of JSON schemas, or its JSON text, got {given!r}."
            )
        found[key] = list(given)
    tools, functions = found["tools"], found["functions"]
    wrapped = [one if "function" in one else {"type": "function", "function": one} for one in functions]
    if tools and functions and tools not in (functions, wrapped):
        raise DataError(f"{where}: the row's `tools` and `functions` differ. Keep one of the two.")
    return tuple(tools or wrapped)


def _decoded(value: Any, where: str) -> Any:
    """Parse a value given as JSON text, as tables hold it; return any other as it is."""
    return parse_json(value, where) if isinstance(value, str) else value


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)
