"""Text that is tokenised while a model trains on it: rows without end, in an order that no layout changes.

Every row of an optimizer step's batch has a lane of its own. The pieces of text are dealt to the lanes in turn, and a
lane's tokens are cut into rows one after the other. Which rows a step has therefore depends on seed and rows per step
only; ranks and worker processes share the lanes, and none of them drops any text.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lit_sparse.data.encoding import Encoder, Example
from lit_sparse.data.loader import Collate, ignore_interrupts, own_refusals
from lit_sparse.data.pieces import Piece, Pieces
from lit_sparse.data.rows import IGNORED
from lit_sparse.errors import BadInput

FRUITLESS = 20
"""Passes in which a row's share of the text may be blank before its training is given up."""

ENDLESS = 2**31 - 1
"""Batches of an epoch. Of a loader without a length, Lightning fetches a batch ahead, which a checkpoint would skip."""


@dataclass(frozen=True)
class Place:
    """Where a lane is: at a token of a piece.

    Attributes:
        number: Pass over the text.
        first: Pieces of all passes before.
        piece: Number of the piece within its pass.
        token: Number of its tokens that rows have had.
    """

    number: int = 0
    first: int = 0
    piece: int = 0
    token: int = 0

    @property
    def index(self) -> int:
        """Number of the piece, counted over all passes."""
        return self.first + self.piece


class Lane:
    """A row's share of the text.

    Args:
        place: Where it goes on.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.waiting: deque[tuple[Place, Callable[[], Piece]]] = deque()
        self.tokens: list[int] = []  # of the piece at `place`, once it is read
        self.labels: list[int] = []
        self.reading = False


class Rows(IterableDataset[Any]):
    """Rows of `size` tokens without end; row after row of each lane in turn.

    A document ends with the end token, and a row may continue into the next one. Pieces and rows begin with the begin
    token, without a loss on it, if the tokenizer adds one.

    Args:
        pieces: Where the text comes from.
        encoder: Tokenises it.
        size: Tokens of a row.
        lanes: Numbers of the lanes of this rank, in the order of a batch's rows.
        total: Number of lanes of all ranks.

    Attributes:
        places: Where each lane goes on, by number.
    """

    def __init__(self, pieces: Pieces, encoder: Encoder, size: int, lanes: Sequence[int], total: int) -> None:
        self.pieces, self.encoder, self.size, self.lanes, self.total = pieces, encoder, size, lanes, total
        self.places: dict[int, Place] = {lane: Place() for lane in lanes}
        self.begin = encoder.encode_text(encoder.begin)

    def __iter__(self) -> Iterator[tuple[Example, Place]]:
        worker = get_worker_info()
        mine = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        lanes = {number: Lane(self.places[number]) for number in mine}
        reader = self._read(lanes)
        while True:
            for lane in lanes.values():
                row = self._row(lane, reader)
                yield row, lane.place

    def _read(self, lanes: dict[int, Lane]) -> Iterator[None]:
        """Deal a piece to its lane at each step, from the place of the lane that is furthest behind."""
        begin = min((lane.place for lane in lanes.values()), key=lambda place: place.index)
        number, first, skip = begin.number, begin.first, begin.piece
        while True:
            count = 0
            for piece, load in enumerate(self.pieces.of_pass(number, skip), skip):
                count += 1
                place = Place(number, first, piece)
                lane = lanes.get(place.index % self.total)
                if lane is not None and place.index >= lane.place.index:
                    lane.waiting.append((place, load))
                yield
            if skip + count == 0:
                raise BadInput("The text has no rows to train on; give more text, or hold out less of it.")
            number, first, skip = number + 1, first + skip + count, 0

    def _row(self, lane: Lane, reader: Iterator[None]) -> Example:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < self.size:
            if not lane.reading or lane.place.token >= len(lane.tokens):
                self._next(lane, reader)
            start = lane.place.token
            lead = self.begin if not ids and lane.tokens[start : start + 1] != self.begin else []
            stop = start + max(1, self.size - len(ids) - len(lead))
            ids += lead + lane.tokens[start:stop]
            labels += [IGNORED] * len(lead) + lane.labels[start:stop]
            lane.place = replace(lane.place, token=min(stop, len(lane.tokens)))
        return Example(ids, labels)

    def _next(self, lane: Lane, reader: Iterator[None]) -> None:
        """Read the lane's next piece that has tokens left, which on resuming is the one that it was in.

        Raises:
            BadInput: if all of its pieces are blank.
        """
        begun = lane.place.number
        while lane.place.number <= begun + FRUITLESS:
            while not lane.waiting:
                next(reader)
            place, load = lane.waiting.popleft()
            resumed = not lane.reading and place.index == lane.place.index
            lane.place = lane.place if resumed else place
            lane.tokens, lane.labels = self._tokens(load())
            lane.reading = True
            if lane.place.token < len(lane.tokens):
                return
        raise BadInput(
            f"A row of the batch found nothing but blank text in {FRUITLESS} passes; give more text, or fewer rows a "
            "step."
        )

    def _tokens(self, piece: Piece) -> tuple[list[int], list[int]]:
        if not piece.text.strip():
            return [], []
        text = without_marks(piece.text, self.encoder)
        tokens = self.encoder.encode_text(text) + [self.encoder.text_end] * piece.ends
        return self.begin + tokens, [IGNORED] * len(self.begin) + tokens

    def fingerprint(self) -> str:
        """Return a hash of everything on which the rows of a step depend."""
        settings = [self.pieces.fingerprint(), self.encoder.fingerprint(), self.size, self.total]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


class StreamLoader:
    """Batches of `Rows`, whose places are saved in checkpoints and restored from them.

    Args:
        rows: The rows of this rank.
        collate: Makes a batch from a list of rows.
        workers: Worker processes that read and tokenise; of these, the largest number that divides a batch's rows.
    """

    def __init__(self, rows: Rows, collate: Collate, workers: int) -> None:
        self.rows, self.collate = rows, collate
        least = range(min(workers, len(rows.lanes)), 0, -1)
        self.workers = next((count for count in least if not len(rows.lanes) % count), 0)

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            self.rows,
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator(),  # else each iterator draws from the global one
            worker_init_fn=ignore_interrupts,
        )
        found = iter(loader)
        with own_refusals():
            while True:
                batch = list(islice(found, len(self.rows.lanes)))
                self.rows.places = {lane: place for lane, (_, place) in zip(self.rows.lanes, batch, strict=True)}
                yield self.collate([row for row, _ in batch])

    def state_dict(self) -> dict[str, Any]:
        """Return the places of all ranks' lanes, and a hash of what they refer to. Every rank must call it."""
        places = {lane: list(astuple(place)) for lane, place in self.rows.places.items()}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, places)
            places = {lane: place for one in found for lane, place in one.items()}
        return {"places": [places[lane] for lane in sorted(places)], "order": self.rows.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the places of `state` in the next iteration.

        Raises:
            BadInput: if text, seed or rows per step differ, so that a place means another text.
        """
        if state["order"] != self.rows.fingerprint():
            raise BadInput(
                "The checkpoint was written with other text, another tokenizer, length or seed, or other rows per step "
                "(batch size times processes), so that its place in the text is unknown; resume with the same ones, or "
                "start a new run from its weights."
            )
        self.rows.places = {lane: Place(*state["places"][lane]) for lane in self.rows.lanes}


def without_marks(text: str, encoder: Encoder) -> str:
    """Return `text` without a begin and an end token of its own."""
    bare = text.rstrip()
    text = bare.removesuffix(encoder.eos) if bare.endswith(encoder.eos) else text
    return text.removeprefix(encoder.begin)
