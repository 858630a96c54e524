"""Replay allocations through a model of CUDA's caching allocator: what it reserves from the driver.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings. Sizes are rounded up to 512 bytes.
Requests of up to 1 MiB come from a pool of segments of 2 MiB, larger ones from another pool. The smallest block that
is large enough is taken, of several the one with the lowest address. It is split if 512 bytes (in the large pool more
than 1 MiB) would remain. Neighbours within a segment are merged when they are freed. Segments are given back only when
the device is full, so that the reserved memory never falls here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROUND = 512
SMALL = 2**20
"""Largest request of the small pool."""
SMALL_SEGMENT, LARGE_SEGMENT, ROUND_LARGE = 2 * 2**20, 20 * 2**20, 2 * 2**20
MIN_LARGE = 10 * 2**20
"""Requests from this size on get a segment of their own, a multiple of `ROUND_LARGE`."""


@dataclass(eq=False)
class _Piece:
    """A part of a segment, allocated or free; neighbours are those of the same segment."""

    address: int
    size: int
    small: bool
    free: bool = False
    before: _Piece | None = None
    after: _Piece | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.address


class CachingAllocator:
    """A model of the caching allocator of one device and stream.

    Attributes:
        allocated, reserved: Bytes now: of blocks in use, rounded, and of segments.
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self._pools: dict[bool, tuple[list[tuple[int, int]], dict[int, _Piece]]] = {True: ([], {}), False: ([], {})}
        self._address = 0

    def allocate(self, size: int) -> _Piece:
        """Allocate `size` bytes."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        piece = self._fit(size, small) or self._segment(size, small)
        rest = piece.size - size
        if rest >= ROUND if small else rest > SMALL:
            left = _Piece(piece.address + size, rest, small, before=piece, after=piece.after)
            if piece.after is not None:
                piece.after.before = left
            piece.size, piece.after = size, left
            self._add(left)
        self.allocated += piece.size
        return piece

    def release(self, piece: _Piece) -> None:
        """Free a block."""
        self.allocated -= piece.size
        for near in (piece.before, piece.after):
            if near is not None and near.free:
                self._remove(near)
                piece = self._merged(piece, near)
        self._add(piece)

    def _fit(self, size: int, small: bool) -> _Piece | None:
        keys, pieces = self._pools[small]
        at = bisect_left(keys, (size, -1))
        if at == len(keys):
            return None
        piece = pieces[keys[at][1]]
        self._remove(piece)
        return piece

    def _segment(self, size: int, small: bool) -> _Piece:
        whole = SMALL_SEGMENT if small else LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        piece = _Piece(self._address, whole, small)
        self._address += whole + ROUND_LARGE
        self.reserved += whole
        return piece

    def _merged(self, piece: _Piece, near: _Piece) -> _Piece:
        low, high = (near, piece) if near.address < piece.address else (piece, near)
        low.size, low.after = low.size + high.size, high.after
        if high.after is not None:
            high.after.before = low
        return low

    def _add(self, piece: _Piece) -> None:
        keys, pieces = self._pools[piece.small]
        piece.free = True
        insort(keys, piece.key)
        pieces[piece.address] = piece

    def _remove(self, piece: _Piece) -> None:
        keys, pieces = self._pools[piece.small]
        piece.free = False
        del keys[bisect_left(keys, piece.key)], pieces[piece.address]


@dataclass(frozen=True)
class Replayed:
    """Peaks of a replay, in bytes: allocated in rounded blocks, and reserved in segments."""

    allocated: int
    reserved: int


def replay(events: Iterable[int], sizes: Sequence[int]) -> Replayed:
    """Replay allocations (number of a block from 1) and frees (its negative) of blocks of these `sizes` in bytes."""
    allocator, pieces, peak = CachingAllocator(), dict[int, _Piece](), 0
    for event in events:
        if event > 0:
            pieces[event] = allocator.allocate(sizes[event - 1])
            peak = max(peak, allocator.allocated)
        else:
            allocator.release(pieces.pop(-event))
    return Replayed(peak, allocator.reserved)
