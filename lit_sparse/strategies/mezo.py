"""MeZO: train with forward passes only, in the memory of inference.

arXiv 2305.17333 (SPSA, Spall 1992). With z a random direction, which is made from a seed whenever it is needed:

    c = (L(w + eps z) - L(w - eps z)) / (2 eps)
    w <- w - lr (c z + weight_decay w)

Published: the step, `queries` (n directions and their mean), the options of PEFT, and objectives without a gradient.
Stacked on LISA with `interval: 1` it is LeZO (arXiv 2410.09823). With `sides: one` and `scale: deviation` it is FZOO
(arXiv 2506.09034), whose N probes are divided by the deviation of their losses; with `direction: low_rank` LOZO (arXiv
2410.07698), with `cone` ConMeZO (AISTATS 2026).

Choices of ours:

- The weights are never perturbed in place (`lit_sparse.zeroth_order.perturbed`): in the published code, bf16 weights
  lose half their norm to rounding in 20,000 steps, and a step moves 37 times the weights' bytes; here it is at most 6.
- Noise is a function of seed, parameter and place, the same on any number of ranks, and Rademacher noise (signs) on
  any device: so it is the default. Its estimates have a variance of d instead of d + 2.
- bf16 weights stay in bf16, and the update is rounded stochastically; to nearest, it would be lost.
- Dropout stays on, as elsewhere here, with the same masks in all forward passes of a step; the published code turns it
  off.
- `momentum` is a mean, m = momentum m + (1 - momentum) c z, so that a learning rate means the same with and without.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_sparse.errors import BadInput
from lit_sparse.strategies.base import Need, UpdateStrategy
from lit_sparse.strategies.forward_only import (
    MEASURING,
    ForwardOnlyMethod,
    check_above_zero,
    check_at_least,
    check_one_of,
)
from lit_sparse.zeroth_order.directions import Direction, Part, direction_of
from lit_sparse.zeroth_order.optimizer import Losses
from lit_sparse.zeroth_order.perturbed import Make
from lit_sparse_kernels.add_noise import Term
from lit_sparse_kernels.philox import step_seed


@dataclasses.dataclass
class MeZO(ForwardOnlyMethod, UpdateStrategy):
    """Train with forward passes only, in the memory of inference (MeZO, arXiv 2305.17333).

    It trains whatever the stacked method makes trainable; all weights if used alone.

    Args:
        epsilon: Length of the perturbation of a weight.
        queries: Directions a step, of which the mean is taken (the paper's n).
        sides: `two`: losses on both sides of the weights, two forward passes a query. `one`: on one side, and one more
            pass at the weights themselves.
        scale: `epsilon`: differences of losses are divided by the distance. `deviation`: by the standard deviation of
            the queries' losses, of which there must be two or more (FZOO).
        direction: `rademacher` (signs), `gaussian` (the paper's), `low_rank` (LOZO), `cone` (ConMeZO), or one of
            lit_sparse.zeroth_order.directions with its settings.
        momentum: Decay of a mean of steps; 0 is none, and needs no memory.
        weight_decay: Decoupled weight decay of matrices.
        objective: What is minimized: the `loss`; `accuracy`, of tokens or classes, as its distance from 1; or a metric
            of torchmetrics over the labels and the likeliest classes or tokens, such as torchmetrics.F1Score. They need
            no gradient, but batches large enough that the number moves. In a loop of your own it is what your loss
            function returns.
        micro_batch: Rows of a forward pass; null is the whole batch. Losses are of the whole batch in any case.
        probes_at_once: Losses that one forward pass computes, on so many copies of the rows; above 1 it saves time on
            an adapter, and takes so many times inference's memory for activations.
        max_skipped: Steps in a row that may be skipped since a loss is not finite, before the run ends.
        seed: Seed of the directions.
    """

    epsilon: float = 1e-3
    queries: int = 1
    sides: Literal["two", "one"] = "two"
    scale: Literal["epsilon", "deviation"] = "epsilon"
    direction: str | Direction = "rademacher"
    momentum: float = 0.0
    weight_decay: float = 0.0
    objective: str | Metric = "loss"
    micro_batch: int | None = None
    probes_at_once: int = 1
    max_skipped: int = 10
    seed: int = 0

    probing: ClassVar[frozenset[str]] = MEASURING | {"sides", "scale", "objective"}

    def __post_init__(self) -> None:
        least = {"queries": 1, "max_skipped": 0, "weight_decay": 0, "micro_batch": 1, "probes_at_once": 1}
        check_at_least(self, least)
        check_above_zero(self, "epsilon")
        check_one_of(self, {"sides": ("two", "one"), "scale": ("epsilon", "deviation")})
        if not 0 <= self.momentum < 1:
            raise BadInput(f"MeZO: momentum is {self.momentum}; it must be from 0 to below 1.")
        check_objective(self.objective)
        if self.probes_at_once > 1 and (isinstance(self.objective, Metric) or self.objective != "loss"):
            raise BadInput(
                f"MeZO: probes_at_once is {self.probes_at_once}, but only losses are computed together; set it to 1, "
                "or objective to loss."
            )
        self._direction = direction_of(self.direction) if isinstance(self.direction, str) else self.direction
        name = type(self._direction).__name__
        if self.scale == "deviation" and (self.sides, self.queries > 1) != ("one", True):
            raise BadInput(
                f"MeZO: scale is deviation, with sides {self.sides} and queries {self.queries}; it divides by the "
                "deviation of losses on one side, so set sides to one and queries to 2 or more."
            )
        if self.momentum and not self._direction.supports_momentum:
            raise BadInput(f"MeZO: momentum is {self.momentum}, which {name} directions do not have; leave it out.")
        if self.queries > 1 and not self._direction.supports_queries:
            raise BadInput(f"MeZO: queries is {self.queries}, but {name} directions take one a step; set it to 1.")
        self._prepare()

    @property
    def supports_sharding(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._direction.supports_sharding

    @property
    def unsharded_reason(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{type(self._direction).__name__} directions need all of the weights' past steps on each rank"

    @property
    def _fields(self) -> list[str]:
        return ["momentum"] if self.momentum or self._direction.needs_mean else []

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A mean of steps follows the same weights throughout: LISA would drop it whenever it draws others."""
        return frozenset({"fixed_set"} if self._fields else ())

    # ---- a step

    @property
    def _count(self) -> int:
        return self.queries

    @property
    def _seeds(self) -> list[int]:
        return [step_seed(self.seed, self._step, query) for query in range(self.queries)]

    def _begin(self, parts: Sequence[Part]) -> None:
        self._direction.begin(self._step, self.seed, parts)

    def _measure(self, losses: Losses) -> tuple[list[float], Tensor]:
        """Return the loss's slope along each direction, and the mean loss of both sides, or that at the weights."""

        def beside(seed: int, scale: float) -> Make:
            return lambda weight, place, rows: self._direction.perturb(weight, place, rows, seed, scale)

        if self.sides == "two":
            found = losses.of([beside(seed, sign * self.epsilon) for seed in self._seeds for sign in (1, -1)])
            numbers = [float(loss) for loss in found]
            pairs = zip(numbers[::2], numbers[1::2], strict=True)
            return [(above - below) / (2 * self.epsilon) for above, below in pairs], torch.stack(found).mean()
        here, *others = losses.of([None, *(beside(seed, self.epsilon) for seed in self._seeds)])
        level, numbers = float(here), [float(loss) for loss in others]
        spread = self.epsilon if self.scale == "epsilon" else deviation(numbers)
        return [(number - level) / spread if spread else 0.0 for number in numbers], here

    def _move(self, parts: Sequence[Part], numbers: Sequence[float], lr: float) -> None:
        terms = [Term(seed, slope / self.queries) for seed, slope in zip(self._seeds, numbers, strict=True)]
        self._direction.move(parts, terms, lr, self.momentum)

    def _to_show(self, numbers: Sequence[float]) -> dict[str, float]:
        return {"slope": sum(map(abs, numbers)) / len(numbers)}

    def describe(self) -> dict[str, Any]:
        """Return the forward passes of a step, and how many steps were skipped."""
        forwards = 2 * self.queries if self.sides == "two" else self.queries + 1
        return {"forwards_per_step": forwards, "skipped_steps": self._skips.total}


def deviation(losses: Sequence[float]) -> float:
    """Return the population standard deviation, as FZOO's code has it (its paper divides by N - 1)."""
    mean = sum(losses) / len(losses)
    return math.sqrt(sum((loss - mean) ** 2 for loss in losses) / len(losses))


def check_objective(objective: Any) -> None:
    """Refuse an objective that is none, or of which nobody knows the better side.

    Raises:
        BadInput: naming it.
    """
    if isinstance(objective, Metric):
        if objective.higher_is_better is None:
            raise BadInput(
                f"MeZO: objective is {type(objective).__name__}, which does not say whether higher is better; take a "
                "metric that does (its higher_is_better)."
            )
    elif objective not in ("loss", "accuracy"):
        raise BadInput(
            f"MeZO: objective is {objective!r}; give loss, accuracy, or a metric of torchmetrics by its class, such as "
            "torchmetrics.classification.MulticlassF1Score with num_classes and average: macro."
        )
