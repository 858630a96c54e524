"""Which blocks of weight matrices are trained: the best-scored, random ones, a diagonal, or a contiguous slab."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_sparse.blocks.grid import Blocks, Size, grid
from lit_sparse.errors import BadInput

Score = Literal["abs_mean", "mean_abs", "l2"]
Ranking = Literal["global", "per_matrix"]


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


def random_scores(grids: Mapping[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """Scores that make `top_blocks` a draw without replacement, from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    draws = {name: torch.rand(grids[name], generator=generator) for name in sorted(grids)}
    return {name: draws[name] for name in grids}


def diagonal_blocks(matrices: Mapping[str, Tensor], weights: float) -> dict[str, Blocks]:
    """The diagonal of an N x N grid over each matrix, about `weights` weights in all (arXiv 2506.03230).

    Sides are rounded (`_side`), so the grid may have a row or a column more than the other side: the diagonal then goes
    on from the first one, and covers every row and column all the same.
    """
    cells = max(1, round(sum(matrix.numel() for matrix in matrices.values()) / weights))
    out = {}
    for name, matrix in matrices.items():
        size = _side(matrix.shape[0], matrix.shape[0] / cells), _side(matrix.shape[1], matrix.shape[1] / cells)
        rows, columns = grid(matrix, size)
        steps = torch.arange(max(rows, columns))
        out[name] = Blocks.of(size, torch.stack([steps % rows, steps % columns], dim=1))
    return out


def slab_blocks(
    matrices: Mapping[str, Tensor], by_columns: Sequence[str], weights: float, seed: int
) -> dict[str, Blocks]:
    """One contiguous band of each matrix, the same share of all, about `weights` weights in all.

    A band of output rows, or of input columns for the matrices named in `by_columns`; where it lies is drawn from
    `seed`. The choice of S2FT (arXiv 2412.06289), without its coupling of one layer's matrices to each other.
    """
    generator = torch.Generator().manual_seed(seed)
    share = min(1.0, weights / sum(matrix.numel() for matrix in matrices.values()))
    out = {}
    for name in sorted(matrices):
        rows, columns = matrices[name].shape
        side = columns if name in by_columns else rows
        thickness = _side(side, share * side)
        place = int(torch.randint(max(1, side // thickness), (), generator=generator))
        size, index = ((rows, thickness), (0, place)) if name in by_columns else ((thickness, columns), (place, 0))
        out[name] = Blocks.of(size, torch.tensor([index]))
    return {name: out[name] for name in matrices}


def within_columns(scores: Mapping[str, Tensor], groups: Sequence[Sequence[str]], share: float) -> dict[str, Tensor]:
    """`scores` with minus infinity outside of the best `share` of each group's block columns.

    The matrices of a group read one input, so that their columns are packed and kept for the backward together: a
    column's score is its sum over all of them.
    """
    out = dict(scores)
    for group in groups:
        names = [name for name in group if name in scores]
        if not names:
            continue
        columns = torch.stack([scores[name].cpu().sum(0) for name in names]).sum(0)
        best = _top(columns, max(1, round(share * len(columns))))
        barred = torch.ones(len(columns), dtype=torch.bool).index_fill_(0, best, False)
        for name in names:
            out[name] = scores[name].cpu().masked_fill(barred, -torch.inf)
    return out


def _side(whole: int, wanted: float) -> int:
    """A block's side of about `wanted`, a multiple of 16 from 16 on, and at most `whole`.

    A side of 205 makes the kernels load two bytes at a time and spill registers; 208 loads sixteen and does not.
    """
    rounded = 16 * round(wanted / 16) if wanted >= 16 else max(1, math.ceil(wanted))
    return min(whole, rounded)


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


class ScoreSheet:
    """Sums of block scores over gradients, each reduced as soon as it is complete.

    Args:
        matrices: The matrices as (out, in); only their shapes are read.
        size: Of the blocks.
        score: What is summed.
        device: Where it is summed.

    Attributes:
        sums: Contributions so far, by matrix, fp32 (rows, columns).
    """

    def __init__(
        self, matrices: Mapping[str, Tensor], size: Size, score: Score, device: torch.device | None = None
    ) -> None:
        self.size = size
        self.score: Score = score
        self.sums = {name: torch.zeros(grid(matrix, size), device=device) for name, matrix in matrices.items()}
        self._hooks: list[Any] = []

    def add(self, name: str, gradient: Tensor) -> None:
        """One more gradient (out, in) of a matrix."""
        self.sums[name] += block_scores(gradient, self.size, self.score)

    def watch_weight(self, name: str, weight: nn.Parameter, transposed: bool, keep: bool) -> None:
        """Add each gradient that autograd completes, and drop it at once unless an optimizer is to have it."""

        def reduce(weight: Tensor) -> None:
            gradient = weight.grad
            assert gradient is not None  # a post-accumulate hook always has one
            self.add(name, gradient.t() if transposed else gradient)
            weight.grad = gradient if keep else None

        self._hooks.append(weight.register_post_accumulate_grad_hook(reduce))

    def watch_layer(self, name: str, layer: nn.Module) -> None:
        """Add the gradients that the layer's weight would have, where the weight itself can have none."""

        def watch(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # a forward without a graph
                return
            x = args[0].detach()
            output.register_hook(lambda dy: self.add(name, dy.flatten(0, -2).t() @ x.flatten(0, -2).to(dy.dtype)))

        self._hooks.append(layer.register_forward_hook(watch))

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
