"""The directions along which losses are measured: what is random about them, and what is known of them.

A direction z is a function of the seed (of a step and a query) and the place of an element; see
`lit_sparse_kernels.philox`. E[z z^T] is the identity, but for `Cone`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_sparse.errors import BadInput
from lit_sparse.optim import local_shard
from lit_sparse.zeroth_order.perturbed import CHUNK, Place, Rows
from lit_sparse_kernels import add_noise, momentum_noise
from lit_sparse_kernels.add_noise import Term
from lit_sparse_kernels.philox import LEFT, RIGHT, Kind, row_noise, step_seed


@dataclass(frozen=True, eq=False)
class Part:
    """A trainable parameter, or this rank's shard of it.

    Attributes:
        tensor: What is here, contiguous.
        place: The parameter's.
        row: Place of its first row in the full parameter.
        state: The parameter's optimizer state.
        keep: Factor of its value in the update: 1 - lr x weight decay.
    """

    tensor: Tensor
    place: Place
    row: int
    state: dict[str, Any]
    keep: float = 1.0

    @property
    def first(self) -> int:
        """The place of its first element in the full parameter."""
        return self.row * self.place.width

    @property
    def rows(self) -> slice:
        """Its rows in the full parameter."""
        return slice(self.row, self.row + (len(self.tensor) if self.tensor.ndim else 1))


def by_rows(part: Part) -> Iterator[Part]:
    """Yield a part some rows at a time, so that what is computed of it is no copy of an embedding."""
    if not part.tensor.ndim:
        yield part
        return
    step = max(1, CHUNK.get(part.tensor.device.type, CHUNK["cuda"]) // max(1, part.place.width))
    for start in range(0, len(part.tensor), step):
        rows = slice(start, start + step)
        state = {name: local_shard(value)[rows] for name, value in part.state.items()}
        yield replace(part, tensor=part.tensor[rows], row=part.row + start, state=state)


class Direction(ABC):
    """A way to draw directions."""

    supports_sharding: bool = True
    """True if a shard can be moved without the others."""
    supports_momentum: bool = False
    """True if `move` can average over steps."""
    supports_queries: bool = True
    """True if a step may have several."""
    needs_mean: bool = False
    """True if the direction itself follows the mean of past steps, the state `momentum`."""

    def begin(self, step: int, master: int, parts: Sequence[Part]) -> None:
        """Prepare for a step (from 1), before its first loss."""

    @abstractmethod
    def perturb(self, weight: Tensor, place: Place, rows: Rows, seed: int, scale: float) -> Tensor:
        """Return `weight`, which are these rows of the parameter, plus `scale` times the direction, in its dtype."""

    @abstractmethod
    def move(self, parts: Sequence[Part], terms: Sequence[Term], lr: float, momentum: float) -> None:
        """Take the step p = keep p - lr g in place, for g the sum of the terms' multiples of their directions.

        Args:
            parts: All that trains here.
            terms: Seeds and multiples, at least one.
            lr: Learning rate.
            momentum: Decay of a mean m = momentum m + (1 - momentum) g that takes the place of g; 0: none.
        """


@dataclass
class Dense(Direction):
    """An independent number for each weight (MeZO's).

    Args:
        kind: `rademacher` (signs: the same to the bit on every device, and a small share of the time on a CPU) or
            `gaussian` (the paper's).
    """

    kind: Kind = "rademacher"
    supports_momentum = True

    def perturb(self, weight: Tensor, place: Place, rows: Rows, seed: int, scale: float) -> Tensor:
        if isinstance(rows, slice):
            piece = add_noise.Piece(torch.empty_like(weight), weight, place.number, rows.start * place.width)
            add_noise.add_noise([piece], [Term(seed, scale)], kind=self.kind)
            return piece.out
        return weight.add(row_noise(rows, place.width, seed, place.number, kind=self.kind).mul_(scale)).to(weight.dtype)

    def move(self, parts: Sequence[Part], terms: Sequence[Term], lr: float, momentum: float) -> None:
        for keep, alike in _by_keep(parts).items():
            if momentum:
                scaled = [Term(seed, (1 - momentum) * scale) for seed, scale in terms]
                step = momentum_noise.Rule(lr, momentum, keep)
                momentum_noise.momentum_noise([_moment_piece(p) for p in alike], scaled, step, self.kind, True)
            else:
                scaled = [Term(seed, -lr * scale) for seed, scale in terms]
                pieces = [add_noise.Piece(p.tensor, p.tensor, p.place.number, p.first) for p in alike]
                add_noise.add_noise(pieces, scaled, keep, self.kind, stochastic=True)


def _by_keep(parts: Sequence[Part]) -> dict[float, list[Part]]:
    found: dict[float, list[Part]] = {}
    for part in parts:
        found.setdefault(part.keep, []).append(part)
    return found


def _moment_piece(part: Part) -> momentum_noise.Piece:
    return momentum_noise.Piece(part.tensor, _moment(part), None, 1.0, part.place.number, part.first)


def _moment(part: Part) -> Tensor:
    return local_shard(part.state["momentum"])


@dataclass
class LowRank(Direction):
    """Products U V^T of few columns for matrices, V kept for some steps (LOZO, arXiv 2410.07698); dense for vectors.

    The perturbation is eps U V^T and the update -lr c U V^T / rank, as in the paper; the authors' code leaves out the
    division, and in one step of every `period` it updates along another U than it measured.

    Args:
        rank: Columns of U and V (the paper's r).
        period: Steps for which V is kept (the paper's nu).
    """

    rank: int = 2
    period: int = 50
    _seed: int = field(default=0, init=False, repr=False)  # of V

    def __post_init__(self) -> None:
        for name in ("rank", "period"):
            if getattr(self, name) < 1:
                raise BadInput(f"LowRank: {name} is {getattr(self, name)}; it must be at least 1.")
        self._dense = Dense("gaussian")

    def begin(self, step: int, master: int, parts: Sequence[Part]) -> None:
        self._seed = step_seed(master, (step - 1) // self.period * self.period + 1)

    def _left(self, place: Place, rows: Rows, seed: int, device: torch.device) -> Tensor:
        at = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        return row_noise(at, self.rank, seed, place.number, LEFT, "gaussian")

    def _right(self, place: Place, device: torch.device) -> Tensor:
        at = torch.arange(place.width, device=device)
        return row_noise(at, self.rank, self._seed, place.number, RIGHT, "gaussian")

    def perturb(self, weight: Tensor, place: Place, rows: Rows, seed: int, scale: float) -> Tensor:
        if len(place.shape) != 2:
            return self._dense.perturb(weight, place, rows, seed, scale)
        left, right = self._left(place, rows, seed, weight.device), self._right(place, weight.device)
        return torch.addmm(weight.float(), left, right.t(), alpha=scale).to(weight.dtype)

    def move(self, parts: Sequence[Part], terms: Sequence[Term], lr: float, momentum: float) -> None:
        self._dense.move([part for part in parts if len(part.place.shape) != 2], terms, lr, 0.0)
        for part in (part for part in parts if len(part.place.shape) == 2):
            right = self._right(part.place, part.tensor.device)
            for piece in by_rows(part):
                left = torch.zeros(len(piece.tensor), self.rank, device=right.device)
                for seed, scale in terms:
                    left.add_(self._left(piece.place, piece.rows, seed, left.device), alpha=scale / self.rank)
                moved = piece.tensor.float() * piece.keep - lr * (left @ right.t())
                piece.tensor.copy_(round_to(moved, piece, terms[0].seed))


@dataclass
class Cone(Direction):
    """Directions near the mean of past steps (ConMeZO, AISTATS 2026).

    z = sqrt(d) cos(angle) m / |m| + sin(angle) u, with u a sign for each weight (the paper has Gaussian u), and
    m = decay m + (1 - decay) c z. The authors warm `decay` up from 0.1, and predict |m|, which is measured here.

    Args:
        angle: Half of the cone's opening, in radians; pi / 2 is MeZO.
        decay: Decay of the mean.
        warmup: Steps over which `decay` rises from 0.1.
    """

    angle: float = 1.35
    decay: float = 0.95
    warmup: int = 200
    supports_sharding = False
    supports_queries = False
    needs_mean = True
    _along: float = field(default=0.0, init=False, repr=False)  # sqrt(d) cos(angle) / |m|
    _decay: float = field(default=0.0, init=False, repr=False)
    _moments: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # by number of the parameter

    def __post_init__(self) -> None:
        if not (0 < self.angle <= math.pi / 2 and 0 <= self.decay < 1 and self.warmup >= 0):
            raise BadInput(
                f"Cone: angle is {self.angle}, decay {self.decay} and warmup {self.warmup}; angle must be above 0 and "
                "at most pi / 2, decay from 0 to below 1, and warmup not negative."
            )
        self._dense = Dense("rademacher")

    def begin(self, step: int, master: int, parts: Sequence[Part]) -> None:
        self._moments = {part.place.number: _moment(part) for part in parts}
        squares = [torch.linalg.vector_norm(moment).square() for moment in self._moments.values()]
        norm, size = float(torch.stack(squares).sum().sqrt()), sum(m.numel() for m in self._moments.values())
        self._along = math.sqrt(size) * math.cos(self.angle) / norm if norm else 0.0
        risen = min(1.0, (step - 1) / self.warmup) if self.warmup else 1.0
        self._decay = min(self.decay, 0.1 + (self.decay - 0.1) * risen)

    @property
    def _across(self) -> float:
        return math.sin(self.angle) if self._along else 1.0

    def perturb(self, weight: Tensor, place: Place, rows: Rows, seed: int, scale: float) -> Tensor:
        out = self._dense.perturb(weight.float(), place, rows, seed, scale * self._across)
        if self._along:
            out.add_(self._moments[place.number][rows], alpha=scale * self._along)
        return out.to(weight.dtype)

    def move(self, parts: Sequence[Part], terms: Sequence[Term], lr: float, momentum: float) -> None:
        ((seed, slope),) = terms
        for part in (piece for whole in parts for piece in by_rows(whole)):
            piece = _moment_piece(part)
            before = piece.momentum.clone()
            rule = momentum_noise.Rule(lr * slope, self._along, part.keep)  # the mean becomes z
            momentum_noise.momentum_noise([piece], [Term(seed, self._across)], rule, "rademacher", True)
            piece.momentum.mul_((1 - self._decay) * slope).add_(before, alpha=self._decay)
        self._moments = {}


def round_to(value: Tensor, part: Part, seed: int) -> Tensor:
    """Return fp32 values of a part in its dtype, stochastically rounded to bf16."""
    if part.tensor.dtype != torch.bfloat16:
        return value.to(part.tensor.dtype)
    return add_noise.rounded(value, part.place.number, part.first, seed)


DIRECTIONS: dict[str, Any] = {
    "rademacher": Dense,
    "gaussian": lambda: Dense("gaussian"),
    "low_rank": LowRank,
    "cone": Cone,
}
"""Directions by the names that they have in YAML."""


def direction_of(name: str) -> Direction:
    """Return a new direction with that name in YAML, with default settings.

    Raises:
        BadInput: if there is none of that name.
    """
    if name not in DIRECTIONS:
        raise BadInput(f"MeZO: direction is {name!r}; give one of {', '.join(DIRECTIONS)}.")
    return DIRECTIONS[name]()
