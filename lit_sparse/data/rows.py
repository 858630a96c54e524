"""Parsing of a data file's rows into chats, multiple-choice questions, passages of text, or tokens."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_sparse.data.turns import (
    MEDIA,
    BadRow,
    Chat,
    Message,
    checked_chat,
    read_tools,
    read_turn,
    single_turn_chat,
    spoken,
    text_field,
    turn_keys,
    turn_list,
    turns_of,
)
from lit_sparse.loss import IGNORED


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
        BadRow: if no known format has these keys, a value does not fit its format, or a key asks for more than text.
    """
    # null counts as absent: in a table of mixed formats, every row has the columns of all of them.
    given = {key: value for key, value in row.items() if value is not None}
    keys = next((keys for keys in FORMATS if all(key in given for key in keys)), None)
    if keys is None:
        raise BadRow(unknown_format(row))
    for key in given:
        if key in UNSUPPORTED and given[key] not in ("", [], {}, 1):
            raise BadRow(f"it has `{key}`, {UNSUPPORTED[key]}")
    item = FORMATS[keys](given)
    return with_context(item, given) if isinstance(item, Chat) else refuse_context(item, given)


def unknown_format(row: Mapping[str, Any]) -> str:
    """Return the message on a row that no format fits."""
    names = ", ".join(map(str, row)) or "none"
    nulls = [key for keys in FORMATS if all(key in row for key in keys) for key in keys if row[key] is None]
    if nulls:
        return f"it has the keys {names}, of which `{nulls[0]}` is null; give a value, or remove the row"
    known = "; ".join(", ".join(keys) for keys in FORMATS)
    return f"it has the keys {names}, which is no known format; give one of {known}"


UNSUPPORTED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), MEDIA),
    **dict.fromkeys(("functions", "function_call"), "an older form of `tools` and `tool_calls`; write those"),
    **dict.fromkeys(("chosen", "rejected"), "an answer to compare with another, which is not learnt; remove it"),
    **dict.fromkeys(("completion_mask", "assistant_masks", "loss_mask"), "which is not read; give `labels`"),
    "position_ids": "but positions count from 0; remove it",
    "chat_template_kwargs": "which is not given to the chat template; change the template, or remove it",
    "weight": "but rows have no weights; repeat or remove the row",
}
"""Keys of a row that would change what is learnt, and why or what instead. Empty values, and a weight of 1, do not."""

CONTEXT = ("system", "system_prompt", "tools")
"""Keys beside any chat format: a system turn before the others, and the tools."""


def with_context(chat: Chat, row: Mapping[str, Any]) -> Chat:
    """Return the chat with the row's `system` (or `system_prompt`) and `tools`."""
    messages = chat.messages
    given = [key for key in ("system", "system_prompt") if row.get(key) not in (None, "")]
    if len(given) > 1 or (given and messages[0].role == "system"):
        raise BadRow(f"it has `{given[0]}` and another system turn; leave one of them")
    if given:
        messages = (Message("system", text_field(row, given[0])), *messages)
    return replace(chat, messages=messages, tools=read_tools(row.get("tools") or []))


def refuse_context(item: Item, row: Mapping[str, Any]) -> Item:
    """Return `item`, which is no chat; raise BadRow if its row has what only a chat can have."""
    for key in CONTEXT:
        if row.get(key):
            raise BadRow(f"it has `{key}`, but is no chat; remove it, or give `messages`")
    return item


def ignored_keys(row: Mapping[str, Any]) -> list[str]:
    """Return the keys of `row` and of its turns that `parse` reads nothing from, those of turns as "turns' `key`"."""
    given = {key: value for key, value in row.items() if value is not None}
    keys = next(keys for keys in FORMATS if all(key in given for key in keys))
    read = {*keys, *READ_BESIDE.get(keys, ()), *CONTEXT, *UNSUPPORTED}
    found = [f"`{key}`" for key in given if key not in read]
    for turn in (turn for key in keys if is_turns(given[key]) for turn in given[key]):
        found += [f"turns' `{key}`" for key, value in turn.items() if value is not None and key not in turn_keys(turn)]
    return list(dict.fromkeys(found))


