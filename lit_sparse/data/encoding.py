"""Encoding of parsed rows into token ids, with labels on the answers only."""

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
"""The block by which a chat template marks the assistant's tokens itself."""


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, and as many labels, which are -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Rendered:
    """A row as text, and the spans (start, end) of characters on which the loss is taken."""

    text: str
    spans: tuple[tuple[int, int], ...]


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder, Hugging Face name or "demo". Without a padding token, it pads with its end token.

    Raises:
        BadInput: if there is no such tokenizer, or only a slow one, which does not report where a token is in the text.
    """
    found = load_named(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if not isinstance(found, PreTrainedTokenizerFast):
        raise BadInput(
            f"The tokenizer is a {type(found).__name__}, but a fast one is needed; give one with a tokenizer.json."
        )
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def load_named(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, Hugging Face name or "demo".

    Raises:
        BadInput: if there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(demo.resolve(name))
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise BadInput(
            f"No tokenizer could be loaded from {name!r} ({said}); give a folder or a name that has one."
        ) from error
    # Without tokenizer files, transformers makes up an empty tokenizer for some model types instead of failing.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise BadInput(f"{name!r} has no tokenizer (no tokenizer.json beside its weights); give one that has.")
    return tokenizer


class Encoder:
    """Encoder of parsed rows into `Example`s.

    Chats are rendered by the tokenizer's chat template. The loss is on the assistant's turns, end tokens included. The
    plain format, for tokenizers without a template, is prompt, line break, answer and end token. Multiple-choice rows
    read "Question: ...", line break, "Answer: ...", as evaluation suites write them, unless `template` is `chat`:
    models answer far better in this format. A begin token precedes a text if the tokenizer adds one, and never twice.

    Args:
        tokenizer: A fast tokenizer.
        template: `chat`, `plain`, or `auto` for `chat` if the tokenizer has a template.

    Raises:
        BadInput: if `template` is `chat` and the tokenizer has no chat template, or if it has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: Template = "auto") -> None:
        self.tokenizer = tokenizer
        self.template = ("chat" if tokenizer.chat_template else "plain") if template == "auto" else template
        self.choice_template = "plain" if template == "auto" else template
        if self.template == "chat" and not tokenizer.chat_template:
            raise BadInput("`template` is chat, but the tokenizer has no chat template; choose plain or auto.")
        if tokenizer.eos_token is None:
            raise BadInput("The tokenizer has no end token (eos_token), but every answer needs one; set one.")
        self.begin = begin_token(tokenizer)
        self.end = tokenizer.get_vocab()[str(tokenizer.eos_token)]
        self.has_generation_marks = self.template == "chat" and bool(
            GENERATION_MARKS.search(str(tokenizer.chat_template))
        )

    def fingerprint(self) -> str:
        """Return a hash of everything on which the ids of a text depend; it is part of the cache's keys."""
        special = {key: str(value) for key, value in self.tokenizer.special_tokens_map.items()}
        templates = (self.tokenizer.chat_template, self.template, self.choice_template)
        parts = (self.tokenizer.backend_tokenizer.to_str(), special, *templates)
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def encode(self, item: Item) -> Example:
        """Return tokens and labels of a row.

        Raises:
            BadRow: if the template refuses the row, an id is outside the vocabulary, or no token has a label.
        """
        match item:
            case Tokens():
                example = self._check_ids(item)  # a wrong tokenizer would otherwise fail in the embedding, on the GPU
            case Passage():
                example = self._tokenise(self._render_passage(item.text))
            case Choice():
                example = self._encode_choice(item, item.label)
            case Chat():
                example = self._encode_chat(item)
        # The first label never counts: no token before it predicts it.
        if all(label == IGNORED for label in example.labels[1:]):
            raise BadRow("no token of it has a label, so that nothing is learnt")
        return example

    def encode_choices(self, item: Choice) -> list[Example]:
        """Return one example per choice, labelled on the choice, for scoring.

        The end token is left out: its probability says little about the choice, and adds noise to the score.
        """
        return [self._without_end(self._encode_choice(item, index)) for index in range(len(item.choices))]

    def encode_prompt(self, item: Chat | Choice) -> list[int]:
        """Return the tokens before the last answer."""
        if isinstance(item, Choice) and self.choice_template == "plain":
            return self.encode_text(self._render_question(item))
        chat = item.chat(item.label) if isinstance(item, Choice) else item
        return self.encode_text(self._render_prompt(last_prompt(chat)))

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of `text`, without begin or end token."""
        # verbose: no warning of texts above the model's maximum, which are dropped, truncated or cut later.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _check_ids(self, item: Tokens) -> Example:
        size = len(self.tokenizer)
        if max(item.input_ids) >= size or max(item.labels) >= size:
            raise BadRow(f"an id is outside the tokenizer's vocabulary of {size}; set the tokenizer that made the ids")
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
                # An answer's span is what its turn adds to the text before it. That holds only if the template renders
                # a turn the same whatever follows; some drop earlier turns' reasoning, for example.
                before, upto = self._render_prompt(messages[:index]), self._render_turns(messages[: index + 1])
                if not (upto.startswith(before) and whole.startswith(upto)):
                    raise BadRow(
                        "the tokenizer's chat template renders earlier turns differently from the last one; keep "
                        "one answer per row, or give the template {% generation %} marks"
                    )
                spans.append((len(before), len(upto)))
        return Rendered(whole, tuple(spans))

    def _render_prompt(self, messages: Sequence[Message]) -> str:
        """Render the turns, and what precedes the assistant's answer."""
        if self.template == "chat":
            return self._apply_template(messages, tokenize=False, add_generation_prompt=True)
        return self._render_turns(messages)

    def _render_turns(self, messages: Sequence[Message]) -> str:
        """Render the turns, each with its end."""
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
        """Tokenise the text; label the tokens that begin inside a span, up to its last end token if it has one.

        Templates often write a line break after the end token, which a model never has to generate.
        """
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
    """Return the begin token if the tokenizer itself adds it to a text, else "".

    A tokenizer may define one and not add it, which only a trial shows.
    """
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begins = tokenizer.bos_token is not None and whole[0] == tokenizer.bos_token_id and whole[: len(bare)] != bare
    return str(tokenizer.bos_token) if begins else ""


def last_prompt(chat: Chat) -> tuple[Message, ...]:
    """Return the turns before the assistant's last answer."""
    last = max(index for index, turn in enumerate(chat.messages) if turn.role == "assistant")
    return chat.messages[:last]


def trim_tail(ids: list[int], labels: list[int]) -> Example:
    """Drop the tokens after the last one with a label: they cost time and have no loss."""
    end = max((index + 1 for index, label in enumerate(labels) if label != IGNORED), default=len(ids))
    return Example(ids[:end], labels[:end])
