"""Parsing of a data file's rows into chats, multiple-choice questions, passages of text, or tokens."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_sparse.loss import IGNORED


class BadRow(ValueError):
    """An invalid row. The message says why; `sources.locate_errors` adds file and line."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """Turns with at least one of the assistant's; the loss is on all of these."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question: trained on the correct choice, scored on all."""

    question: str
    choices: tuple[str, ...]
    label: int

    def chat(self, choice: int) -> Chat:
        """Return the question answered with the choice of index `choice`."""
        return Chat((Message("user", self.question), Message("assistant", self.choices[choice])))


@dataclass(frozen=True)
class Passage:
    """Plain text; the loss is on every token."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """A row of token ids."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


Item = Chat | Choice | Passage | Tokens


def parse(row: Mapping[str, Any]) -> Item:
    """Parse `row`, whose format is detected from its keys.

    Raises:
        BadRow: if no known format has these keys, or a value does not fit its format.
    """
    for keys, read in FORMATS.items():
        # null counts as absent: in a table of mixed formats, every row has the columns of all of them.
        if all(row.get(key) is not None for key in keys):
            return read(row)
    known = "; ".join(", ".join(keys) for keys in FORMATS)
    raise BadRow(f"it has the keys {', '.join(map(str, row)) or 'none'}, which is no known format; give one of {known}")


def text_field(row: Mapping[str, Any], key: str) -> str:
    """Return the text under `key`; raise BadRow if it is missing, empty or not a text."""
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"`{key}` has type {type(value).__name__}; give a text")
    if not value.strip():
        raise BadRow(f"`{key}` is empty")
    return value


def read_messages(row: Mapping[str, Any]) -> Chat:
    """Read {"messages": [{"role": "user", "content": "..."}, ...]}."""
    return checked_chat(
        [Message(text_field(turn, "role"), text_field(turn, "content")) for turn in turn_list(row, "messages")]
    )


SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_conversations(row: Mapping[str, Any]) -> Chat:
    """Read {"conversations": [{"from": "human", "value": "..."}, ...]}."""
    return checked_chat([Message(role_of(turn), text_field(turn, "value")) for turn in turn_list(row, "conversations")])


def role_of(turn: Mapping[str, Any]) -> str:
    """Return the role of a sharegpt turn."""
    name = text_field(turn, "from")
    if name not in SPEAKERS:
        raise BadRow(f"`from` is {name!r}; give one of {', '.join(SPEAKERS)}")
    return SPEAKERS[name]


def turn_list(row: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    """Return the list of dictionaries under `key`."""
    value = row[key]
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow(f"`{key}` is not a list of turns")
    return value


def checked_chat(turns: Sequence[Message]) -> Chat:
    """Return a chat, which must have an answer of the assistant's and a prompt before it."""
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow("no turn is the assistant's, so that nothing is learnt; add its answer")
    if turns[0].role == "assistant":  # many chat templates refuse it, and the first token has no context
        raise BadRow("the assistant has the first turn; begin with the turn that it answers")
    return Chat(tuple(turns))


def single_turn_chat(prompt: str, answer: str) -> Chat:
    """Return a chat of one question and one answer."""
    return Chat((Message("user", prompt), Message("assistant", answer)))


def read_alpaca(row: Mapping[str, Any]) -> Chat:
    """Read {"instruction": "...", "input": "..." (may be empty or absent), "output": "..."}."""
    prompt = text_field(row, "instruction")
    if row.get("input"):
        prompt += "\n\n" + text_field(row, "input")
    return single_turn_chat(prompt, text_field(row, "output"))


def read_completion(row: Mapping[str, Any]) -> Chat:
    """Read {"prompt": "...", "completion": "..."}."""
    return single_turn_chat(text_field(row, "prompt"), text_field(row, "completion"))


CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's annotations, such as <<48/2=24>>. They are instructions to a calculator, not part of the answer's text."""


def read_answered(row: Mapping[str, Any]) -> Chat:
    """Read {"question": "...", "answer": "..."}, as in GSM8K."""
    return single_turn_chat(text_field(row, "question"), CALCULATOR.sub("", text_field(row, "answer")))


def read_choice(row: Mapping[str, Any]) -> Choice:
    """Read {"question": "...", "choices": ["...", ...], "label": 0}."""
    offered, label = row["choices"], row["label"]
    if not isinstance(offered, Sequence) or isinstance(offered, str) or len(offered) < 2:
        raise BadRow("`choices` is not a list of two or more texts")
    if not all(isinstance(one, str) and one.strip() for one in offered):
        raise BadRow("`choices` has an empty entry, or one that is not a text")
    # True and False are ints in Python, and would pass for the indices 1 and 0.
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(offered):
        raise BadRow(f"`label` is {label!r}; give the index of the correct choice (0 to {len(offered) - 1})")
    return Choice(text_field(row, "question"), tuple(offered), label)


def read_passage(row: Mapping[str, Any]) -> Passage:
    """Read {"text": "..."}."""
    return Passage(text_field(row, "text"))


def read_tokens(row: Mapping[str, Any]) -> Tokens:
    """Read {"input_ids": [...], "labels": [...]}. Without labels, the loss is on every token."""
    ids = integer_field(row, "input_ids", lowest=0)
    labels = integer_field(row, "labels", lowest=IGNORED) if row.get("labels") is not None else ids
    if len(ids) != len(labels):
        raise BadRow(f"`input_ids` has {len(ids)} numbers and `labels` has {len(labels)}; give as many labels")
    return Tokens(ids, labels)


def integer_field(row: Mapping[str, Any], key: str, lowest: int) -> tuple[int, ...]:
    """Return the whole numbers under `key`; raise BadRow if one is below `lowest` or not a whole number."""
    value = row[key]
    if not isinstance(value, Sequence) or not value or not all(type(one) is int and one >= lowest for one in value):
        raise BadRow(f"`{key}` is not a list of whole numbers from {lowest} up")
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
"""Keys of each format, the most specific first: many data sets have a `text` beside the fields that it was made of."""


RESULT_MARK = "####"
"""Precedes the result in GSM8K's answers."""

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
"""A number, with thousands' commas or without. A "-" after a word or ")" is a subtraction, not a sign."""


def final_number(answer: str) -> str | None:
    """Return the result of a worked answer: the number after "####", else the last number; None if there is none.

    Thousands' commas and trailing zeros after the point are removed, so that "1,200.00" and "1200" are equal.
    """
    # A generated answer may have the mark and no number after it: then, too, the last number counts.
    _, marked, after = answer.partition(RESULT_MARK)
    found = NUMBER.search(after) if marked else None
    numbers = [found.group()] if found else NUMBER.findall(answer)
    return normalise_number(numbers[-1]) if numbers else None


def normalise_number(number: str) -> str:
    """Return `number` without commas and without trailing zeros after the point."""
    number = number.replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
