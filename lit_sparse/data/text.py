"""Plain text files, for continued pre-training."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_sparse.data.encoding import Encoder, Example
from lit_sparse.data.examples import Examples, load_or_make
from lit_sparse.data.module import HELDOUT, TRAIN, TokenData, require_at_least
from lit_sparse.data.rows import IGNORED
from lit_sparse.data.sources import Row, heldout_count, read_text
from lit_sparse.errors import BadInput

PIECE_CHARACTERS = 1 << 20
"""Characters tokenised at once, up to the next line break. A tokenizer takes many times the memory of its text."""


class Text(TokenData):
    """Data module of plain text, cut into blocks of `max_length` tokens. The loss is on every token.

    Args:
        train: A text file, or several. Each ends with the end token, and a block may continue into the next file. Texts
            and blocks begin with the begin token, if the tokenizer adds one.
        validation: The same for validation. Without it, the last blocks of the training text are held out.
        heldout: Number of held-out blocks.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        heldout: int = 64,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        require_at_least(0, heldout=heldout)
        self.train, self.validation, self.heldout = train, validation, heldout
        self.val_names = [HELDOUT] if heldout or validation else []

    def read_rows(self) -> dict[str, list[Row]]:
        """Return one row per file."""
        rows = {TRAIN: read_files(self.train)}
        return rows | {HELDOUT: read_files(self.validation)} if self.validation is not None else rows

    def tokenise(self) -> dict[str, Examples]:
        """Return the blocks of the training text and of the held-out text."""
        sets = {name: self._blocks(rows) for name, rows in self.rows.items()}
        if self.validation is not None or not self.heldout:
            return sets
        blocks = sets[TRAIN]
        what = f"blocks of {self.max_length} tokens"
        cut = len(blocks) - heldout_count(self.heldout, len(blocks), "The text makes", what)
        return {TRAIN: blocks.take(0, cut), HELDOUT: blocks.take(cut, len(blocks))}

    def _blocks(self, rows: list[Row]) -> Examples:
        texts = [hashlib.sha256(row.data["text"].encode()).hexdigest() for row in rows]
        settings = ["blocks", self.encoder.fingerprint(), self.max_length, texts]
        return load_or_make(settings, lambda: cut_blocks(rows, self.encoder, self.max_length), len(rows))


def read_files(paths: str | list[str]) -> list[Row]:
    """Read text files into one row each; raise BadInput if one is missing or empty."""
    found = []
    for path in [paths] if isinstance(paths, str) else paths:
        content = read_text(Path(path).expanduser())
        if not content.strip():
            raise BadInput(f"The text file {path} is empty; give one that has text.")
        found.append(Row(path, {"text": content}))
    return found


def cut_blocks(rows: list[Row], encoder: Encoder, size: int) -> Examples:
    """Join all texts into one stream of tokens, and cut it into blocks of `size` tokens.

    If the tokenizer adds a begin token to a text, every text and every block begins with one, which is not learnt: some
    models (Gemma) are far worse without. A last block of one token is dropped: it has nothing to predict.
    """
    begin = encoder.encode_text(encoder.begin)
    ids: list[int] = []
    labels: list[int] = []
    for row in rows:
        text = without_marks(row.data["text"], encoder)
        tokens = [token for piece in split_pieces(text) for token in encoder.encode_text(piece)] + [encoder.text_end]
        lead = begin if ids[-1:] != begin else []  # a token that ends a text may also begin one
        ids += lead + tokens
        labels += [IGNORED] * len(lead) + tokens
    blocks, start = [], 0
    while start < len(ids):
        lead = begin if ids[start : start + 1] != begin else []
        stop = start + max(1, size - len(lead))
        blocks.append(Example(lead + ids[start:stop], [IGNORED] * len(lead) + labels[start:stop]))
        start = stop
    return Examples.of([block for block in blocks if len(block.input_ids) > 1])


def without_marks(text: str, encoder: Encoder) -> str:
    """Return `text` without a begin and an end token of its own."""
    bare = text.rstrip()
    text = bare.removesuffix(encoder.eos) if bare.endswith(encoder.eos) else text
    return text.removeprefix(encoder.begin)


def split_pieces(text: str) -> Iterator[str]:
    """Cut `text` into pieces of about `PIECE_CHARACTERS` characters, each of whole lines."""
    begin = 0
    while begin < len(text):
        end = text.find("\n", begin + PIECE_CHARACTERS) + 1 or len(text)  # find gives -1 without a further line break
        yield text[begin:end]
        begin = end
