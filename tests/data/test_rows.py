"""Every format, and the errors of rows without one."""

import pytest

from lit_sparse.data import final_number
from lit_sparse.data.rows import BadRow, Chat, Choice, Message, Passage, Tokens, ignored_keys, parse

TOLD = Chat((Message("user", "ask"), Message("assistant", "tell")))


ASKED = {"prompt": "ask", "completion": "tell"}


def turns(answer, **fields):
    return [{"role": "user", "content": "ask"}, {"role": "assistant", "content": answer, **fields}]


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
        ({"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0]}, Tokens((5, 6), (5, 6))),
        ({"input_ids": [5, 6, 0], "labels": [-100, 6, 0], "attention_mask": [1, 1, 0]}, Tokens((5, 6), (-100, 6))),
        (
            {"prompt": [{"role": "user", "content": "ask"}], "completion": [{"role": "assistant", "content": "tell"}]},
            TOLD,
        ),
        ({"conversations": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]}, TOLD),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]},
                    {"role": "assistant", "content": ["tell"]},
                ]
            },
            TOLD,
        ),
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


def test_ordinary_angles_are_kept():
    for answer in ("use std::cout << a; b >> c", "<<quoted>>", "shift: 1<<3=8>>"):
        assert parse({"question": "q", "answer": answer}).messages[1].content == answer
    assert (
        parse({"question": "q", "answer": "<<so>> 2 = <<1+1=2>>2\n#### 2"}).messages[1].content
        == "<<so>> 2 = 2\n#### 2"
    )
    assert parse({"prompt": "q", "completion": "<<1+1=2>>\n#### 2"}).messages[1].content == "<<1+1=2>>\n#### 2"


SYSTEM = Message("system", "be brief")


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "ask", "output": "tell"},
        {"prompt": "ask", "completion": "tell"},
        {"question": "ask", "answer": "tell"},
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}]},
        {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]},
    ],
)
def test_a_system_text_is_the_first_turn(row, key):
    assert parse({**row, key: "be brief"}) == Chat((SYSTEM, *TOLD.messages))
    assert parse({**row, key: ""}) == parse({**row, key: None}) == TOLD


def test_history_comes_before_the_instruction():
    row = {"instruction": "ask", "output": "tell", "history": [["a", "b"], ["c", "d"]], "system": "be brief"}
    before = [Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    assert parse(row) == Chat((SYSTEM, *before, *TOLD.messages))
    assert parse({**row, "history": [], "system": None}) == TOLD


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}, {"a": 1, "b": None}])  # Parquet fills in null
def test_calls_of_tools_are_passed_on(arguments):
    calls = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}]
    turns = [
        {"role": "user", "content": "ask", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "tell"},
    ]
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        chat = parse({"messages": turns, "tools": tools})
        assert chat.tools == ({"name": "add"},)
        assert chat.messages[1] == Message(
            "assistant", "", fields={"tool_calls": [{"id": "c1", **CALL}], "reasoning_content": "hm"}
        )
        assert chat.messages[2] == Message("tool", "1", fields={"tool_call_id": "c1", "name": "add"})


def test_calls_of_sharegpt_are_passed_on():
    turns = [("human", "ask"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", "1")]
    turns = [{"from": name, "value": value} for name, value in [*turns, ("gpt", "tell")]]
    chat = parse({"conversations": turns, "tools": '[{"name": "add"}]', "system": "be brief"})
    assert chat.messages[2:] == (
        Message("assistant", "", fields={"tool_calls": [CALL]}),
        Message("tool", "1"),
        Message("assistant", "tell"),
    )
    assert chat.tools == ({"name": "add"},)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_weight_0_is_not_learnt(mark):
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell", **mark}]
    chat = parse({"messages": [*turns, turns[0], {"role": "assistant", "content": "tell", "weight": 1}]})
    assert [turn.learnt for turn in chat.messages if turn.role == "assistant"] == [False, True]
    turns = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell", **mark}]
    with pytest.raises(BadRow, match="every answer has the weight 0"):
        parse({"conversations": turns})


def test_what_is_not_read_is_told():
    turns = [{"role": "user", "content": "ask", "name": "Bob"}, {"role": "assistant", "content": "tell", "id": 7}]
    assert ignored_keys({"messages": turns, "source": "web", "system": "s", "empty": None}) == [
        "`source`",
        "turns' `name`",
        "turns' `id`",
    ]
    assert ignored_keys({"instruction": "ask", "input": "", "output": "tell", "text": "ask: tell"}) == ["`text`"]
    assert ignored_keys({"input_ids": [1], "attention_mask": [1], "labels": [1]}) == []


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
        ({"input_ids": [1, 2], "attention_mask": [1]}, "2 numbers and `attention_mask` has 1"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "no 1"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "only padding is masked"),
        ({"input_ids": [1, 2], "position_ids": [4, 5]}, "`position_ids`"),
        ({"input_ids": [1, 2], "assistant_masks": [0, 1]}, "`assistant_masks`, which is not read; give `labels`"),
        ({"instruction": "a", "output": None}, "keys instruction, output, of which `output` is null"),
        ({**ASKED, "images": ["a.png"]}, "`images`, but only text is learnt"),
        ({**ASKED, "weight": 0.5}, "`weight`, but rows have no weights"),
        ({**ASKED, "functions": [{"name": "add"}]}, "`functions`, an older form of `tools`"),
        ({**ASKED, "chosen": "a", "rejected": "b"}, "`chosen`, an answer to compare"),
        ({**ASKED, "tools": "add"}, "`tools` is not a list of objects"),
        ({**ASKED, "tools": [1]}, "`tools` is not a list of objects"),
        ({**ASKED, "system": ["a"]}, "`system` has type list"),
        ({**ASKED, "system": "a", "system_prompt": "b"}, "`system` and another system turn"),
        ({"messages": [{"role": "system", "content": "a"}, *turns("tell")], "system": "b"}, "another system turn"),
        ({"text": "a", "system": "b"}, "`system`, but is no chat"),
        ({"question": "q", "choices": ["a", "b"], "label": 0, "tools": [{}]}, "`tools`, but is no chat"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "`history` is not a list of pairs"),
        ({"instruction": "a", "output": "b", "history": "c"}, "`history` is not a list of pairs"),
        ({"messages": turns("tell", weight=0.5)}, "the `weight` 0.5; give 0 or 1"),
        ({"messages": turns("tell", function_call={"name": "a"})}, "`function_call`, an older form of `tool_calls`"),
        ({"messages": turns("tell", refusal="no")}, "`refusal`"),
        ({"messages": turns(None, tool_calls=[{"function": {}}])}, "has no `function` with a `name`"),
        ({"messages": turns([{"type": "image_url", "image_url": {}}])}, "part of type image_url, but only text"),
        ({"messages": turns([{"type": "text"}])}, "a part without a text"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}, *turns("tell")[1:]]},
            "`tool_calls`, which",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "reasoning": "c"}]},
            "`reasoning`, which only turns with the `role` assistant",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(1)"}]},
            "is not JSON",
        ),
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
