"""Learnt text under chat templates of all kinds; what a template leaves out is named."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lit_sparse.data.encoding import Encoder
from lit_sparse.data.rows import IGNORED, BadRow, parse
from tests.data.conftest import byte_level

# Small templates of the kinds that models have; the names say whose.
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN3 = (  # thinking in the last answer only, also where the answer has none
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].strip() %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + OPENED
)
R1 = (  # reasoning is always dropped, but prompts open it
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% else %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
PHI35 = (  # one more end token, once, at the end of the chat
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GPT_OSS = (  # the last answer ends otherwise than those before it
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m.content + ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GLM = (  # no end token: the next turn's first one is generated
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COMMAND = (  # two tokens end an answer
    "{% for m in messages %}{{ '<|start|><|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{{ '<|start_response|>' + m.content + '<|end_response|>' }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|><|assistant|>{% endif %}"
)
GEMMA = (  # a role of its own name, trimmed contents, no system turns
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
MISTRAL = (  # the end is the tokenizer's, and there is no token before an answer
    "<bos>{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] ' + m.tool_calls | tojson + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (  # neither end token nor added tokens
    "{% for m in messages %}{{ m.role | upper + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL = ("<unk>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|user|>", "<|assistant|>",
           "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end_response|>", "<start>", "[INST]",
           "[/INST]", "[TOOL_CALLS]")  # fmt: skip


def encoder(template: str) -> Encoder:
    tokenizer = byte_level(SPECIAL)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")
    found.chat_template = template
    return Encoder(found)


def learnt(encoder: Encoder, row: dict[str, Any]) -> list[str]:
    """Return the texts of the stretches of learnt tokens."""
    example = encoder.encode(parse(row))
    stretches, before = [], IGNORED
    for label in example.labels:
        if label != IGNORED:
            stretches += [[]] if before == IGNORED else []
            stretches[-1].append(label)
        before = label
    return [str(encoder.tokenizer.decode(stretch)) for stretch in stretches]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


CHAT = {"messages": [user("one?"), assistant("cat"), user("two?"), assistant(" mat\n")]}
CALLS = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": "é", "b": 7}'}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALLING = {
    "messages": [user("sum?"), assistant(None, tool_calls=CALLS), {"role": "tool", "content": "8"}, assistant("eight")],
    "tools": TOOLS,
}


@pytest.mark.parametrize(
    ("template", "end", "texts"),
    [
        (CHATML + OPENED, "<|im_end|>", ["cat<|im_end|>", " mat\n<|im_end|>"]),
        (QWEN3, "<|im_end|>", ["cat<|im_end|>", "<think>\n\n</think>\n\n mat\n<|im_end|>"]),
        (R1, "<eos>", ["cat<eos>", " mat\n<eos>"]),
        (PHI35, "<|end|>", ["cat<|end|>", " mat\n<|end|>"]),
        (GPT_OSS, "<|return|>", ["<|channel|>final<|message|>cat", "<|channel|>final<|message|> mat\n<|return|>"]),
        (GLM, "<|user|>", ["cat<|user|>", " mat\n<|user|>"]),
        (COMMAND, "<|end|>", [f"<|start_response|>{text}<|end_response|><|end|>" for text in ("cat", " mat\n")]),
        (GEMMA, "<|end|>", ["cat<|end|>", "mat<|end|>"]),
        (MISTRAL, "<eos>", [" cat<eos>", "  mat\n<eos>"]),
        (VICUNA, "<eos>", [" cat", "  mat\n<eos>"]),
    ],
    ids=["chatml", "qwen3", "r1", "phi3.5", "gpt-oss", "glm", "command", "gemma", "mistral", "vicuna"],
)
def test_answers_are_learnt_through_their_ends(template: str, end: str, texts: list[str]) -> None:
    made = encoder(template)
    assert made.end_text == end
    assert made.ends == tuple(dict.fromkeys(made.tokenizer.convert_tokens_to_ids([end, "<eos>"])))
    assert learnt(made, CHAT) == texts
    alone = {"messages": CHAT["messages"][2:]}  # a single answer is learnt as the last of several
    assert learnt(made, alone) == texts[1:]
    assert made.describe().startswith(f"Prompts and answers are written in the chat format; answers end with {end}")


def test_an_answer_that_says_the_end_is_learnt_whole() -> None:
    row = {"messages": [user("how?"), assistant("write <|im_end|> and stop"), user("so?"), assistant("so")]}
    assert learnt(encoder(CHATML + OPENED), row) == ["write <|im_end|> and stop<|im_end|>", "so<|im_end|>"]


def test_reasoning_is_learnt_where_the_template_writes_it() -> None:
    whole = ["<think>\nhm\n</think>\n\ncat<|im_end|>"]
    for answer in (assistant("cat", reasoning_content="hm"), assistant("<think>hm</think>cat")):
        assert learnt(encoder(QWEN3), {"messages": [user("one?"), answer]}) == whole
    opened = QWEN3.replace(OPENED, OPENED.replace("assistant\n", "assistant\n<think>\n"))
    for answer in (assistant("cat", reasoning_content="hm"), assistant("<think>hm</think>cat")):
        assert learnt(encoder(opened), {"messages": [user("one?"), answer]}) == ["hm\n</think>\n\ncat<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "answer", "what"),
    [
        (R1, assistant("<think>hm</think>cat"), r"a part of an answer \('<think>hm</think>cat'\)"),
        (R1, assistant("cat", reasoning_content="hm"), r"`reasoning_content` of an answer \('hm'\)"),
        (CHATML + OPENED, assistant("cat", thinking="hm"), r"`thinking` of an answer \('hm'\)"),
        (CHATML + OPENED, assistant("cat", tool_calls=CALLS), r"`tool_calls` of an answer \('add'\)"),
        (MISTRAL, assistant("let me add", tool_calls=CALLS), r"a part of an answer \('let me add'\)"),
        (
            CHATML.replace("m.content", "m.content[:12]"),
            assistant("cat and the other mat"),
            r"a part of an answer \('cat and the",
        ),
    ],
)
def test_what_a_template_leaves_out_of_an_answer_is_named(template: str, answer: dict[str, Any], what: str) -> None:
    with pytest.raises(BadRow, match=f"template leaves out {what}.*, which would not be learnt"):
        learnt(encoder(template), {"messages": [user("on the mat?"), answer]})


def test_reasoning_of_earlier_answers_is_named_where_it_is_dropped() -> None:
    with pytest.raises(BadRow, match=r"leaves out a part of an answer \('<think>hm</think>cat'\)"):
        learnt(
            encoder(QWEN3), {"messages": [user("1?"), assistant("<think>hm</think>cat"), user("2?"), assistant("b")]}
        )
    answers = [assistant("cat", reasoning_content="hm"), assistant("b", reasoning_content="mh")]
    with pytest.raises(BadRow, match=r"leaves out `reasoning_content` of an answer \('hm'\)"):
        learnt(encoder(QWEN3), {"messages": [user("1?"), answers[0], user("2?"), answers[1]]})


def test_turns_and_tools_that_a_template_leaves_out_are_named() -> None:
    quiet = "{% for m in messages if m.role != 'system' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(BadRow, match="leaves out turns of the role system"):
        learnt(encoder(quiet), {"messages": [{"role": "system", "content": "o"}, user("one?"), assistant("cat")]})
    with pytest.raises(BadRow, match="leaves out `tools`"):
        learnt(encoder(CHATML + OPENED), {**CHAT, "tools": TOOLS})
    with pytest.raises(BadRow, match="System role not supported"):
        learnt(encoder(GEMMA), {"prompt": "one?", "completion": "cat", "system": "be brief"})


@pytest.mark.parametrize("template", [QWEN3, MISTRAL], ids=["qwen3", "mistral"])
def test_calls_of_tools_are_learnt(template: str) -> None:
    row = CALLING if template == QWEN3 else {"messages": CALLING["messages"]}
    call, answer = learnt(encoder(template), row)
    assert '{"name": "add", "arguments": {"a": "é", "b": 7}}' in call  # an object, not quoted again
    assert call.endswith("<|im_end|>" if template == QWEN3 else "<eos>")
    assert answer.endswith("eight" + ("<|im_end|>" if template == QWEN3 else "<eos>"))
    if template == QWEN3:
        assert 'Tools: [{"type": "function"' in encoder(template).tokenizer.decode(
            encoder(template).encode(parse(row)).input_ids
        )


def test_a_call_that_cannot_be_found_is_refused_and_nothing_else_is_learnt() -> None:
    """Mistral's templates write the tools before the last question only, so that earlier prompts are no prefixes."""
    moving = "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}{% set ns.last = m.content %}"
    moving += "{% endfor %}" + MISTRAL.replace(
        "{% if m.role == 'user' %}",
        "{% if m.role == 'user' %}{% if tools and m.content == ns.last %}{{ tools | tojson }}{% endif %}",
    )
    more = [user("again?"), assistant("ten")]
    made = encoder(moving)
    call, *answers = learnt(made, CALLING)
    assert call.startswith("[TOOL_CALLS]")
    assert answers == [" eight<eos>"]
    with pytest.raises(BadRow, match="an answer without content otherwise if turns follow"):
        learnt(made, {**CALLING, "messages": [*CALLING["messages"], *more]})
    assert learnt(made, {"messages": [user("1?"), assistant("nine"), *more], "tools": TOOLS}) == [
        "nine<eos>",
        " ten<eos>",
    ]


