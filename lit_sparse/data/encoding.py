"""Encoding of parsed rows into token ids, with labels on the answers only."""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_sparse import demo
from lit_sparse.data.chats import TRIAL, ChatTemplate, Rendered, Span, last_prompt, plain_text
from lit_sparse.data.rows import IGNORED, BadRow, Chat, Choice, Item, Message, Passage, Tokens
from lit_sparse.errors import BadInput
from lit_sparse.library_errors import REFUSED, due_to_files, refusal_of

Template = Literal["auto", "chat", "plain"]


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, and as many labels, which are -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]


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
        tokenizer = AutoTokenizer.from_pretrained(demo.resolve(name), trust_remote_code=False)
    except Exception as error:  # what transformers meets in malformed files is of any class
        if isinstance(error, BadInput) or not due_to_files(error):
            raise
        said = " ".join((str(error) if isinstance(error, REFUSED) else refusal_of(error)).split())[:200]
        raise BadInput(
            f"No tokenizer could be loaded from {name!r} ({said}); give a folder or a name that has one."
        ) from error
    # Without tokenizer files, transformers makes up an empty tokenizer for some model types instead of failing.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise BadInput(f"{name!r} has no tokenizer (no tokenizer.json beside its weights); give one that has.")
    return tokenizer


class Encoder:
    """Encoder of parsed rows into `Example`s.

    Chats are rendered by the tokenizer's chat template. The loss is on the assistant's turns, through the token that
    ends them; a line break behind it is not learnt. The plain format, for tokenizers without a template, is prompt,
    line break, answer and end token. Multiple-choice rows read "Question: ...", line break, "Answer: ...", as
    evaluation suites write them, unless `template` is `chat`: models answer far better in this format. A begin token
    precedes a text if the tokenizer adds one, and neither it nor the end token comes twice.

    Args:
        tokenizer: A fast tokenizer.
        template: `chat`, `plain`, or `auto` for `chat` if the tokenizer has a template.

    Attributes:
        end: Id of the token that ends an answer: the chat template's, or the tokenizer's end token.
        text_end: Id of the token that ends a text: the tokenizer's end token.
        ends: The tokens at which generation stops: `end`, then `text_end` if it is another.
        added: Ids of the tokenizer's added tokens, which no ordinary text has.

    Raises:
        BadInput: if `template` is `chat` and the tokenizer has no chat template, or if it has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: Template = "auto") -> None:
        self.tokenizer = tokenizer
        self.template = ("chat" if tokenizer.chat_template else "plain") if template == "auto" else template
        self.choice_template = "plain" if template == "auto" else template
        if self.template == "chat" and not tokenizer.chat_template:
            raise BadInput("`template` is chat, but the tokenizer has no chat template; choose plain or auto.")
        if tokenizer.eos_token is None or str(tokenizer.eos_token) not in tokenizer.get_vocab():
            raise BadInput("The tokenizer has no end token (eos_token), but every answer needs one; set one.")
        self.begin = begin_token(tokenizer)
        self.eos = str(tokenizer.eos_token)
        self.chats = ChatTemplate(tokenizer) if self.template == "chat" else None
        self.end_text = self.chats.end if self.chats else self.eos
        self.end, self.text_end = (tokenizer.get_vocab()[text] for text in (self.end_text, self.eos))
        self.ends = tuple(dict.fromkeys((self.end, self.text_end)))
        self.added = frozenset(tokenizer.get_added_vocab().values())
        if self.chats and self.chats.has_marks:
            self._warn_of_marks()

    def _warn_of_marks(self) -> None:
        """Warn if the template's generation marks leave out the end token."""
        try:
            ids, marks = self._chat_template.marked(Chat(TRIAL))
        except BadRow:  # rows will say why
            return
        if not any(mark and token == self.end for token, mark in zip(ids, marks, strict=True)):
            rank_zero_warn(
                f"The chat template's {{% generation %}} marks leave out {self.end_text}, which ends an answer: "
                "the model does not learn to stop; move {% endgeneration %} behind it."
            )

    @property
    def _chat_template(self) -> ChatTemplate:
        assert self.chats is not None
        return self.chats

    def describe(self) -> str:
        """Describe the format in a sentence."""
        note = ", which the chat template itself does not write" if self.chats and self.chats.appended else ""
        return f"Prompts and answers are written in the {self.template} format; answers end with {self.end_text}{note}."

    def fingerprint(self) -> str:
        """Return a hash of everything on which the ids of a text depend; it is part of the cache's keys."""
        special = {key: str(value) for key, value in self.tokenizer.special_tokens_map.items()}
        templates = (self.tokenizer.chat_template, self.template, self.choice_template)
        parts = (self.tokenizer.backend_tokenizer.to_str(), special, *templates)
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def encode(self, item: Item) -> Example:
        """Return tokens and labels of a row.

        Raises:
            BadRow: if the template refuses the row or leaves out a part of it, an id is outside the vocabulary, or no
                token has a label.
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
        """Return the tokens before the last answer.

        Raises:
            BadRow: if the template refuses them.
        """
        if isinstance(item, Choice) and self.choice_template == "plain":
            return self.encode_text(self._render_question(item))
        chat = item.chat(item.label) if isinstance(item, Choice) else item
        before = replace(chat, messages=last_prompt(chat))
        text = self.chats.render(before, prompt=True) if self.chats else self._render_plain(before).text
        return self.encode_text(text)

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
        text = self._with_begin(text.removesuffix(self.eos) + self.eos)
        return Rendered(text, (Span(0, len(text), "none"),), self.eos)

    def _render_question(self, item: Choice) -> str:
        return self._with_begin(f"Question: {item.question}\nAnswer:")

    def _encode_choice(self, item: Choice, index: int) -> Example:
        if self.choice_template == "chat":
            return self._encode_chat(item.chat(index))
        question = self._render_question(item)
        text = f"{question} {item.choices[index]}"
        return self._tokenise(Rendered(text + self.eos, (Span(len(question), len(text)),), self.eos))

    def _without_end(self, example: Example) -> Example:
        ends = self.end if self.choice_template == "chat" else self.text_end
        end = len(example.labels) - (example.labels[-1] == ends)
        return Example(example.input_ids[:end], example.labels[:end])

    def _encode_chat(self, chat: Chat) -> Example:
        chat = replace(chat, messages=tuple(map(self._without_written_end, chat.messages)))
        if self.chats is None:
            return trim_tail(self._tokenise(self._render_plain(chat)))
        if self.chats.has_marks:
            return trim_tail(self._encode_by_marks(chat))
        return trim_tail(self._tokenise(self.chats.rendered(chat)))

    def _without_written_end(self, turn: Message) -> Message:
        """Return an answer without an end token that the data have written into it: the format adds it."""
        if turn.role != "assistant" or not turn.content.endswith(self.end_text):
            return turn
        return replace(turn, content=turn.content.removesuffix(self.end_text))

    def _encode_by_marks(self, chat: Chat) -> Example:
        """Label the tokens that the template's generation marks cover, each stretch up to its last end token."""
        self._chat_template.check_kept(chat, self._chat_template.render(chat))
        ids, marks = self._chat_template.marked(chat)
        stretches = [list(group) for mark, group in groupby(range(len(ids)), key=marks.__getitem__) if mark]
        answers = [turn for turn in chat.messages if turn.role == "assistant"]
        if not all(turn.learnt for turn in answers):
            if len(stretches) != len(answers):
                raise BadRow("an answer has the weight 0, but the chat template's generation marks do not tell which")
            stretches = [one for one, turn in zip(stretches, answers, strict=True) if turn.learnt]
        labels = [IGNORED] * len(ids)
        for stretch in stretches:
            last = max((index for index in stretch if ids[index] == self.end), default=stretch[-1])
            for index in stretch:
                if index <= last:
                    labels[index] = ids[index]
        return Example(ids, labels)

    def _render_plain(self, chat: Chat) -> Rendered:
        if chat.tools:
            raise BadRow("it has `tools`, which the plain format cannot write; use a tokenizer with a chat template")
        written = self.begin and chat.messages[0].content.startswith(self.begin)
        return plain_text(chat.messages, "" if written else self.begin, self.eos)

    def _with_begin(self, text: str) -> str:
        return text if text.startswith(self.begin) else self.begin + text

    def _tokenise(self, rendered: Rendered) -> Example:
        """Tokenise the text; label the tokens that begin inside a span, and on through the token that closes it."""
        out = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, starts = out["input_ids"], [start for start, _ in out["offset_mapping"]]
        end, labels = self.tokenizer.get_vocab()[rendered.end], [IGNORED] * len(ids)
        for span in rendered.spans:
            stop = self._stop(span, ids, starts, end)
            for index in range(bisect_left(starts, span.begin), stop):
                labels[index] = ids[index]
        return Example(ids, labels)

    def _stop(self, span: Span, ids: Sequence[int], starts: Sequence[int], end: int) -> int:
        """Return the index behind the last learnt token of a span."""
        body = bisect_left(starts, span.body)
        if span.closing == "any":
            return body + (body < len(ids) and ids[body] in self.added)
        limit = len(ids) if span.limit is None else bisect_left(starts, span.limit)
        closing = range(body, limit) if span.closing == "end" else ()
        return next((index + 1 for index in closing if ids[index] == end), body)


def begin_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the begin token if the tokenizer itself adds it to a text, else "".

    A tokenizer may define one and not add it, which only a trial shows.
    """
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begins = tokenizer.bos_token is not None and whole[0] == tokenizer.bos_token_id and whole[: len(bare)] != bare
    return str(tokenizer.bos_token) if begins else ""


def trim_tail(example: Example) -> Example:
    """Drop the tokens after the last one with a label: they cost time and have no loss."""
    ids, labels = example.input_ids, example.labels
    end = max((index + 1 for index, label in enumerate(labels) if label != IGNORED), default=len(ids))
    return Example(ids[:end], labels[:end])
