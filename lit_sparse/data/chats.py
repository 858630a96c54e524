"""Rendering of chats: by a tokenizer's chat template or as plain text, with the spans of what is learnt."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from lit_sparse.data.rows import BadRow, Chat, Message

GENERATION_MARKS = re.compile(r"\{%-?\s*generation\b")
"""The block by which a chat template marks the assistant's tokens itself."""

OF_TEMPLATES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Errors that Python raises in a template's expressions, such as {{ 1 / 0 }}."""

SENTINELS = tuple(f"Sentinel{index}x" for index in range(4))
"""Contents of a trial conversation's turns. Templates leave letters and digits as they are."""

TRIAL = tuple(Message(role, text) for role, text in zip(("user", "assistant") * 2, SENTINELS, strict=True))


@dataclass(frozen=True)
class Span:
    """Learnt part of a text: the characters from `begin` to `body`, and what follows them through a closing token.

    Attributes:
        closing: The closing token: the next `end` of the text, `any` added token right behind the body, or `none`.
        limit: Where the next answer begins, in characters; the end token is looked for before it.
    """

    begin: int
    body: int
    closing: Literal["end", "any", "none"] = "end"
    limit: int | None = None


@dataclass(frozen=True)
class Rendered:
    """A row as text, the spans of it on which the loss is taken, and the token that ends an answer."""

    text: str
    spans: tuple[Span, ...]
    end: str


