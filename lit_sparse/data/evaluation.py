"""Held-out rows that are scored beside the loss: multiple choice, worked answers, and samples to read."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lit_sparse.data.chats import last_prompt
from lit_sparse.data.collate import Question, ScoredChoices
from lit_sparse.data.encoding import Encoder
from lit_sparse.data.rows import RESULT_MARK, Chat, Choice, Item, final_number, parse
from lit_sparse.data.sources import Row, locate_errors


def parse_rows(rows: Sequence[Row]) -> Iterator[tuple[Row, Item]]:
    """Iterate over the rows, each with its parsed item."""
    for row in rows:
        with locate_errors(row):
            yield row, parse(row.data)


def scored_choices(rows: Sequence[Row], encoder: Encoder, max_length: int) -> list[ScoredChoices]:
    """Return the multiple-choice questions among `rows` whose every choice fits into `max_length` tokens."""
    found = []
    for row, item in parse_rows(rows):
        if isinstance(item, Choice):
            with locate_errors(row):
                examples = encoder.encode_choices(item)
            # Not truncated: the choices are at the end, and would be cut.
            if max(len(one.input_ids) for one in examples) <= max_length:
                found.append(ScoredChoices(examples, item.label))
    return found


def questions(rows: Sequence[Row], encoder: Encoder, max_length: int) -> list[Question]:
    """Return the questions with a worked answer ("#### number") whose prompt fits into `max_length` tokens."""
    found = []
    for row, item in parse_rows(rows):
        answer = reference_answer(item) if isinstance(item, Chat) else ""
        # Without the mark, a free answer's last number need not be its result.
        result = final_number(answer) if RESULT_MARK in answer else None
        if isinstance(item, Chat) and result is not None:
            found.append(Question(prompt_of(row, item, encoder), result))
    return [one for one in found if len(one.prompt_ids) <= max_length]


def samples(rows: Sequence[Row], encoder: Encoder, max_length: int, count: int) -> list[dict[str, Any]]:
    """Return the first `count` prompts that fit into `max_length` tokens.

    Each has the keys `prompt_ids` (list of int), `prompt` and `reference` (texts).
    """
    # Generators: to find three samples, only the first few rows are tokenised.
    prompts = (
        (prompt_of(row, item, encoder), item) for row, item in parse_rows(rows) if isinstance(item, Chat | Choice)
    )
    fitting = ((ids, item) for ids, item in prompts if len(ids) <= max_length)
    return [
        {"prompt_ids": ids, "prompt": question_text(item), "reference": reference_answer(item)}
        for ids, item in islice(fitting, count)
    ]


def prompt_of(row: Row, item: Chat | Choice, encoder: Encoder) -> list[int]:
    """Return the tokens before the last answer; raise BadInput, with the row's place, if the template refuses them."""
    with locate_errors(row):
        return encoder.encode_prompt(item)


def question_text(item: Chat | Choice) -> str:
    """Return the question of a multiple-choice item, or the turn before the assistant's last answer."""
    return item.question if isinstance(item, Choice) else last_prompt(item)[-1].content


def reference_answer(item: Chat | Choice) -> str:
    """Return the correct choice, or the assistant's last answer."""
    if isinstance(item, Choice):
        return item.choices[item.label]
    return [turn.content for turn in item.messages if turn.role == "assistant"][-1]
