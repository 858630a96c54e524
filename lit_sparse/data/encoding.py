"""From a row's meaning to token ids, with labels on the answers only."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_sparse import demo
from lit_sparse.data.rows import IGNORED, BadRow, Chat, Choice, Item, Message, Passage, Tokens
from lit_sparse.errors import BadInput

Template = Literal["auto", "chat", "plain"]

GENERATION_MARKS = re.compile(r"\{%-?\s*generation\b")
"""How a chat template tells the assistant's tokens itself."""


@dataclass(frozen=True)
class Example:
    """One sequence to train on: token ids, and as many labels, -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Rendered:
    """A row as text, and the spans (start, end) of characters that are learnt."""

    text: str
    spans: tuple[tuple[int, int], ...]


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The tokenizer of that folder, Hugging Face name or "demo"; it gets its end token for padding if it has none.

    Raises:
        BadInput: there is none of that name, or only one in Python, which cannot tell where a token stands in the text.
    """
    found = load_named(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if not isinstance(found, PreTrainedTokenizerFast):
        raise BadInput(f"The tokenizer is a {type(found).__name__}, a fast one (with a tokenizer.json) is wanted.")
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def load_named(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a Hugging Face name or "demo".

    Raises:
        BadInput: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(demo.resolve(name))
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise BadInput(
            f"No tokenizer could be loaded from {name!r} ({said}); give a folder or a name that has one."
        ) from error
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():  # some models get an empty one made up
        raise BadInput(f"{name!r} has no tokenizer (no tokenizer.json beside its weights); give one that has.")
    return tokenizer


class Encoder:
    """Turns rows into `Example`s.

    Chats go through the tokenizer's chat template and only the assistant's turns are learnt, each with its end token.
    The plain format, for tokenizers without a template, is the prompt, a line break, the answer and the end token.
    Multiple-choice rows read "Question: ...", a line break and "Answer: ...", as evaluation suites write them, unless
    `chat` is asked for: models answer them far better so.
    A begin token stands in front where the tokenizer itself would put one, and never twice.

    Args:
        tokenizer: A fast tokenizer.
        template: `chat`, `plain`, or `auto` for chat where the tokenizer has a template.

    Raises:
        BadInput: `chat` without a chat template, or `plain` without an end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: Template = "auto") -> None:
        self.tokenizer = tokenizer
        self.template = ("chat" if tokenizer.chat_template else "plain") if template == "auto" else template
        self.choice_template = "plain" if template == "auto" else template
        if self.template == "chat" and not tokenizer.chat_template:
            raise BadInput("`template` is chat, but the tokenizer has no chat template; choose plain or auto.")
        if tokenizer.eos_token is None:
            raise BadInput("The tokenizer has no end token (eos_token), so that no answer could end; set one.")
        self.begin = begin_token(tokenizer)
        self.end = tokenizer.get_vocab()[str(tokenizer.eos_token)]
        self.has_generation_marks = self.template == "chat" and bool(
            GENERATION_MARKS.search(str(tokenizer.chat_template))
        )

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text becomes."""
        special = {key: str(value) for key, value in self.tokenizer.special_tokens_map.items()}
        templates = (self.tokenizer.chat_template, self.template, self.choice_template)
        parts = (self.tokenizer.backend_tokenizer.to_str(), special, *templates)
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def encode(self, item: Item) -> Example:
        """The tokens of `item` and the labels of what is learnt of it.

        Raises:
            BadRow: the template refuses it, an id is outside the vocabulary, or nothing is left to learn.
        """
        match item:
            case Tokens():
                example = self._check_ids(item)
            case Passage():
                example = self._tokenise(self._render_passage(item.text))
            case Choice():
                example = self._encode_choice(item, item.label)
            case Chat():
                example = self._encode_chat(item)
        if all(label == IGNORED for label in example.labels[1:]):  # the first token follows none that could predict it
            raise BadRow("no token of it would be learnt")
        return example

    def encode_choices(self, item: Choice) -> list[Example]:
        """One example for each choice, with labels on the choice, without an end token: it would only add noise."""
        return [self._without_end(self._encode_choice(item, index)) for index in range(len(item.choices))]

    def encode_prompt(self, item: Chat | Choice) -> list[int]:
        """The tokens up to where the (last) answer begins."""
        if isinstance(item, Choice) and self.choice_template == "plain":
            return self.encode_text(self._render_question(item))
        chat = item.chat(item.label) if isinstance(item, Choice) else item
        return self.encode_text(self._render_prompt(last_prompt(chat)))

    def encode_text(self, text: str) -> list[int]:
        """The tokens of `text` and nothing around them."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _check_ids(self, item: Tokens) -> Example:
        size = len(self.tokenizer)
        if max(item.input_ids) >= size or max(item.labels) >= size:
            raise BadRow(f"an id is outside the tokenizer's vocabulary of {size}")
        return Example(list(item.input_ids), list(item.labels))

    def _render_passage(self, text: str) -> Rendered:
        text = self._with_begin(text + str(self.tokenizer.eos_token))
        return Rendered(text, ((0, len(text)),))

    def _render_question(self, item: Choice) -> str:
        return self._with_begin(f"Question: {item.question}\nAnswer:")

    def _encode_choice(self, item: Choice, index: int) -> Example:
        if self.choice_template == "chat":
            return self._encode_chat(item.chat(index))
        question = self._render_question(item)
        text = f"{question} {item.choices[index]}{self.tokenizer.eos_token}"
        return self._tokenise(Rendered(text, ((len(question), len(text)),)))

    def _without_end(self, example: Example) -> Example:
        end = len(example.labels) - (example.labels[-1] == self.end)
        return Example(example.input_ids[:end], example.labels[:end])

    def _encode_chat(self, chat: Chat) -> Example:
        if self.has_generation_marks:
            return trim_tail(*self._encode_by_marks(chat.messages))
        example = self._tokenise(self._render(chat.messages))
        return trim_tail(example.input_ids, example.labels)

    def _encode_by_marks(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        out = self._apply_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, learnt = out["input_ids"], out["assistant_masks"]
        return ids, [token if mark else IGNORED for token, mark in zip(ids, learnt, strict=True)]

    def _render(self, messages: Sequence[Message]) -> Rendered:
        whole, spans = self._render_turns(messages), []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                before, upto = self._render_prompt(messages[:index]), self._render_turns(messages[: index + 1])
                if not (upto.startswith(before) and whole.startswith(upto)):
                    raise BadRow(
                        "the tokenizer's chat template writes earlier turns otherwise than the last one; keep one "
                        "answer in a row, or give the template {% generation %} marks"
                    )
                spans.append((len(before), len(upto)))
        return Rendered(whole, tuple(spans))

    def _render_prompt(self, messages: Sequence[Message]) -> str:
        """The turns so far and what stands before the assistant's answer."""
        if self.template == "chat":
            return self._apply_template(messages, tokenize=False, add_generation_prompt=True)
        return self._render_turns(messages)

    def _render_turns(self, messages: Sequence[Message]) -> str:
        """The turns so far, each with its end."""
        if self.template == "chat":
            return self._apply_template(messages, tokenize=False)
        ends = {"assistant": str(self.tokenizer.eos_token)}
        return self._with_begin("".join(turn.content + ends.get(turn.role, "\n") for turn in messages))

    def _apply_template(self, messages: Sequence[Message], **options: Any) -> Any:
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, **options)
        except TemplateError as error:
            raise BadRow(f"the tokenizer's chat template refuses it ({error})") from error

    def _with_begin(self, text: str) -> str:
        return text if text.startswith(self.begin) else self.begin + text

    def _tokenise(self, rendered: Rendered) -> Example:
        """Labels on the tokens that begin inside a span, up to the span's last end token where it has one."""
        out = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, starts = out["input_ids"], [start for start, _ in out["offset_mapping"]]
        labels = [IGNORED] * len(ids)
        for begin, end in rendered.spans:
            inside = [index for index, start in enumerate(starts) if begin <= start < end]
            ends = [index for index in inside if ids[index] == self.end]
            for index in inside:
                if not ends or index <= ends[-1]:
                    labels[index] = ids[index]
        return Example(ids, labels)


def begin_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """The begin token that the tokenizer puts in front of a text by itself, else nothing."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begins = tokenizer.bos_token is not None and whole[0] == tokenizer.bos_token_id and whole[: len(bare)] != bare
    return str(tokenizer.bos_token) if begins else ""


def last_prompt(chat: Chat) -> tuple[Message, ...]:
    """The turns before the assistant's last answer."""
    last = max(index for index, turn in enumerate(chat.messages) if turn.role == "assistant")
    return chat.messages[:last]


def trim_tail(ids: list[int], labels: list[int]) -> Example:
    """Without the tokens after the last one that is learnt: they would cost time and teach nothing."""
    end = max((index + 1 for index, label in enumerate(labels) if label != IGNORED), default=len(ids))
    return Example(ids[:end], labels[:end])
