"""Labels are on answers and their end tokens; begin tokens occur once; rows that cannot be encoded say why."""

import pytest
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.encoding import Encoder, load_tokenizer
from lit_sparse.data.rows import IGNORED, BadRow, Chat, Choice, Message, Passage, Tokens
from lit_sparse.errors import BadInput

ONE = Chat((Message("user", "where is the cat?"), Message("assistant", "on the mat")))
TWO = Chat((Message("system", "be brief"), *ONE.messages, *ONE.messages[:1], Message("assistant", "\nstill there 7")))


def learnt(encoder: Encoder, item) -> list[str]:
    """Return the decoded spans of labelled tokens."""
    example = encoder.encode(item)
    assert len(example.input_ids) == len(example.labels)
    stretches, last = [], IGNORED
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != IGNORED:
            assert label == token
            stretches += [[]] if last == IGNORED else []
            stretches[-1].append(label)
        last = label
    return [str(encoder.tokenizer.decode(stretch)) for stretch in stretches]


def decoded(encoder: Encoder, item) -> str:
    return str(encoder.tokenizer.decode(encoder.encode(item).input_ids))


def test_chat_learns_the_answer_with_its_end(chat_tokenizer):
    encoder = Encoder(load_tokenizer(chat_tokenizer))
    assert encoder.template == "chat"
    assert learnt(encoder, ONE) == ["on the mat<|im_end|>"]
    assert decoded(encoder, ONE) == (
        "<|im_start|>user\nwhere is the cat?<|im_end|>\n<|im_start|>assistant\non the mat<|im_end|>"
    )


def test_every_answer_of_a_chat_is_learnt(chat_tokenizer):
    last = Chat((*TWO.messages[:-1], Message("assistant", "still there 7")))
    assert learnt(Encoder(chat_tokenizer), last) == ["on the mat<|im_end|>", "still there 7<|im_end|>"]


def test_a_token_that_begins_in_the_prompt_has_no_label(chat_tokenizer):
    encoder = Encoder(chat_tokenizer)
    assert (
        len(encoder.encode_text("\n\n")) == 1
    )  # the prompt ends with a line break, which the answer's first one joins
    chat = Chat((ONE.messages[0], Message("assistant", "\n\non the mat")))
    assert learnt(encoder, chat) == ["\non the mat<|im_end|>"]


def test_turns_after_the_last_answer_are_left_out(chat_tokenizer):
    encoder = Encoder(chat_tokenizer)
    assert encoder.encode(Chat((*ONE.messages, Message("user", "why?")))) == encoder.encode(ONE)


@pytest.mark.parametrize("chat", [ONE, TWO])
def test_prompt_is_what_stands_before_the_last_answer(chat_tokenizer, plain_tokenizer, chat):
    for tokenizer in (chat_tokenizer, plain_tokenizer):
        encoder = Encoder(tokenizer)
        prompt = encoder.tokenizer.decode(encoder.encode_prompt(chat))
        whole = decoded(encoder, chat)
        assert whole == prompt + chat.messages[-1].content + "<|im_end|>"


def test_generation_marks_are_followed(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}U:{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert learnt(Encoder(chat_tokenizer), TWO) == ["on the mat<|im_end|>", "\nstill there 7<|im_end|>"]


def test_a_line_break_behind_the_end_is_not_learnt_though_marked(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] + '<|im_end|>\\n' }}"
        "{% endgeneration %}{% else %}U:{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert learnt(Encoder(chat_tokenizer), TWO) == ["on the mat<|im_end|>", "\nstill there 7<|im_end|>"]


def test_generation_marks_without_the_end_are_warned_about(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>"
        "{% endfor %}"
    )
    with pytest.warns(UserWarning, match=r"marks leave out <\|im_end\|>"):
        encoder = Encoder(chat_tokenizer)
    assert learnt(encoder, ONE)[-1] == "on the mat"


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_an_end_that_the_data_have_written_is_not_doubled(chat_tokenizer, template):
    encoder = Encoder(chat_tokenizer, template)
    written = Chat((ONE.messages[0], Message("assistant", "on the mat<|im_end|>")))
    assert encoder.encode(written) == encoder.encode(ONE)
    assert encoder.encode(Passage("the cat<|im_end|>")) == encoder.encode(Passage("the cat"))


def test_plain_format_without_a_template(plain_tokenizer):
    encoder = Encoder(load_tokenizer(plain_tokenizer))
    assert encoder.template == "plain"
    assert decoded(encoder, ONE) == "<s>where is the cat?\non the mat<|im_end|>"
    assert learnt(encoder, ONE) == ["on the mat<|im_end|>"]


def test_plain_format_can_be_asked_for(chat_tokenizer):
    assert decoded(Encoder(chat_tokenizer, "plain"), ONE) == "where is the cat?\non the mat<|im_end|>"


def test_begin_token_comes_once(plain_tokenizer):
    encoder = Encoder(plain_tokenizer)
    begin = plain_tokenizer.bos_token_id
    for item in (Passage("the cat"), Passage("<s>the cat"), ONE, Chat((Message("user", "<s>hi"), ONE.messages[1]))):
        ids = encoder.encode(item).input_ids
        assert ids[0] == begin
        assert ids.count(begin) == 1


