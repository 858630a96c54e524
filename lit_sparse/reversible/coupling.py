"""The reversible step of two streams of hidden states, in floating point and, without any error, in fixed point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FRACTION_BITS = 14
"""Bits of a fixed-point number behind the point: steps of 6e-5 in a hidden state."""
LIMIT = 2**16
"""Largest number that fixed point bears: half its range, so that a sum that wraps around is above it, too."""


@dataclass(frozen=True)
class Coupling:
    """How one stream enters the sum with a function of the other.

    `out = f(read) + weight * kept`, or with `relative` `out = f(read) + weight * (kept - read)`. MEFT's couplings
    (arXiv 2306.00477, section 3.2) are the first kind. The second is our choice: where the function carries a residual
    of its own, as whole decoder layers do, the first adds up all earlier states.

    Attributes:
        weight: Weight of the stream that is kept, above 0. Its inverse is what one inversion multiplies errors by.
        relative: Whether what the function reads is subtracted first.
    """

    weight: float
    relative: bool

    @property
    def shift(self) -> int:
        """The weight as a number of bits to shift by, in fixed point.

        Raises:
            ValueError: if the weight is not 1, 1/2, 1/4, ... 1/128.
        """
        bits = -math.log2(self.weight)
        if not bits.is_integer() or not 0 <= bits <= 7:
            raise ValueError(f"{self.weight} is not 1, 1/2, 1/4, ... 1/128")
        return int(bits)

    def couple(self, f: Tensor, read: Tensor, kept: Tensor) -> Tensor:
        """Return `out`, in the streams' dtype, from `f` = f(read) of any floating dtype."""
        return f.to(kept.dtype) + self.weight * (kept - read if self.relative else kept)

    def invert(self, f: Tensor, read: Tensor, out: Tensor) -> Tensor:
        """Return `kept` up to rounding."""
        kept = (out - f.to(out.dtype)) / self.weight
        return kept + read if self.relative else kept

    def couple_fixed(self, f: Tensor, read: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return `out` in fixed point, and the bits that the shift drops, packed (see `pack`)."""
        term = kept - read if self.relative else kept
        return to_fixed(f) + (term >> self.shift), pack(term & (2**self.shift - 1), self.shift)

    def invert_fixed(self, f: Tensor, read: Tensor, out: Tensor, dropped: Tensor) -> Tensor:
        """Return `kept`, the very bits that `couple_fixed` was given."""
        kept = ((out - to_fixed(f)) << self.shift) + unpack(dropped, self.shift, out.shape)
        return kept + read if self.relative else kept


def to_fixed(x: Tensor) -> Tensor:
    """Return floating-point `x` in fixed point (int32), rounded."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * 2**FRACTION_BITS).round_().int()


def fits(x: Tensor) -> Tensor:
    """Return whether all of `x`, in floating or fixed point, is a number within LIMIT: a bool scalar, on its device."""
    limit = LIMIT if x.is_floating_point() else LIMIT * 2**FRACTION_BITS
    least, most = x.aminmax()  # not a number if one of `x` is not
    return (least > -limit) & (most < limit)


def from_fixed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fixed-point `x` (int32) in floating point."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (x.to(wide) / 2**FRACTION_BITS).to(dtype)


def pack(values: Tensor, bits: int) -> Tensor:
    """Return integers of `bits` bits each (0 to 7) as bytes: eight of them in `bits` bytes.

    Args:
        values: Any shape and integer dtype, from 0 to 2^bits - 1.

    Returns:
        (ceil(n / 8), bits), uint8, for n values.
    """
    eights = torch.nn.functional.pad(values.to(torch.uint8).flatten(), (0, -values.numel() % 8)).view(-1, 8)
    word = torch.zeros(len(eights), dtype=torch.int64, device=values.device)
    for place in range(8):
        word |= eights[:, place].long() << (bits * place)
    packed = torch.empty(len(word), bits, dtype=torch.uint8, device=values.device)
    for byte in range(bits):
        packed[:, byte] = (word >> (8 * byte)) & 255
    return packed


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Return the integers of `pack`, uint8, in the shape `shape`."""
    word = torch.zeros(len(packed), dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        word |= packed[:, byte].long() << (8 * byte)
    eights = torch.empty(len(packed), 8, dtype=torch.uint8, device=packed.device)
    for place in range(8):
        eights[:, place] = (word >> (bits * place)) & (2**bits - 1)
    return eights.flatten()[: shape.numel()].view(shape)
