"""Select blocks of weight matrices: those with the best scores, random ones, a diagonal, or a contiguous slab."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lit_sparse.anatomy import Experts, has_values, role
from lit_sparse.blocks.coupled import BY_COLUMNS, coupled_blocks
from lit_sparse.blocks.grid import Blocks, Size, grid
from lit_sparse.errors import BadInput
from lit_sparse.optim import part_of

BY_SHAPE = ("diagonal", "slab", "coupled")
"""Kinds of blocks that follow from the shapes of the matrices, and of which the share of weights is the number."""
Score = Literal["abs_mean", "mean_abs", "l2"]
Ranking = Literal["global", "per_matrix"]


def block_scores(gradient: Tensor, size: Size, score: Score) -> Tensor:
    """Return the contribution of one gradient (out, in) to the scores of its blocks, (rows, columns) fp32.

    Contributions of several gradients are added up, then passed to `final_scores`: so `mean_abs` gives signed means
    here, and `l2` sums of squares. Means are over the weights that a ragged block has. Of a DTensor the contributions
    are those of this rank's part, and add up over ranks.
    """
    (rows, columns), (height, width) = grid(gradient, size), size
    part = part_of(gradient)
    (top, left), (high, wide) = part.start, part.values.shape
    values = part.values.float()
    values = {"abs_mean": values.abs, "mean_abs": values.clone, "l2": values.square}[score]()
    # A part may begin and end within blocks, of which other ranks have the rest.
    padded = pad(values, (left % width, -(left + wide) % width, top % height, -(top + high) % height))
    here = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width).sum((1, 3))
    sums = here.new_zeros(rows, columns)
    sums[top // height :][: here.shape[0], left // width :][:, : here.shape[1]] = here
    if score == "l2":
        return sums
    heights = torch.full((rows, 1), size[0], device=sums.device)
    widths = torch.full((1, columns), size[1], device=sums.device)
    heights[-1], widths[:, -1] = gradient.shape[0] - (rows - 1) * size[0], gradient.shape[1] - (columns - 1) * size[1]
    return sums / (heights * widths)


def final_scores(sums: Tensor, score: Score) -> Tensor:
    """Return the scores from summed contributions."""
    return {"abs_mean": sums, "mean_abs": sums.abs(), "l2": sums.sqrt()}[score]


def top_blocks(scores: Mapping[str, Tensor], size: Size, count: int, ranking: Ranking) -> dict[str, Blocks]:
    """Return the `count` blocks with the best scores, by matrix.

    With ranking `per_matrix`, each matrix gets blocks in proportion to its number of blocks. Ties go to the lower name,
    row and column, so that the selection does not depend on the order of the matrices.
    """
    names = sorted(scores)
    if ranking == "global":
        chosen = _top(torch.cat([scores[name].flatten() for name in names]), count)
        ends = torch.tensor([0, *(scores[name].numel() for name in names)]).cumsum(0)
        flat = {
            name: chosen[(chosen >= a) & (chosen < b)] - a for name, a, b in zip(names, ends, ends[1:], strict=False)
        }
    else:
        parts = shares([scores[name].numel() for name in names], count)
        flat = {name: _top(scores[name].flatten(), part) for name, part in zip(names, parts, strict=True)}
    return {name: _unflatten(flat[name], scores[name].shape[1], size) for name in scores if len(flat[name])}


def random_scores(grids: Mapping[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """Return uniform random scores, with which `top_blocks` draws without replacement. They depend on `seed` only."""
    generator = torch.Generator().manual_seed(seed)
    # Drawn by sorted name, so that the order of the model's modules does not matter.
    draws = {name: torch.rand(grids[name], generator=generator) for name in sorted(grids)}
    return {name: draws[name] for name in grids}


def blocks_by_shape(
    kind: str, matrices: Mapping[str, Tensor], weights: float, seed: int, config: Any
) -> dict[str, Blocks]:
    """Return the blocks of a kind among `BY_SHAPE`, about `weights` weights in all.

    Args:
        config: The model's configuration, which has its heads.
    """
    if kind == "diagonal":
        return diagonal_blocks(matrices, weights)
    if kind == "coupled":
        return coupled_blocks(matrices, config.get_text_config(), weights, seed)
    return slab_blocks(matrices, [name for name in matrices if role(name) in BY_COLUMNS], weights, seed)


def diagonal_blocks(matrices: Mapping[str, Tensor], weights: float) -> dict[str, Blocks]:
    """Return the diagonal of an N x N grid over each matrix, with about `weights` weights in all (arXiv 2506.03230).

    N is the number of weights divided by `weights`. Block sides are rounded (`_side`), so the grid may not be square:
    the diagonal then wraps around, and still covers every row and column.
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
    """Return one contiguous band of each matrix, of the same share, with about `weights` weights in all.

    The band has output rows, or input columns for the matrices named in `by_columns`; its position is drawn from
    `seed`. This is the selection of S2FT (arXiv 2412.06289) without the coupling between matrices of a layer.
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
    """Return `scores` with minus infinity outside the best `share` of each group's block columns.

    The matrices of a group read the same input, whose columns are packed and saved for backward once for all of them.
    So a column is scored by the sum over all matrices of its group.
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
    """Return a block side of about `wanted`, at most `whole`; from 16 on it is a multiple of 16.

    Alignment matters: with a side of 205 the kernels load two bytes at a time and spill registers; with 208 they load
    sixteen and do not.
    """
    rounded = 16 * round(wanted / 16) if wanted >= 16 else max(1, math.ceil(wanted))
    return min(whole, rounded)