def test_calls_may_end_with_a_token_of_their_own() -> None:
    calls = (
        "{% for m in messages %}{{ '<|start|>' + m.role }}"
        "{% if m.tool_calls %}{{ ' to=' + m.tool_calls[0].function.name + '<|message|>' }}"
        "{{ m.tool_calls[0].function.arguments | tojson + '<|channel|>' }}{% else %}{{ '<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    row = {"messages": CALLING["messages"]}
    assert learnt(encoder(calls), row) == [
        ' to=add<|message|>{"a": "é", "b": 7}<|channel|>',
        "<|message|>eight<|return|>",
    ]


def test_weight_0_and_what_comes_before_a_completion_are_not_learnt() -> None:
    made = encoder(PHI35)
    assert learnt(made, {"messages": [user("1?"), assistant("cat", weight=0), *CHAT["messages"][2:]]}) == [
        " mat\n<|end|>"
    ]
    assert learnt(made, {"prompt": CHAT["messages"][:3], "completion": CHAT["messages"][3:]}) == [" mat\n<|end|>"]


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("1 + 'a'", "TypeError: "),
        ("'{:d}'.format('a')", "ValueError: "),
        ("range(10**9)", "OverflowError: "),
        ("messages[0].content.nothing()", "no attribute 'nothing'"),
    ],
)
def test_an_error_inside_of_a_template_is_the_templates(chat_tokenizer, fault, named) -> None:
    chat_tokenizer.chat_template = f"{{{{ {fault} }}}}{chat_tokenizer.chat_template}"
    with pytest.raises(BadRow, match=rf"the tokenizer's chat template (fails on|refuses) it \(.*{named}"):
        Encoder(chat_tokenizer, "chat").encode(parse({"prompt": "a", "completion": "b"}))
