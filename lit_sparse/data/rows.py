"""What a row of a data file means: a chat, a multiple-choice question, a passage of text, or tokens."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_sparse.loss import IGNORED


class BadRow(ValueError):
    """A row that cannot be used. The message says why; whoever knows the file and the line adds them."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """Turns with at least one answer of the assistant's; every such answer is learnt."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question: the right choice is learnt, all of them are scored."""

    question: str
    choices: tuple[str, ...]
    label: int

    def chat(self, choice: int) -> Chat:
        """The question, answered with the choice of that index."""
        return Chat((Message("user", self.question), Message("assistant", self.choices[choice])))


@dataclass(frozen=True)
class Passage:
    """Plain text; every token is learnt."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """A row that is tokenised already."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


Item = Chat | Choice | Passage | Tokens


def parse(row: Mapping[str, Any]) -> Item:
    """The meaning of `row`, whose format is detected from its keys.

    Raises:
        BadRow: no known format has these keys, or a value is not what its format wants.
    """
    for keys, read in FORMATS.items():
        if all(row.get(key) is not None for key in keys):
            return read(row)
    known = "; ".join(", ".join(keys) for keys in FORMATS)
    raise BadRow(f"it has the keys {', '.join(map(str, row)) or 'none'}, and no known format: one of {known} is wanted")


def text_field(row: Mapping[str, Any], key: str) -> str:
    """The text under `key`, which must say something."""
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"`{key}` is {type(value).__name__}, text is wanted")
    if not value.strip():
        raise BadRow(f"`{key}` is empty")
    return value


def read_messages(row: Mapping[str, Any]) -> Chat:
    """{"messages": [{"role": "user", "content": "..."}, ...]}"""
    return checked_chat(
        [Message(text_field(turn, "role"), text_field(turn, "content")) for turn in turn_list(row, "messages")]
    )


SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_conversations(row: Mapping[str, Any]) -> Chat:
    """{"conversations": [{"from": "human", "value": "..."}, ...]}"""
    return checked_chat([Message(role_of(turn), text_field(turn, "value")) for turn in turn_list(row, "conversations")])


def role_of(turn: Mapping[str, Any]) -> str:
    """The role of a sharegpt turn."""
    name = text_field(turn, "from")
    if name not in SPEAKERS:
        raise BadRow(f"`from` is {name!r}, one of {', '.join(SPEAKERS)} is wanted")
    return SPEAKERS[name]


def turn_list(row: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    """The list of dictionaries under `key`."""
    value = row[key]
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow(f"`{key}` is no list of turns")
    return value


def checked_chat(turns: Sequence[Message]) -> Chat:
    """A chat that something can be learnt from."""
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow("no turn is the assistant's, so there is nothing to learn")
    if turns[0].role == "assistant":
        raise BadRow("the assistant speaks first; begin with what it answers")
    return Chat(tuple(turns))


def single_turn_chat(prompt: str, answer: str) -> Chat:
    """One question and one answer."""
    return Chat((Message("user", prompt), Message("assistant", answer)))


def read_alpaca(row: Mapping[str, Any]) -> Chat:
    """{"instruction": "...", "input": "..." (may be empty or absent), "output": "..."}"""
    prompt = text_field(row, "instruction")
    if row.get("input"):
        prompt += "\n\n" + text_field(row, "input")
    return single_turn_chat(prompt, text_field(row, "output"))


def read_completion(row: Mapping[str, Any]) -> Chat:
    """{"prompt": "...", "completion": "..."}"""
    return single_turn_chat(text_field(row, "prompt"), text_field(row, "completion"))


CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's marks, such as <<48/2=24>>: instructions to a calculator, nothing that a reader sees."""


def read_answered(row: Mapping[str, Any]) -> Chat:
    """{"question": "...", "answer": "..."}, as in GSM8K"""
    return single_turn_chat(text_field(row, "question"), CALCULATOR.sub("", text_field(row, "answer")))


def read_choice(row: Mapping[str, Any]) -> Choice:
    """{"question": "...", "choices": ["...", ...], "label": 0}"""
    offered, label = row["choices"], row["label"]
    if not isinstance(offered, Sequence) or isinstance(offered, str) or len(offered) < 2:
        raise BadRow("`choices` is no list of two or more texts")
    if not all(isinstance(one, str) and one.strip() for one in offered):
        raise BadRow("`choices` holds something empty or not text")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(offered):
        raise BadRow(f"`label` is {label!r}, the index of the right choice (0 to {len(offered) - 1}) is wanted")
    return Choice(text_field(row, "question"), tuple(offered), label)


def read_passage(row: Mapping[str, Any]) -> Passage:
    """{"text": "..."}"""
    return Passage(text_field(row, "text"))


def read_tokens(row: Mapping[str, Any]) -> Tokens:
    """{"input_ids": [...], "labels": [...] (absent: all tokens are learnt)}"""
    ids = integer_field(row, "input_ids", lowest=0)
    labels = integer_field(row, "labels", lowest=IGNORED) if row.get("labels") is not None else ids
    if len(ids) != len(labels):
        raise BadRow(f"`input_ids` has {len(ids)} numbers and `labels` {len(labels)}")
    return Tokens(ids, labels)


def integer_field(row: Mapping[str, Any], key: str, lowest: int) -> tuple[int, ...]:
    """The whole numbers under `key`, none below `lowest`."""
    value = row[key]
    if not isinstance(value, Sequence) or not value or not all(type(one) is int and one >= lowest for one in value):
        raise BadRow(f"`{key}` is no list of whole numbers from {lowest} on")
    return tuple(value)


FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Item]] = {
    ("input_ids",): read_tokens,
    ("messages",): read_messages,
    ("conversations",): read_conversations,
    ("instruction", "output"): read_alpaca,
    ("prompt", "completion"): read_completion,
    ("question", "choices", "label"): read_choice,
    ("question", "answer"): read_answered,
    ("text",): read_passage,
}
"""The keys that tell a format, most telling first: many sets carry a `text` beside the fields it was made of."""


RESULT_MARK = "####"
"""What GSM8K's answers write before the result."""

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def final_number(answer: str) -> str | None:
    """The result that a worked answer arrives at: the number after "####", else the last number; None without any.

    Thousands' commas and trailing zeros after the point are taken off, so that "1,200.00" and "1200" compare as equal.
    """
    _, marked, after = answer.partition(RESULT_MARK)
    found = NUMBER.search(after) if marked else None
    numbers = [found.group()] if found else NUMBER.findall(answer)
    return normalise_number(numbers[-1]) if numbers else None


def normalise_number(number: str) -> str:
    """`number` without commas and without zeros that say nothing."""
    number = number.replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
