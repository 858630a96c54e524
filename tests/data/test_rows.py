"""Every format, and the errors of rows without one."""

import pytest

from lit_sparse.data import final_number
from lit_sparse.data.rows import BadRow, Chat, Choice, Message, Passage, Tokens, parse

TOLD = Chat((Message("user", "ask"), Message("assistant", "tell")))


@pytest.mark.parametrize(
    ("row", "item"),
    [
        ({"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]}, TOLD),
        ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}]}, TOLD),
        ({"instruction": "ask", "input": "", "output": "tell"}, TOLD),
        ({"instruction": "ask", "output": "tell", "text": "ask: tell"}, TOLD),
        ({"prompt": "ask", "completion": "tell"}, TOLD),
        ({"question": "ask", "answer": "tell"}, TOLD),
        ({"question": "ask", "choices": ["no", "tell"], "label": 1}, Choice("ask", ("no", "tell"), 1)),
        ({"text": "told"}, Passage("told")),
        ({"input_ids": [5, 6, 7]}, Tokens((5, 6, 7), (5, 6, 7))),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, Tokens((5, 6, 7), (-100, 6, 7))),
        ({"messages": None, "text": "told"}, Passage("told")),  # columns of a table with several formats
    ],
)
def test_format_is_detected(row, item):
    assert parse(row) == item


def test_alpaca_input_follows_the_instruction():
    item = parse({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert item == Chat((Message("user", "Add.\n\n1 and 2"), Message("assistant", "3")))


def test_system_turns_and_several_answers_are_kept():
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    item = parse({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert item == Chat(tuple(Message(*turn) for turn in turns))


def test_calculator_marks_are_stripped():
    item = parse({"question": "q", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"})
    assert isinstance(item, Chat)
    assert item.messages[1].content == "48/2 = 24 clips.\n#### 24"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"foo": 1, "bar": 2}, "keys foo, bar"),
        ({}, "keys none"),
        ({"text": ""}, "`text` is empty"),
        ({"text": 3}, "`text` has type int"),
        ({"prompt": ["a"], "completion": "b"}, "`prompt` has type list"),
        ({"messages": "hi"}, "not a list of turns"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "nothing is learnt"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "has the first turn"),
        ({"messages": [{"role": "user"}]}, "`content` has type NoneType"),
        ({"conversations": [{"from": "bot", "value": "hi"}]}, "`from` is 'bot'"),
        ({"question": "q", "choices": ["a"], "label": 0}, "two or more"),
        ({"question": "q", "choices": "ab", "label": 0}, "two or more"),
        ({"question": "q", "choices": ["a", " "], "label": 0}, "empty"),
        ({"question": "q", "choices": ["a", "b"], "label": 2}, "0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "label": "A"}, "'A'"),
        ({"input_ids": []}, "whole numbers"),
        ({"input_ids": [1, -2]}, "whole numbers"),
        ({"input_ids": [1, True]}, "whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 numbers and `labels` has 1"),
    ],
)
def test_bad_rows_say_why(row, why):
    with pytest.raises(BadRow, match=why):
        parse(row)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("48/2 = 24\n#### 24", "24"),
        ("#### 1,200", "1200"),
        ("#### $1,200.50 in 3 days", "1200.5"),
        ("#### -7", "-7"),
        ("so 3 and then 18.00", "18"),
        ("It is 10-5", "5"),
        ("It is 10 - 5 = 5.", "5"),
        ("about -3 degrees", "-3"),
        ("1,2,3", "3"),
        ("12 #### none", "12"),
        ("20", "20"),
        ("nothing", None),
        ("", None),
    ],
)
def test_final_number(answer, number):
    assert final_number(answer) == number
