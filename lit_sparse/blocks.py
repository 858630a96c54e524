"""Blocks of weight matrices: how a matrix is cut, which blocks are chosen, how they are read and written.

A matrix (O, K) (out, in) is cut into blocks of a `size` (height, width); the last block row and column may be ragged.
A choice of blocks is an int32 tensor (N, 2) of (row, column) indices, sorted by column, then row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_sparse.checkpoints import read_checkpoint
from lit_sparse.errors import BadInput

Score = Literal["abs_mean", "mean_abs", "l2"]
Ranking = Literal["global", "per_matrix"]
Size = tuple[int, int]
AUTO_SIZES = (256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Blocks:
    """Chosen blocks of one matrix: block `size` and `index` (N, 2) of block rows and columns."""

    size: Size
    index: Tensor

    @staticmethod
    def of(size: Size, index: Tensor) -> Blocks:
        """The same blocks in canonical order: by column, then row, as int32 on the CPU."""
        order = sorted(range(len(index)), key=lambda i: (int(index[i, 1]), int(index[i, 0])))
        return Blocks(size, index[order].to("cpu", torch.int32).reshape(-1, 2))

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """The rows and columns of each block in its matrix (ragged ends are left to slicing)."""
        (height, width) = self.size
        for row, column in self.index.tolist():
            yield slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)

    def numel(self, matrix: Tensor) -> int:
        """Weights of `matrix` inside the blocks, ragged ends counted as they are."""
        return sum(matrix[rows, columns].numel() for rows, columns in self.slices())

    def read(self, matrix: Tensor) -> Tensor:
        """The blocks' values as fp32 (fp64 of an fp64 matrix), (N, h, w), zeros past a ragged end."""
        out = matrix.new_zeros(len(self.index), *self.size, dtype=torch.promote_types(matrix.dtype, torch.float32))
        for block, (rows, columns) in zip(out, self.slices(), strict=True):
            values = matrix[rows, columns]
            block[: values.shape[0], : values.shape[1]] = values
        return out

    @torch.no_grad()
    def write(self, matrix: Tensor, values: Tensor) -> None:
        """Copy `values` (N, h, w) into `matrix` in place, cast to its dtype."""
        for block, (rows, columns) in zip(values, self.slices(), strict=True):
            target = matrix[rows, columns]
            target.copy_(block[: target.shape[0], : target.shape[1]])


