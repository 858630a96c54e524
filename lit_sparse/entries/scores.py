"""Scores of the entries of a weight, and the choice of the largest. All are of the weight as it is stored.

What is summed over batches is kept for candidates only, so that no score of all entries outlives the batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_sparse.anatomy import has_values
from lit_sparse.errors import BadInput
from lit_sparse.ranks import all_reduce_mean

CANDIDATES = 2
"""Candidates for each entry that is chosen: the largest gradients of the first batch (SpIEL's code keeps one)."""


def top_entries(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` largest of `scores` (any shape), sorted; int32. Ties go to the lower one.

    Other than those of `topk` the same on all devices: bf16 weights have many entries of one magnitude.

    Raises:
        BadInput: if a score is not finite.
    """
    flat = scores.flatten()
    finite = flat.isfinite().all()
    if has_values(flat) and not finite:
        raise BadInput("a score of an entry is not finite; check the base's weights, the data and the precision.")
    least = flat.topk(count, sorted=False).values.min()  # kthvalue copies all scores, with an index for each
    chosen = flat > least  # its sum would convert it to int64 on a CPU
    chosen.index_fill_(0, _first(flat == least, count - chosen.count_nonzero(), count), True)
    return torch.nonzero_static(chosen, size=count).squeeze(1).int()


def _first(mask: Tensor, number: Tensor, limit: int) -> Tensor:
    """Return the positions (limit,) of the first `number` true values of `mask`, of which one at least; then repeated.

    The size does not depend on values, so that a planned training takes what a real one does.
    """
    places = torch.nonzero_static(mask, size=limit).squeeze(1)
    beyond = torch.arange(limit, dtype=torch.int32, device=mask.device) >= number
    return places.masked_fill_(beyond, places[0].clone())


def random_scores(shape: torch.Size, seed: int, step: int, name: str) -> Tensor:
    """Return uniform scores of the matrix `name` that depend on the arguments only, on the CPU."""
    key = zlib.crc32(f"{seed} {step} {name}".encode())
    return torch.rand(shape, generator=torch.Generator().manual_seed(key))


class GradientSums:
    """Sums over optimizer steps of the gradient of one weight, for its candidates: the largest in the first batch.

    A weight that no token reaches has no gradient: its candidates are the first entries, with sums of 0.

    Args:
        count: Number of candidates, C.
        device: Where they are kept.

    Attributes:
        candidates: Their positions, (C,) int32, sorted; once a batch was added.
        sums, squares: Sums over `steps` steps of a step's gradient, and of its square, (C,) fp32; means over ranks.
        window: What was added since the last step, (C,) fp32.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.steps, self._empty = 0, True
        self.candidates = torch.arange(count, dtype=torch.int32, device=device)
        self.sums, self.squares, self.window = (torch.zeros(count, device=device) for _ in range(3))

    def add(self, gradient: Tensor) -> None:
        """Add the gradient (m, n) of one batch. Every rank must call it, in the same order of weights."""
        if self._empty:
            whole = all_reduce_mean(gradient.to(torch.float32, copy=True))
            # That of a loss that is not finite is told from others by `best`, unless `skip` drops it before.
            self.candidates.copy_(top_entries(whole.abs().nan_to_num_(), len(self.candidates)))
            self.window += whole.flatten().index_select(0, self.candidates)
            self._empty = False
        else:
            self.window += all_reduce_mean(gradient.flatten().index_select(0, self.candidates).float())

    def scale(self, factor: Tensor) -> None:
        """Multiply by `factor` what was added since the last step."""
        self.window *= factor

    def end_step(self) -> None:
        """Take what was added since the last step as the gradient of one step."""
        if self._empty:
            return
        self.sums += self.window
        self.squares += self.window.square()
        self.window.zero_()
        self.steps += 1

    def skip(self) -> None:
        """Drop what was added since the last step, and the candidates that it chose."""
        self.window.zero_()
        self._empty = self._empty or not self.steps

    def best(self, count: int, pool: Tensor | None = None) -> Tensor:
        """Return the positions, sorted, of the `count` candidates with the largest |sums|; among those in `pool` (C,).

        Args:
            pool: Which candidates count, bool; None is all.
        """
        scores = self.sums.abs() if pool is None else self.sums.abs().where(pool, -1.0)
        return self.candidates[top_entries(scores, count)]

    def moments(self, index: Tensor, betas: tuple[float, float], step: float) -> tuple[Tensor, Tensor]:
        """Return Adam's moments of the entries `index` (N,) as if each step had had their mean gradient, (N,) each.

        With these, bias corrections of a count of `step` steps give updates of the usual size (as SpIEL's code does).
        """
        place = torch.searchsorted(self.candidates, index)
        mean, square = (sums[place] / max(1, self.steps) for sums in (self.sums, self.squares))
        return mean * (1 - betas[0] ** step), square * (1 - betas[1] ** step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps, which `load` takes."""
        names = ("candidates", "sums", "squares", "steps")
        return {} if self._empty else {name: getattr(self, name) for name in names}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from the `state_dict` of another, if it has one."""
        if "candidates" in state:
            self.candidates, self.sums, self.squares = (
                state[name].to(device) for name in ("candidates", "sums", "squares")
            )
            self.steps, self._empty = state["steps"], False


class InputNorms:
    """Sums of the squares of each input of a linear layer, for the score |weight| times norm of the input (Wanda).

    Attributes:
        squares: Sums over the batches, (K,) fp32; None before the first step.
        window: What was added since the last step, likewise.
    """

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.window: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add the inputs (..., K) of one batch."""
        squares = x.detach().flatten(0, -2).float().square().sum(0)
        self.window = squares if self.window is None else self.window + squares

    def end_step(self) -> None:
        """Take what was added as one step's. Every rank must call it, in the same order of weights."""
        if self.window is not None:
            window, self.window = all_reduce_mean(self.window), None
            self.squares = window if self.squares is None else self.squares + window

    def skip(self) -> None:
        """Drop what was added since the last step."""
        self.window = None

    @property
    def steps(self) -> int:
        """0 if no step's inputs were seen."""
        return int(self.squares is not None)

    def scores(self, weight: Tensor, transposed: bool) -> Tensor:
        """Return the scores of `weight`, (out, in) or (in, out) if `transposed`, in fp32 of its shape."""
        sides = weight.shape[0] if transposed else weight.shape[1]
        norms = weight.new_zeros(sides) if self.squares is None else self.squares.sqrt()  # zeros: no token reached it
        return weight.float().abs() * (norms[:, None] if transposed else norms)

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps, which `load` takes."""
        return {} if self.squares is None else {"inputs": self.squares}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from the `state_dict` of another, if it has one."""
        if "inputs" in state:
            self.squares = state["inputs"].to(device)