class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        end: Text of the token that ends an answer.
        appended: True if the template writes nothing after the last answer, so that `end` has to be added there.
        ends_each: Whether an answer before another turn ends with `end`, too (in gpt-oss only the last one does).
        opening: What precedes an answer, from the end of the question on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.added = frozenset(tokenizer.get_added_vocab().values())  # those that end turns are among them
        self.has_marks = bool(GENERATION_MARKS.search(str(tokenizer.chat_template)))
        self._kept_roles: dict[tuple[str, ...], str | None] = {}
        self.end, self.appended, self.ends_each = self._find_end()
        try:
            self.opening = self.render(Chat(TRIAL[:1]), prompt=True).partition(SENTINELS[0])[2]
        except BadRow:
            self.opening = ""

    # ---- rendering

    def render(self, chat: Chat, prompt: bool = False) -> str:
        """Render the turns; with `prompt`, also what precedes an answer to them.

        Raises:
            BadRow: if the template refuses them.
        """
        return self._apply(chat, tokenize=False, add_generation_prompt=prompt)

    def marked(self, chat: Chat) -> tuple[list[int], list[int]]:
        """Return the token ids of a chat, and 1 for each that the template's generation marks cover."""
        out = self._apply(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return out["input_ids"], out["assistant_masks"]

    def _apply(self, chat: Chat, **options: Any) -> Any:
        turns = [{"role": turn.role, "content": turn.content, **turn.fields} for turn in chat.messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=[dict(tool) for tool in chat.tools] or None, **options
            )
        except TemplateError as error:
            raise BadRow(f"the tokenizer's chat template refuses it ({error})") from error
        except OF_TEMPLATES as error:
            raise BadRow(f"the tokenizer's chat template fails on it ({type(error).__name__}: {error})") from error

    # ---- the end of an answer

    def _find_end(self) -> tuple[str, bool, bool]:
        """Find the token that ends an answer, by a trial conversation; see the attributes."""
        eos = str(self.tokenizer.eos_token)
        try:
            text = self.render(Chat(TRIAL))
        except BadRow:  # rows will say why
            return eos, False, True
        tail = self._ids(text.partition(SENTINELS[3])[2])
        gap = self._ids(text.partition(SENTINELS[1])[2].partition(SENTINELS[2])[0])
        both = common(gap, tail)
        # The last added token that follows every answer: Command-R7B ends the response first, then the turn, and
        # Phi-3.5 ends the turn, and then, once, the conversation.
        if ends := [token for token in both if token in self.added]:
            return self._token(ends[-1]), False, True
        if ends := [token for token in tail if token in self.added]:
            return self._token(ends[0]), False, False
        # GLM writes no end: a turn ends where the next one's first token is generated.
        return (self._token(gap[0]), True, True) if gap and gap[0] in self.added else (eos, True, False)

    def writes(self, text: str) -> bool:
        """Return whether the template writes `text` into a trial conversation."""
        return text in self.render(Chat(TRIAL))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _token(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    # ---- the spans of answers

    def rendered(self, chat: Chat) -> Rendered:
        """Render a chat; find each learnt answer in it.

        Where an answer lies is found by rendering the chat again with a sentinel in its place, so that a template may
        render an answer differently when turns follow.

        Raises:
            BadRow: if the template leaves out a part of the chat.
        """
        whole = self.render(chat)
        self.check_kept(chat, whole)
        places = [index for index, turn in enumerate(chat.messages) if turn.role == "assistant"]
        spans: list[Span] = []
        for index in places:
            before = spans[-1].body if spans else 0
            spans.append(self._span(chat, index, whole, before))
        limits = [*(span.begin for span in spans[1:]), None]
        spans = [replace(span, limit=limit) for span, limit in zip(spans, limits, strict=True)]
        if self.appended and places[-1] == len(chat.messages) - 1:
            whole = whole[: spans[-1].body] + self.end
        learnt = [span for span, index in zip(spans, places, strict=True) if chat.messages[index].learnt]
        return Rendered(whole, tuple(learnt), self.end)

    def _span(self, chat: Chat, index: int, whole: str, before: int) -> Span:
        """Return where answer `index` is in `whole`, after the position `before`; its limit is set later."""
        turn = chat.messages[index]
        prompt = self.render(replace(chat, messages=chat.messages[:index]), prompt=True)
        opened = whole.startswith(prompt)
        if turn.content.strip():
            place, body = self._place(chat, index, whole)
        else:
            place = body = len(common(prompt, whole))
            if place < len(prompt) - len(self.opening):
                raise BadRow(
                    "the tokenizer's chat template renders the turns before an answer without content otherwise if "
                    "turns follow, so that it cannot be found; end the row with this answer"
                )
        begin = len(prompt) if opened else self._parting(prompt, whole, place)
        # From the question's end on: the prompt itself may open the <think> that an answer begins with.
        check_shown(
            turn, whole[max(before, len(prompt) - len(self.opening)) if opened else before : body], whole[body:]
        )
        if "tool_calls" in turn.fields:
            upto = self.render(replace(chat, messages=chat.messages[: index + 1]))
            if whole.startswith(upto):  # the turn's own end may be another: gpt-oss ends calls with <|call|>
                return Span(begin, len(upto.rstrip()), "any" if self.appended else "none")
        last = index == len(chat.messages) - 1
        return Span(begin, max(begin, body), "end" if last or self.ends_each else "none")

    def _parting(self, prompt: str, whole: str, place: int) -> int:
        """Return where an answer begins whose content is at `place`, if `whole` does not begin with its prompt.

        The prompt may open a <think> that is not in the chat, say: the answer begins where they part.
        """
        shared = len(common(prompt, whole))
        rest = squeezed(prompt[shared:])
        if shared < len(prompt) - len(self.opening) or (rest and squeezed(whole[shared:place]).startswith(rest)):
            return place  # they differ before the prompt, or only in white space
        return min(shared, place)

    def _place(self, chat: Chat, index: int, whole: str) -> tuple[int, int]:
        """Return where the content of turn `index` begins and ends in `whole`."""
        turn, mark = chat.messages[index], unused(SENTINELS[0], whole)
        turns = (*chat.messages[:index], replace(turn, content=mark), *chat.messages[index + 1 :])
        parts = self.render(replace(chat, messages=turns)).split(mark)
        if len(parts) != 2 or not whole.endswith(parts[1]):
            raise BadRow(left_out("an answer", turn.content))
        body = len(whole) - len(parts[1])
        return min(len(common(parts[0], whole)), body), body

    def check_kept(self, chat: Chat, whole: str) -> None:
        """Raise BadRow if the template leaves out a turn of a role, the tools, or a part of an answer."""
        roles = tuple(turn.role for turn in chat.messages)
        if roles not in self._kept_roles:
            self._kept_roles[roles] = self._lost_role(chat)
        if (lost := self._kept_roles[roles]) is not None:
            raise BadRow(
                f"the tokenizer's chat template leaves out turns of the role {lost}; remove them, or change it"
            )
        if chat.tools and self.render(replace(chat, tools=())) == whole:
            raise BadRow("the tokenizer's chat template leaves out `tools`; remove them, or change it")
        for turn in chat.messages:
            if turn.role == "assistant":
                check_shown(turn, whole, "")

    def _lost_role(self, chat: Chat) -> str | None:
        """Return a role, other than the assistant's, whose turns the template leaves out."""
        marks = {index: f"Sentinel{index}x" for index, turn in enumerate(chat.messages) if turn.role != "assistant"}
        turns = (replace(turn, content=marks.get(index, turn.content)) for index, turn in enumerate(chat.messages))
        text = self.render(replace(chat, messages=tuple(turns)))
        return next((chat.messages[index].role for index, mark in marks.items() if mark not in text), None)


def check_shown(turn: Message, shown: str, rest: str) -> None:
    """Raise BadRow if a part of an answer is not in its rendering `shown`, or another field of it not in `rest` either.

    Templates write calls of tools behind the content.
    """
    if squeezed(turn.content) not in squeezed(shown):
        raise BadRow(left_out("a part of an answer", turn.content))
    text = squeezed(shown + rest)
    for key, value in turn.fields.items():
        for leaf in leaves(value):
            if not any(squeezed(form) in text for form in (str(leaf), *escaped(leaf))):
                raise BadRow(left_out(f"`{key}` of an answer", str(leaf)))


def left_out(what: str, text: str) -> str:
    """Return the message on something that a chat template leaves out."""
    quoted = " ".join(text.split())
    quoted = quoted if len(quoted) <= 40 else quoted[:40] + "..."
    return (
        f"the tokenizer's chat template leaves out {what} ({quoted!r}), which would not be learnt; thinking models' "
        "templates drop the reasoning of earlier answers, or of all: give each row one answer, leave reasoning out, or "
        "change the template"
    )


def common(first: Any, second: Any) -> Any:
    """Return the longest common beginning of two texts or lists."""
    count = next((i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), None)
    return first[: min(len(first), len(second)) if count is None else count]


def squeezed(text: str) -> str:
    """Return `text` without white space: templates trim what they render."""
    return "".join(text.split())


def unused(text: str, whole: str) -> str:
    """Return `text`, made longer until it is not in `whole`."""
    while text in whole:
        text += "x"
    return text


def leaves(value: Any) -> Iterator[Any]:
    """Yield the names and arguments in tool calls: templates write them as JSON or as tags, and drop ids and types."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("id", "type", "index"):
                yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def escaped(leaf: Any) -> Iterator[str]:
    """Yield `leaf` as it is written inside JSON, with characters outside ASCII kept or escaped."""
    for ascii_only in (False, True):
        yield json.dumps(leaf, ensure_ascii=ascii_only).removeprefix('"').removesuffix('"')


def last_prompt(chat: Chat) -> tuple[Message, ...]:
    """Return the turns before the assistant's last answer."""
    last = max(index for index, turn in enumerate(chat.messages) if turn.role == "assistant")
    return chat.messages[:last]


def plain_text(messages: Sequence[Message], begin: str, end: str) -> Rendered:
    """Write turns without a template, after the text `begin`: each on a line, answers with the end token.

    Raises:
        BadRow: if a turn has more than a text.
    """
    text, spans = begin, []
    for turn in messages:
        if turn.fields or turn.role not in ("system", "user", "assistant"):
            what = f"`{next(iter(turn.fields))}`" if turn.fields else f"a turn of the role {turn.role}"
            raise BadRow(f"it has {what}, which the plain format cannot write; use a tokenizer with a chat template")
        start = len(text)
        text += turn.content
        if turn.role != "assistant":
            text += "\n"
            continue
        if turn.learnt:
            spans.append(Span(start, len(text)))
        text += end
    return Rendered(text, tuple(spans), end)
