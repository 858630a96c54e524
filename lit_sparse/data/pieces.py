"""Where streamed text comes from: pieces of local text, and rows of Hugging Face data sets, in passes without end."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from lit_sparse.data.sources import load_hub
from lit_sparse.errors import BadInput

PIECE_BYTES = 1 << 14
"""Bytes of a local text in a piece, up to the next line break: small ones give every lane some of a single file."""

READ = 100
"""Rows of a Hugging Face data set that are converted at once."""

SHUFFLED = 10_000
"""Rows of a Hugging Face data set among which the next one is drawn."""


@dataclass(frozen=True)
class Piece:
    """Some text, and whether its document ends with it."""

    text: str
    ends: bool = True


class Pieces(Protocol):
    """Pieces of text in passes, each in an order that depends on the pass only."""

    def of_pass(self, number: int, skip: int) -> Iterator[Callable[[], Piece]]:
        """Yield, for each piece of pass `number` but the first `skip`, a function that reads it."""
        ...

    def held_out(self) -> Iterator[str]:
        """Yield all pieces in an order that no seed changes, of which the first are held out."""
        ...

    def fingerprint(self) -> list[Any]:
        """Return everything on which the pieces and their order depend."""
        ...


@dataclass(frozen=True)
class Cut:
    """A piece of a file: the lines that begin within these bytes, and the parts of a longer line."""

    path: str
    begin: int
    end: int
    size: int

    def read(self) -> Piece:
        """Return the lines.

        Raises:
            BadInput: if they are not in UTF-8.
        """
        with Path(self.path).open("rb") as file:
            start, stop = (self._boundary(file, place) for place in (self.begin, self.end))
            file.seek(start)
            text = file.read(stop - start)
        try:
            return Piece(text.decode("utf-8-sig"), stop == self.size)
        except UnicodeDecodeError as error:
            raise BadInput(f"{self.path} is not UTF-8 (behind byte {self.begin}); save it as UTF-8.") from error

    def _boundary(self, file: BinaryIO, place: int) -> int:
        """Return where the piece ends that ends at about `place`: the next one, which begins there, finds the same.

        It is behind the next line break, or where that is further than a piece, behind the next space or character.
        """
        if place in (0, self.size):
            return place
        file.seek(place - 1)
        ahead = file.read(PIECE_BYTES)
        for mark in (b"\n", b" "):
            if (found := ahead.find(mark)) >= 0:
                return place + found
        return place + next((n for n, byte in enumerate(ahead[1:]) if byte & 0xC0 != 0x80), 0)


def cut_file(path: Path) -> list[Cut]:
    """Return the pieces of a text file, some of which may be empty."""
    size = path.stat().st_size
    return [Cut(str(path), begin, min(size, begin + PIECE_BYTES), size) for begin in range(0, size, PIECE_BYTES)]


class LocalPieces:
    """Pieces of local text, shuffled anew in each pass.

    Args:
        pieces: Texts, or cuts of files.
        seed: Seed of the order; None keeps that of the text.
        held: Pieces that no pass has: the first of an order that the seed does not change.

    Raises:
        BadInput: if they are all that there are.
    """

    def __init__(self, pieces: Sequence[Cut | str], seed: int | None, held: int = 0) -> None:
        if held >= len(pieces):
            raise BadInput(
                f"All {len(pieces)} pieces of text are held out, and none is left to train on; set `heldout` to 0, or "
                "give more text."
            )
        self.pieces, self.seed, self.held = pieces, seed, held
        self._order = np.random.default_rng(0).permutation(len(pieces))

    def held_out(self) -> Iterator[str]:
        """Yield all pieces in the order of which the first `held` are held out."""
        return (self._read(index).text for index in self._order)

    def of_pass(self, number: int, skip: int) -> Iterator[Callable[[], Piece]]:
        order = np.sort(self._order[self.held :])
        if self.seed is not None:
            order = np.random.default_rng([self.seed, number]).permutation(order)
        return (lambda index=index: self._read(index) for index in order[skip:])

    def _read(self, index: int) -> Piece:
        piece = self.pieces[index]
        return Piece(piece) if isinstance(piece, str) else piece.read()

    @cached_property
    def _hashes(self) -> list[str]:
        """Hashes of the texts, made once: every checkpoint has them."""
        return [hashlib.sha256(one.encode()).hexdigest() for one in self.pieces if isinstance(one, str)]

    def fingerprint(self) -> list[Any]:
        return [self._hashes, [astuple(one) for one in self.pieces if isinstance(one, Cut)], self.seed, self.held]


class HubPieces:
    """The rows of a Hugging Face data set, read as they come and shuffled a few thousand at a time.

    Each worker process of each rank reads all of them, and tokenises those of its lanes.

    Args:
        name: Name of the data set, and a colon and a split if that is not `train`.
        config: Its configuration, if it has several.
        seed: Seed of the order; None keeps that of the data set.
        held: Rows that no pass has: the first.

    Raises:
        BadInput: if there is no such data set, or its rows have no `text`.
    """

    def __init__(self, name: str, config: str | None, seed: int | None, held: int = 0) -> None:
        self.name, self.config, self.seed, self.held = name, config, seed, held

    def _rows(self) -> Any:
        return load_hub(self.name, self.config, "is no file or folder here", streaming=True)

    def held_out(self) -> Iterator[str]:
        """Yield all rows' texts in the order of which the first `held` are held out."""
        return self._texts(self._rows())

    def of_pass(self, number: int, skip: int) -> Iterator[Callable[[], Piece]]:
        rows = self._rows().skip(self.held)
        if self.seed is not None:
            rows = rows.shuffle(seed=self.seed, buffer_size=SHUFFLED)
        rows = rows.skip(skip)
        rows.set_epoch(number)  # of what is iterated: `skip` returns another one, in its first pass
        return (lambda text=text: Piece(text) for text in self._texts(rows))

    def _texts(self, rows: Any) -> Iterator[str]:
        """Yield the texts of all rows. Iterating `rows` itself gives each worker process of a loader other rows."""
        for batch in rows.iter(batch_size=READ):
            for text in batch.get("text", [None]):
                if not isinstance(text, str):
                    raise BadInput(
                        f"The rows of {self.name} have {', '.join(batch)} and no `text`; give a data set of texts."
                    )
                yield text

    def fingerprint(self) -> list[Any]:
        return [self.name, self.config, self.seed, self.held]
