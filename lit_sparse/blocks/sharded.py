"""Read, write and score blocks of a sharded matrix: each rank does its own part, and no rank gathers the matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_sparse.optim import part_of, sum_over_shards


class Pieces:
    """Where blocks lie in this rank's part of a sharded matrix.

    Blocks are cut into pieces of the largest height and width that divide the blocks and the part's edges, so that each
    piece is on one rank: a block that crosses the edge of a shard is in pieces on both. One indexed copy moves all of
    them.

    Args:
        matrix: The matrix (out, in).
        index: Row and column of each block, (N, 2) integers.
        size: Height and width of a block.
    """

    def __init__(self, matrix: DTensor, index: Tensor, size: tuple[int, int]) -> None:
        part = part_of(matrix)
        self._shape = len(index), *size
        (rows, columns), (top, left), (height, width) = part.values.shape, part.start, size
        self.height, self.width = math.gcd(height, top, rows), math.gcd(width, left, columns)
        down, across = height // self.height, width // self.width  # pieces of a block
        row = (index[:, :1].long() * down + torch.arange(down) - top // self.height)[:, :, None]
        column = (index[:, 1:].long() * across + torch.arange(across) - left // self.width)[:, None, :]
        inside = (row >= 0) & (row < rows // self.height) & (column >= 0) & (column < columns // self.width)
        slots = inside.nonzero(as_tuple=True)
        places = row.expand_as(inside)[slots], column.expand_as(inside)[slots]
        device = part.values.device
        self._slots, self._places = (tuple(one.to(device) for one in each) for each in (slots, places))

    def read(self, matrix: DTensor) -> Tensor:
        """Return the blocks (N, h, w), in fp32 (fp64 of an fp64 matrix); zeros past a ragged end.

        One all-reduce, in which each entry is one rank's value and zeros: exact. Every rank must call it.
        """
        values = part_of(matrix).values
        blocks = values.new_zeros(self._shape, dtype=torch.promote_types(matrix.dtype, torch.float32))
        if len(self._slots[0]):
            self._cut_blocks(blocks)[self._slots] = self._cut(values)[self._places].to(blocks.dtype)
        return sum_over_shards(blocks, matrix)

    @torch.no_grad()
    def write(self, matrix: DTensor, blocks: Tensor) -> None:
        """Write this rank's part of `blocks` (N, h, w) into its shard, cast to its dtype. No communication."""
        values = part_of(matrix).values
        if len(self._slots[0]):
            blocks = blocks.detach().to(values.device)  # an offloaded shard is in host memory
            self._cut(values)[self._places] = self._cut_blocks(blocks)[self._slots].to(values.dtype)

    def _cut(self, values: Tensor) -> Tensor:
        """Return a view of a part as pieces, (rows, columns, height, width)."""
        return values.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.height)).transpose(1, 2)

    def _cut_blocks(self, blocks: Tensor) -> Tensor:
        """Return a view of blocks as pieces, (N, rows, columns, height, width)."""
        return blocks.unflatten(2, (-1, self.width)).unflatten(1, (-1, self.height)).transpose(2, 3)
