"""Blocks of weight matrices: the grid, reading and writing blocks, and a selection of blocks in a file.

A matrix (O, K), that is (out, in), is cut into blocks of a `size` (height, width); the last block row and block column
may be ragged. A selection of blocks is an int32 tensor (N, 2) of (row, column) indices, sorted by column, then row, so
that equal selections are equal tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_sparse.blocks.sharded import Pieces
from lit_sparse.errors import BadInput
from lit_sparse.selections import check_shapes, index_of, read_state

Size = tuple[int, int]
AUTO_SIZES = (256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Blocks:
    """Selected blocks of one matrix: their `size`, and `index` (N, 2), the block row and block column of each."""

    size: Size
    index: Tensor
    _cut: list[Pieces] = field(default_factory=list, init=False, repr=False, compare=False)

    @staticmethod
    def of(size: Size, index: Tensor) -> Blocks:
        """Return the blocks in canonical order: by column, then row, as int32 on the CPU."""
        order = sorted(range(len(index)), key=lambda i: (int(index[i, 1]), int(index[i, 0])))
        return Blocks(size, index[order].to("cpu", torch.int32).reshape(-1, 2))

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Yield the rows and columns of each block. At ragged ends the slices go past the matrix, as slicing allows."""
        (height, width) = self.size
        for row, column in self.index.tolist():
            yield slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)

    def numel(self, matrix: Tensor) -> int:
        """Return the number of weights of `matrix` inside the blocks; ragged blocks count what they have."""
        return sum(matrix[rows, columns].numel() for rows, columns in self.slices())

    def read(self, matrix: Tensor) -> Tensor:
        """Return the blocks' values (N, h, w), in fp32 (fp64 for an fp64 matrix); zeros past a ragged end.

        Of a DTensor every rank must call it, and gets all blocks.
        """
        if isinstance(matrix, DTensor):
            return self._pieces(matrix).read(matrix)
        out = matrix.new_zeros(len(self.index), *self.size, dtype=torch.promote_types(matrix.dtype, torch.float32))
        for block, (rows, columns) in zip(out, self.slices(), strict=True):
            values = matrix[rows, columns]
            block[: values.shape[0], : values.shape[1]] = values
        return out

    @torch.no_grad()
    def write(self, matrix: Tensor, values: Tensor) -> None:
        """Write `values` (N, h, w) into `matrix` in place, cast to its dtype; of a DTensor, this rank's part."""
        if isinstance(matrix, DTensor):
            self._pieces(matrix).write(matrix, values)
            return
        for block, (rows, columns) in zip(values, self.slices(), strict=True):
            target = matrix[rows, columns]
            target.copy_(block[: target.shape[0], : target.shape[1]])

    def _pieces(self, matrix: DTensor) -> Pieces:
        """Return where the blocks are in this rank's part of `matrix`, found out once: it stays sharded as it is."""
        if not self._cut:
            self._cut.append(Pieces(matrix, self.index, self.size))
        return self._cut[0]


def grid(matrix: Tensor, size: Size) -> tuple[int, int]:
    """Return the number of block rows and of block columns of a matrix."""
    return -(-matrix.shape[0] // size[0]), -(-matrix.shape[1] // size[1])


def automatic_size(matrices: Mapping[str, Tensor], weights: float) -> Size:
    """Return the largest square size that divides every matrix and cuts `weights` weights into at least 16 blocks.

    With fewer there is little to select. If no size qualifies, return the smallest that divides; if none divides, 8.
    """
    fitting = [n for n in AUTO_SIZES if all(side % n == 0 for matrix in matrices.values() for side in matrix.shape)]
    for size in fitting or AUTO_SIZES[-1:]:
        if weights >= 16 * size * size:
            return size, size
    smallest = (fitting or AUTO_SIZES)[-1]
    return smallest, smallest


def read_choice(path: Path, matrices: Mapping[str, Tensor], strategy: str) -> dict[str, Blocks]:
    """Read a selection of blocks from a run's checkpoint (.ckpt), or from a JSON file of the same form.

    The form is {name of the linear layer: {"size": [height, width], "index": [[row, column], ...]}}, and the `shape` of
    each layer's matrix [out, in], which may be left out.

    Args:
        matrices: The matrices (out, in) that may have blocks, by the layer's name; only their shapes are read.
        strategy: Class name of the strategy whose state in the checkpoint is the selection.

    Raises:
        BadInput: if the file is missing or malformed, or names a matrix or block that the model does not have.
    """
    try:
        raw = read_state(path, strategy)
        choice = {
            name: Blocks.of(_size_of(entry["size"]), index_of(entry["index"], columns=2)) for name, entry in raw.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(
            f"no choice of blocks could be read from {path} ({error}); give gradient, random, diagonal, slab, "
            "coupled, or a file written by a run."
        ) from error
    check_choice(choice, matrices, str(path))
    check_shapes(raw, matrices, str(path))
    return choice


def _size_of(values: Any) -> Size:
    # Not isinstance: true and false are ints, too.
    if isinstance(values, list | tuple) and len(values) == 2 and all(type(side) is int and side > 0 for side in values):
        return values[0], values[1]
    raise ValueError("`size` must be [height, width], in whole numbers from 1 on")


def check_choice(choice: Mapping[str, Blocks], matrices: Mapping[str, Tensor], source: str) -> None:
    """Refuse blocks that the matrices do not have: reading and writing would pass over them without a word.

    Args:
        source: What chose them, for the message.

    Raises:
        BadInput: naming the first matrix that lacks a block, has one twice, or is not there; or if there is no block.
    """
    longest = max((side for matrix in matrices.values() for side in matrix.shape), default=0)
    for name, blocks in choice.items():
        if name not in matrices:
            raise BadInput(
                f"{source} selects blocks of {name}, which is not among the {len(matrices)} target matrices; give a "
                f"file of the same model and targets."
            )
        if max(blocks.size) > longest:  # a block is held whole, with zeros past a ragged end
            raise BadInput(
                f"{source} selects blocks of {blocks.size[0]:,} x {blocks.size[1]:,} of {name}, but no target matrix "
                f"has a side longer than {longest:,}; give a file of the same model."
            )
        rows, columns = grid(matrices[name], blocks.size)
        if len(blocks.index) and not (
            int(blocks.index.min()) >= 0
            and int(blocks.index[:, 0].max()) < rows
            and int(blocks.index[:, 1].max()) < columns
        ):
            raise BadInput(
                f"{source} selects a block outside the {rows} x {columns} blocks of {name}; give a file of the same "
                f"model."
            )
        found, times = blocks.index.unique(dim=0, return_counts=True)
        if len(found) < len(blocks.index):
            raise BadInput(
                f"{source} selects the block {found[times > 1][0].tolist()} of {name} twice; name each block once."
            )
    if not any(len(blocks.index) for blocks in choice.values()):
        raise BadInput(f"{source} selects no block; give a file that names some.")
