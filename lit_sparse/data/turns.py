"""Parsing of the turns of chats, in OpenAI's form and in sharegpt's."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class BadRow(ValueError):
    """An invalid row. The message says why; `sources.locate_errors` adds file and line."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Attributes:
        learnt: Whether the loss is on it, if it is the assistant's.
        fields: What else the chat template gets of the turn: `tool_calls`, `reasoning_content`, ...
    """

    role: str
    content: str
    learnt: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chat:
    """Turns with at least one of the assistant's, on which the loss is, and the tools that they may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def text_field(row: Mapping[str, Any], key: str) -> str:
    """Return the text under `key`; raise BadRow if it is missing, empty or not a text."""
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"`{key}` has type {type(value).__name__}; give a text")
    if not value.strip():
        raise BadRow(f"`{key}` is empty")
    return value


MEDIA = "but only text is learnt; remove it, or the row"
"""Why media are refused."""

FIELDS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's turn, beside `content`, that the chat template gets."""
LEARNT = ("weight", "train")
"""Keys of a turn that say whether it is learnt: 0 or false, 1 or true."""
UNREAD = {
    "refusal": MEDIA,
    "audio": MEDIA,
    "images": MEDIA,
    "function_call": "an older form of `tool_calls`; write those",
}
"""Keys of a turn that would change what is learnt, and why or what instead."""


def turn_keys(turn: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that are read of a turn of this role."""
    if turn.get("role") == "assistant":
        return ("role", "content", *FIELDS, *LEARNT)
    if turn.get("role") in ("tool", "function"):
        return ("role", "content", "name", "tool_call_id")
    if turn.get("from") in ("gpt", "assistant", "function_call"):
        return ("from", "value", *LEARNT)
    return ("from", "value") if "from" in turn else ("role", "content")


def turns_of(row: Mapping[str, Any], key: str) -> list[Message]:
    """Return the turns in the list of OpenAI's form under `key`."""
    return [read_turn(turn) for turn in turn_list(row, key)]


def read_turn(turn: Mapping[str, Any]) -> Message:
    """Read {"role": "...", "content": "..."}, which may have `tool_calls` and more; see `turn_keys`."""
    role = text_field(turn, "role")
    refuse_unread(turn)
    fields = {key: without_nulls(turn[key]) for key in turn_keys(turn)[2:] if turn.get(key) and key not in LEARNT}
    if "tool_calls" in fields:
        fields["tool_calls"] = [read_call(call) for call in turn_list(fields, "tool_calls")]
    # Calls may come without a text, and a tool may return none.
    empty = turn.get("content") in (None, "", []) and ("tool_calls" in fields or role == "tool")
    return Message(role, "" if empty else content_of(turn), is_learnt(turn), fields)


def refuse_unread(turn: Mapping[str, Any]) -> None:
    """Raise BadRow if a turn has a key that would change what is learnt, but is not read of such a turn."""
    for key, why in UNREAD.items():
        if turn.get(key):
            raise BadRow(f"a turn has `{key}`, {why}")
    for key in FIELDS:
        if turn.get(key) and key not in turn_keys(turn):
            raise BadRow(f"a turn has `{key}`, which only turns with the `role` assistant can have")


def content_of(turn: Mapping[str, Any]) -> str:
    """Return the content of a turn: a text, or a list of parts that are texts, which are joined."""
    parts = turn.get("content")
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        return text_field(turn, "content")
    return text_field({"content": "".join(map(part_text, parts))}, "content")


def part_text(part: Any) -> str:
    """Return the text of a part of a content; raise BadRow if it is none."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
    if kind != "text":
        raise BadRow(f"`content` has a part of type {kind}, {MEDIA}")
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise BadRow("`content` has a part without a text")
    return text


def is_learnt(turn: Mapping[str, Any]) -> bool:
    """Return whether the loss is on a turn: its `weight` (1 or 0) or `train` (true or false), true without either."""
    for key in LEARNT:
        value = turn.get(key)
        if value is not None and (not isinstance(value, bool | int | float) or value not in (0, 1)):
            raise BadRow(f"a turn has the `{key}` {value!r}; give 0 or 1, since turns are learnt or not")
    return all(turn.get(key) in (None, 1) for key in LEARNT)


def read_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call of a tool, with its arguments as an object: templates would quote a JSON text a second time."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("a call in `tool_calls` has no `function` with a `name`")
    arguments = parsed_json(function.get("arguments"))
    function = {**function, "arguments": {} if arguments in (None, "") else arguments}
    return {"type": "function", **call, "function": function} if "function" in call else function


SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def spoken(turn: Mapping[str, Any]) -> Message:
    """Read a turn of sharegpt's; `function_call` is a call of a tool, written as JSON, and `observation` its result."""
    name = text_field(turn, "from")
    if name not in SPEAKERS:
        raise BadRow(f"`from` is {name!r}; give one of {', '.join(SPEAKERS)}")
    refuse_unread(turn)
    value = text_field(turn, "value")
    if name != "function_call":
        return Message(SPEAKERS[name], value, is_learnt(turn))
    calls = parsed_json(value)
    calls = [calls] if isinstance(calls, Mapping) else calls
    turn = {"role": "assistant", "tool_calls": calls, "weight": int(is_learnt(turn))}
    if not isinstance(calls, list):
        raise BadRow("a turn of function_call is not JSON with `name` and `arguments`")
    return read_turn({**turn, "tool_calls": [{"type": "function", "function": call} for call in calls]})


def turn_list(row: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    """Return the list of dictionaries under `key`."""
    value = row[key]
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow(f"`{key}` is not a list of turns")
    return value


def checked_chat(turns: Iterable[Message]) -> Chat:
    """Return a chat, which must have an answer of the assistant's to learn and a prompt before it."""
    turns = tuple(turns)
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow("no turn is the assistant's, so that nothing is learnt; add its answer")
    if not any(turn.role == "assistant" and turn.learnt for turn in turns):
        raise BadRow("every answer has the weight 0, so that nothing is learnt; remove the row")
    if turns[0].role == "assistant":  # many chat templates refuse it, and the first token has no context
        raise BadRow("the assistant has the first turn; begin with the turn that it answers")
    return Chat(turns)


def single_turn_chat(prompt: str, answer: str) -> Chat:
    """Return a chat of one question and one answer."""
    return Chat((Message("user", prompt), Message("assistant", answer)))


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Read a list of JSON schemas of functions, which may be written as a JSON text."""
    tools = parsed_json(value)
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("`tools` is not a list of objects; give one JSON schema for each function")
    return tuple(without_nulls(tool) for tool in tools)


def parsed_json(value: Any) -> Any:
    """Return the JSON value that a text holds, or what is no JSON text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def without_nulls(value: Any) -> Any:
    """Return `value` without keys whose value is null: Parquet gives each object the keys of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