def _top(scores: Tensor, count: int) -> Tensor:
    # A stable sort on the CPU: topk may break ties differently on each device, and ranks would disagree.
    return scores.cpu().sort(descending=True, stable=True).indices[:count]


def shares(sizes: list[int], count: int) -> list[int]:
    """Split `count` in proportion to `sizes`, by largest remainder."""
    exact = [count * size / sum(sizes) for size in sizes]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts


def _unflatten(flat: Tensor, columns: int, size: Size) -> Blocks:
    return Blocks.of(size, torch.stack([flat // columns, flat % columns], dim=1))


class _Watched(torch.autograd.Function):
    """Pass `y` on, and give dy^T x to `add` in the backward pass. Saved as autograd does, `x` can be recomputed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, add: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        # Not view: autograd forbids to change a view that a Function returns in place, as Falcon does.
        return torch.ops.aten._unsafe_view.default(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        ctx.add(dy.flatten(0, -2).t() @ x.flatten(0, -2).to(dy.dtype))
        return dy, None, None


class ScoreSheet:
    """Add up block scores over gradients. Each gradient is reduced to scores as soon as it is complete.

    Args:
        matrices: The matrices (out, in), by name; only their shapes are read.
        size: Block size.
        score: Kind of score.
        device: Device of the sums.

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
        """Add the scores of a gradient (out, in) of the matrix `name`."""
        sums = self.sums[name]
        sums += block_scores(gradient, self.size, self.score).to(sums.device)

    def watch_weight(self, name: str, weight: nn.Parameter, transposed: bool, keep: bool) -> None:
        """Add each gradient of `weight` once autograd completes it; then free it, unless `keep` (for an optimizer)."""
        self._watch(weight, lambda gradient: {name: gradient.t() if transposed else gradient}, keep)

    def watch_experts(self, name: str, tensor: Experts, keep: bool) -> None:
        """Add each expert's part of the gradients of fused experts, as `watch_weight` does."""
        names = [f"{name}[{number}]" for number in range(len(tensor.parameter))]
        self._watch(tensor.parameter, lambda g: dict(zip(names, g.mT if tensor.transposed else g, strict=True)), keep)

    def _watch(self, weight: nn.Parameter, parts: Callable[[Tensor], dict[str, Tensor]], keep: bool) -> None:
        def reduce(weight: Tensor) -> None:
            gradient = weight.grad
            assert gradient is not None  # a post-accumulate hook always has one
            for name, part in parts(gradient).items():
                self.add(name, part)
            weight.grad = gradient if keep else None

        self._hooks.append(weight.register_post_accumulate_grad_hook(reduce))

    def watch_layer(self, name: str, layer: nn.Module) -> None:
        """Add the gradients that the layer's weight would have: dy^T x, for weights that cannot require grad."""

        def watch(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return _Watched.apply(output, args[0].detach(), partial(self.add, name))  # pyright: ignore

        self._hooks.append(layer.register_forward_hook(watch))

    def close(self) -> dict[str, Tensor]:
        """Remove the hooks, reduce the sums over ranks, and return the scores. Every rank must call it.

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
        if not all(map(has_values, self.sums.values())):  # a planned training: any blocks have about the same cost
            return random_scores({name: (len(sums), sums.shape[1]) for name, sums in self.sums.items()}, seed=0)
        return {name: final_scores(sums, self.score) for name, sums in self.sums.items()}