def grid(matrix: Tensor, size: Size) -> tuple[int, int]:
    """Block rows and columns of a matrix."""
    return -(-matrix.shape[0] // size[0]), -(-matrix.shape[1] // size[1])


def automatic_size(matrices: Mapping[str, Tensor], weights: float) -> Size:
    """The largest square block that divides every matrix and of which `weights` trained weights make at least 16."""
    fitting = [n for n in AUTO_SIZES if all(side % n == 0 for matrix in matrices.values() for side in matrix.shape)]
    for size in fitting or AUTO_SIZES[-1:]:
        if weights >= 16 * size * size:
            return size, size
    smallest = (fitting or AUTO_SIZES)[-1]
    return smallest, smallest


def block_scores(gradient: Tensor, size: Size, score: Score) -> Tensor:
    """Contribution of one gradient to the blocks' scores, fp32 (rows, columns).

    Means are over the weights that a ragged block has. `mean_abs` gives the signed mean, whose absolute value is taken
    once all gradients are in; `l2` gives the sum of squares, whose root is.
    """
    rows, columns = grid(gradient, size)
    values = gradient.float()
    values = {"abs_mean": values.abs, "mean_abs": values.clone, "l2": values.square}[score]()
    padded = pad(values, (0, columns * size[1] - values.shape[1], 0, rows * size[0] - values.shape[0]))
    sums = padded.view(rows, size[0], columns, size[1]).sum((1, 3))
    if score == "l2":
        return sums
    heights = torch.full((rows, 1), size[0], device=sums.device)
    widths = torch.full((1, columns), size[1], device=sums.device)
    heights[-1], widths[:, -1] = gradient.shape[0] - (rows - 1) * size[0], gradient.shape[1] - (columns - 1) * size[1]
    return sums / (heights * widths)


def final_scores(sums: Tensor, score: Score) -> Tensor:
    """Scores from summed contributions."""
    return {"abs_mean": sums, "mean_abs": sums.abs(), "l2": sums.sqrt()}[score]


def top_blocks(scores: Mapping[str, Tensor], size: Size, count: int, ranking: Ranking) -> dict[str, Blocks]:
    """The `count` best-scored blocks over all matrices, or of each matrix in proportion to its number of blocks.

    Ties go to the lower name, row and column, whatever the order of the matrices.
    """
    names = sorted(scores)
    if ranking == "global":
        chosen = _top(torch.cat([scores[name].flatten() for name in names]), count)
        ends = torch.tensor([0, *(scores[name].numel() for name in names)]).cumsum(0)
        flat = {
            name: chosen[(chosen >= a) & (chosen < b)] - a for name, a, b in zip(names, ends, ends[1:], strict=False)
        }
    else:
        shares = _shares([scores[name].numel() for name in names], count)
        flat = {name: _top(scores[name].flatten(), share) for name, share in zip(names, shares, strict=True)}
    return {name: _unflatten(flat[name], scores[name].shape[1], size) for name in scores if len(flat[name])}


def random_blocks(
    grids: Mapping[str, tuple[int, int]], size: Size, count: int, ranking: Ranking, seed: int
) -> dict[str, Blocks]:
    """`count` blocks drawn without replacement, from `seed` alone; `ranking` as in `top_blocks`."""
    generator = torch.Generator().manual_seed(seed)
    draws = {name: torch.rand(grids[name], generator=generator) for name in sorted(grids)}
    return top_blocks({name: draws[name] for name in grids}, size, count, ranking)


def diagonal_blocks(matrices: Mapping[str, Tensor], weights: float) -> dict[str, Blocks]:
    """The diagonal of an N x N grid over each matrix, about `weights` weights in all (arXiv 2506.03230)."""
    cells = max(1, round(sum(matrix.numel() for matrix in matrices.values()) / weights))
    out = {}
    for name, matrix in matrices.items():
        size = -(-matrix.shape[0] // cells), -(-matrix.shape[1] // cells)
        rows, columns = grid(matrix, size)
        out[name] = Blocks.of(size, torch.arange(min(rows, columns)).repeat(2, 1).t())
    return out


def _top(scores: Tensor, count: int) -> Tensor:
    return scores.cpu().sort(descending=True, stable=True).indices[:count]


def _shares(sizes: list[int], count: int) -> list[int]:
    """`count` split in proportion to `sizes`, by largest remainder."""
    exact = [count * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares


def _unflatten(flat: Tensor, columns: int, size: Size) -> Blocks:
    return Blocks.of(size, torch.stack([flat // columns, flat % columns], dim=1))


def read_choice(path: Path, matrices: Mapping[str, Tensor]) -> dict[str, Blocks]:
    """A choice of blocks from a run's checkpoint (.ckpt), or from a JSON file of the same form.

    The form is {name of the linear layer: {"size": [height, width], "index": [[row, column], ...]}}.

    Raises:
        BadInput: if the file is missing or malformed, or names a matrix or block that the model does not have.
    """
    try:
        raw = _choice_of_run(path) if path.suffix == ".ckpt" else json.loads(path.read_text())
        choice = {
            name: Blocks.of(
                (int(entry["size"][0]), int(entry["size"][1])), torch.as_tensor(entry["index"]).reshape(-1, 2)
            )
            for name, entry in raw.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise BadInput(
            f"no choice of blocks could be read from {path} ({error}); give gradient, random, diagonal, or a "
            f"file written by a run."
        ) from error
    for name, blocks in choice.items():
        if name not in matrices:
            raise BadInput(
                f"{path} chooses blocks of {name}, which is not among the {len(matrices)} target matrices; was "
                f"it made for another model?"
            )
        rows, columns = grid(matrices[name], blocks.size)
        if len(blocks.index) and not (
            int(blocks.index.min()) >= 0
            and int(blocks.index[:, 0].max()) < rows
            and int(blocks.index[:, 1].max()) < columns
        ):
            raise BadInput(
                f"{path} chooses a block outside the {rows} x {columns} blocks of {name}; was it made for "
                f"another model?"
            )
    return choice


def _choice_of_run(path: Path) -> dict[str, Any]:
    updates = read_checkpoint(path)["lit_sparse"]["updates"]
    return next(update["state"] for update in updates if update["class"] == "SMT")


class ScoreSheet:
    """Sums of block scores over the gradients of `weights`, each reduced and dropped as soon as it is complete.

    Attributes:
        sums: Contributions so far, by matrix, fp32 (rows, columns).
    """

    def __init__(self, weights: Mapping[str, tuple[nn.Parameter, bool]], size: Size, score: Score) -> None:
        self.size = size
        self.score: Score = score
        self.sums = {}
        self._hooks = []
        for name, (weight, transposed) in weights.items():
            shape = weight.t() if transposed else weight
            self.sums[name] = torch.zeros(grid(shape, size), device=weight.device)
            self._hooks.append(weight.register_post_accumulate_grad_hook(self._reducer(name, transposed)))

    def _reducer(self, name: str, transposed: bool):
        def reduce(weight: Tensor) -> None:
            gradient = weight.grad
            weight.grad = None
            assert gradient is not None  # a post-accumulate hook always has one
            self.sums[name] += block_scores(gradient.t() if transposed else gradient, self.size, self.score)

        return reduce

    def close(self) -> dict[str, Tensor]:
        """Take the hooks off, add the sums of all ranks, and return the scores.

        Raises:
            BadInput: if a gradient was not finite.
        """
        for hook in self._hooks:
            hook.remove()
        for name, sums in self.sums.items():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            if not sums.isfinite().all():
                raise BadInput(
                    f"the gradient of {name} is not finite on the scoring batches; check the data and the precision."
                )
        return {name: final_scores(sums, self.score) for name, sums in self.sums.items()}
