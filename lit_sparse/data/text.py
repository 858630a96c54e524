"""Plain text files, for continued pre-training."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_sparse.data.encoding import Encoder, Example
from lit_sparse.data.examples import Examples, cached
from lit_sparse.data.module import HELDOUT, TRAIN, TokenData, at_least
from lit_sparse.data.sources import Row, existing
from lit_sparse.errors import BadInput

PIECE = 1 << 20
"""Characters tokenised at once, up to the next line break: a tokenizer needs many times the memory of its text."""


class Text(TokenData):
    """Plain text, cut into blocks of `max_length` tokens; every token is learnt.

    Args:
        train: A text file, or several; each ends with the end token, and blocks run on from one into the next.
        validation: The same for validation; absent: the last blocks of the training text are held out.
        heldout: How many blocks those are.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        heldout: int = 64,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        at_least(0, heldout=heldout)
        self.train, self.validation, self.heldout = train, validation, heldout
        self.val_names = [HELDOUT] if heldout or validation else []

    def read_rows(self) -> dict[str, list[Row]]:
        """One row for each file."""
        rows = {TRAIN: files(self.train)}
        return rows | {HELDOUT: files(self.validation)} if self.validation is not None else rows

    def tokenise(self) -> dict[str, Examples]:
        """Blocks of training text and of what is held out."""
        sets = {name: self._blocks(rows) for name, rows in self.rows.items()}
        if self.validation is not None or not self.heldout:
            return sets
        blocks = sets[TRAIN]
        cut = len(blocks) - self.heldout
        if cut < 1:
            raise BadInput(
                f"The text makes {len(blocks)} blocks of {self.max_length} tokens, too few to hold out {self.heldout}; "
                "lower `heldout` or `max_length`."
            )
        return {TRAIN: blocks.part(0, cut), HELDOUT: blocks.part(cut, len(blocks))}

    def _blocks(self, rows: list[Row]) -> Examples:
        texts = [hashlib.sha256(row.data["text"].encode()).hexdigest() for row in rows]
        settings = ["blocks", self.encoder.fingerprint(), self.max_length, texts]
        return cached(settings, lambda: blocks(rows, self.encoder, self.max_length))


def files(paths: str | list[str]) -> list[Row]:
    """The contents of text files."""
    found = []
    for path in [paths] if isinstance(paths, str) else paths:
        content = existing(Path(path).expanduser()).read_text(encoding="utf-8")
        if not content.strip():
            raise BadInput(f"The text file {path} is empty; give one that has text.")
        found.append(Row(path, {"text": content}))
    return found


def blocks(rows: list[Row], encoder: Encoder, size: int) -> Examples:
    """All texts as one stream of tokens, cut into blocks of `size`; a last block of one token is left out."""
    stream: list[int] = []
    for row in rows:
        stream += [token for piece in pieces(row.data["text"]) for token in encoder.ids(piece)]
        stream.append(encoder.end)
    cut = [stream[begin : begin + size] for begin in range(0, len(stream), size)]
    return Examples.of([Example(block, block) for block in cut if len(block) > 1])


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of about `PIECE` characters that end with a line."""
    begin = 0
    while begin < len(text):
        end = text.find("\n", begin + PIECE) + 1 or len(text)
        yield text[begin:end]
        begin = end