def read_messages(row: Mapping[str, Any]) -> Chat:
    """Read {"messages": [{"role": "user", "content": "..."}, ...]}."""
    return checked_chat(turns_of(row, "messages"))


def read_conversations(row: Mapping[str, Any]) -> Chat:
    """Read {"conversations": [{"from": "human", "value": "..."}, ...]}, or turns of `messages` under this key."""
    turns = turn_list(row, "conversations")
    return checked_chat([read_turn(turn) if "role" in turn and "from" not in turn else spoken(turn) for turn in turns])


def read_alpaca(row: Mapping[str, Any]) -> Chat:
    """Read {"instruction": "...", "input": "..." (may be empty or absent), "output": "..."}.

    `history` is a list of [question, answer] before it, which are learnt, too, as in LLaMA-Factory.
    """
    prompt = text_field(row, "instruction")
    if row.get("input"):
        prompt += "\n\n" + text_field(row, "input")
    history = row.get("history") or []
    if not isinstance(history, Sequence) or not all(is_pair(pair) for pair in history):
        raise BadRow("`history` is not a list of pairs of texts, question and answer")
    before = [single_turn_chat(*pair).messages for pair in history]
    last = single_turn_chat(prompt, text_field(row, "output")).messages
    return Chat((*(turn for pair in before for turn in pair), *last))


def is_pair(value: Any) -> bool:
    """Return whether `value` is a list of two texts."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(one, str) and one for one in value)


def read_completion(row: Mapping[str, Any]) -> Chat:
    """Read {"prompt": "...", "completion": "..."}; both may be lists of turns, of which the completion's are learnt."""
    if not all(is_turns(row[key]) for key in ("prompt", "completion")):
        return single_turn_chat(text_field(row, "prompt"), text_field(row, "completion"))
    before = [replace(turn, learnt=turn.role != "assistant") for turn in turns_of(row, "prompt")]
    return checked_chat([*before, *turns_of(row, "completion")])


def is_turns(value: Any) -> bool:
    """Return whether `value` is a list that begins with a turn."""
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)


CALCULATOR = re.compile(r"<<[^<>=]*=[^<>]*>>")
"""GSM8K's annotations, such as <<48/2=24>>. They are instructions to a calculator, not part of the answer's text."""


def read_answered(row: Mapping[str, Any]) -> Chat:
    """Read {"question": "...", "answer": "..."}; of answers with a result as in GSM8K, without its annotations."""
    answer = text_field(row, "answer")
    return single_turn_chat(
        text_field(row, "question"), CALCULATOR.sub("", answer) if RESULT_MARK in answer else answer
    )


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
    """Read {"input_ids": [...], "labels": [...], "attention_mask": [...]}.

    Without labels, the loss is on every token. Tokens whose mask is 0 are padding, which is left out.
    """
    ids = integer_field(row, "input_ids", lowest=0)
    labels = integer_field(row, "labels", lowest=IGNORED) if "labels" in row else ids
    mask = integer_field(row, "attention_mask", lowest=0) if "attention_mask" in row else (1,) * len(ids)
    for key, values in {"labels": labels, "attention_mask": mask}.items():
        if len(ids) != len(values):
            raise BadRow(f"`input_ids` has {len(ids)} numbers and `{key}` has {len(values)}; give as many")
    if 1 not in mask:
        raise BadRow("`attention_mask` has no 1, so that nothing is learnt")
    kept = slice(mask.index(1), len(mask) - mask[::-1].index(1))
    if set(mask[kept]) != {1}:
        raise BadRow("`attention_mask` has other numbers than 1 between its first and last 1; only padding is masked")
    return Tokens(ids[kept], labels[kept])


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

READ_BESIDE: dict[tuple[str, ...], tuple[str, ...]] = {
    ("input_ids",): ("labels", "attention_mask"),
    ("instruction", "output"): ("input", "history"),
}
"""Keys that are read beside those of a format, if a row has them."""


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