def test_begin_token_of_the_template_is_not_doubled(plain_tokenizer):
    plain_tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    ids = Encoder(plain_tokenizer).encode(ONE).input_ids
    assert ids.count(plain_tokenizer.bos_token_id) == 1


def test_passage_is_learnt_whole(chat_tokenizer, plain_tokenizer):
    assert learnt(Encoder(chat_tokenizer), Passage("the cat é漢")) == ["the cat é漢<|im_end|>"]
    assert learnt(Encoder(plain_tokenizer), Passage("the cat")) == ["<s>the cat<|im_end|>"]


def test_tokens_stay_as_they_are(chat_tokenizer):
    example = Encoder(chat_tokenizer).encode(Tokens((5, 6, 7, 8), (IGNORED, IGNORED, 7, IGNORED)))
    assert example.input_ids == [5, 6, 7, 8]
    assert example.labels == [IGNORED, IGNORED, 7, IGNORED]


@pytest.mark.parametrize("template", ["auto", "chat"])
def test_choices_differ_only_in_their_labels(chat_tokenizer, template):
    encoder, item = Encoder(chat_tokenizer, template), Choice("where?", ("on the mat", "here", "there"), 2)
    examples = encoder.encode_choices(item)
    prompts = {tuple(t for t, label in zip(e.input_ids, e.labels, strict=True) if label == IGNORED) for e in examples}
    assert prompts == {tuple(encoder.encode_prompt(item))}
    texts = [encoder.tokenizer.decode([label for label in e.labels if label != IGNORED]) for e in examples]
    assert [str(text).strip() for text in texts] == list(item.choices)
    trained = encoder.encode(item)
    assert trained.input_ids == [*examples[2].input_ids, encoder.end]
    assert trained.labels == [*examples[2].labels, encoder.end]


def test_choices_are_framed_as_question_and_answer(chat_tokenizer, plain_tokenizer):
    item = Choice("where?", ("on the mat", "here"), 0)
    for tokenizer, begin in ((chat_tokenizer, ""), (plain_tokenizer, "<s>")):
        assert decoded(Encoder(tokenizer), item) == f"{begin}Question: where?\nAnswer: on the mat<|im_end|>"
        assert learnt(Encoder(tokenizer), item) == [" on the mat<|im_end|>"]
    assert "assistant\non the mat" in decoded(Encoder(chat_tokenizer, "chat"), item)


def test_template_that_refuses_is_quoted(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(BadRow, match="no system turns here"):
        Encoder(chat_tokenizer).encode(TWO)


def test_the_plain_format_refuses_what_it_cannot_write(plain_tokenizer):
    call = Message("assistant", "", fields={"tool_calls": [{"name": "add", "arguments": {}}]})
    for chat, what in [
        (Chat((*ONE.messages, Message("tool", "7"), ONE.messages[1])), "a turn of the role tool"),
        (Chat((ONE.messages[0], call)), "`tool_calls`"),
        (Chat(ONE.messages, tools=({"name": "add"},)), "`tools`"),
    ]:
        with pytest.raises(BadRow, match=f"{what}, which the plain format cannot write"):
            Encoder(plain_tokenizer).encode(chat)


def test_an_answer_of_weight_0_is_not_learnt(chat_tokenizer, plain_tokenizer):
    chat = Chat((ONE.messages[0], Message("assistant", "no", learnt=False), *ONE.messages))
    for tokenizer in (chat_tokenizer, plain_tokenizer):
        assert learnt(Encoder(tokenizer), chat) == ["on the mat<|im_end|>"]
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}U:{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert learnt(Encoder(chat_tokenizer), chat) == ["on the mat<|im_end|>"]


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (Tokens((1, 9999), (1, 9999)), "outside the tokenizer's vocabulary"),
        (Tokens((1, 2), (IGNORED, IGNORED)), "no token of it has a label"),
        (Tokens((1, 2), (1, IGNORED)), "no token of it has a label"),
        (Tokens((1,), (1,)), "no token of it has a label"),
    ],
)
def test_rows_without_anything_to_learn(chat_tokenizer, item, why):
    with pytest.raises(BadRow, match=why):
        Encoder(chat_tokenizer).encode(item)


def test_unusable_tokenizers_are_refused(chat_tokenizer, plain_tokenizer, tmp_path):
    with pytest.raises(BadInput, match="no chat template"):
        Encoder(plain_tokenizer, "chat")
    with pytest.raises(BadInput, match="No tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(BadInput, match="a fast one"):
        load_tokenizer(PreTrainedTokenizerBase())
    chat_tokenizer.eos_token = None
    with pytest.raises(BadInput, match="no end token"):
        Encoder(chat_tokenizer)


def test_end_token_serves_for_padding(chat_tokenizer):
    assert load_tokenizer(chat_tokenizer).pad_token == "<|im_end|>"


def test_fingerprint_tells_tokenizers_and_templates_apart(chat_tokenizer, plain_tokenizer):
    encoders = [Encoder(chat_tokenizer), Encoder(chat_tokenizer, "plain"), Encoder(plain_tokenizer)]
    assert len({encoder.fingerprint() for encoder in encoders}) == 3
    assert encoders[0].fingerprint() == Encoder(chat_tokenizer).fingerprint()
