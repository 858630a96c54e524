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
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lit_sparse.errors import BadInput
from lit_sparse.strategies.base import Backward, BaseWeights, Claim, Context, Probe, UpdateStrategy
from lit_sparse.zeroth_order.directions import Direction, direction_of
from lit_sparse.zeroth_order.optimizer import Closure, ForwardOnly, Losses, Recorded, Skips, finite, named_errors
from lit_sparse.zeroth_order.perturbed import Place, Rows, check_model, places_of
from lit_sparse_kernels.add_noise import Term
from lit_sparse_kernels.philox import step_seed


@dataclasses.dataclass
class MeZO(UpdateStrategy):
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
    objective: Literal["loss", "accuracy"] | Metric = "loss"
    micro_batch: int | None = None
    max_skipped: int = 10
    seed: int = 0

    claims: ClassVar[frozenset[Claim]] = frozenset({"optimizer", "backward"})
    backward: ClassVar[Backward] = "none"
    base: ClassVar[BaseWeights] = "kept"
    accumulates: ClassVar[bool] = True
    masters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, least in (("queries", 1), ("max_skipped", 0), ("weight_decay", 0), ("micro_batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"MeZO: {name} is {value}; it must be at least {least}.")
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise BadInput(f"MeZO: epsilon is {self.epsilon}; it must be above 0.")
        if not 0 <= self.momentum < 1:
            raise BadInput(f"MeZO: momentum is {self.momentum}; it must be from 0 to below 1.")
        check_objective(self.objective)
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
        self._model: nn.Module | None = None
        self._places: dict[Tensor, Place] = {}
        self._optimizer: ForwardOnly | None = None
        self._step = 0
        self._skips = Skips("MeZO", self.max_skipped)
        self._numbers: dict[str, Tensor] = {}
        self._log: list[list[float]] = []  # of each step: the learning rate, and the slopes

    @property
    def supports_sharding(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._direction.supports_sharding

    @property
    def unsharded_reason(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{type(self._direction).__name__} directions need all of the weights' past steps on each rank"

    @property
    def rows_at_once(self) -> int | None:
        return self.micro_batch

    # ---- preparing

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._model = model

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._model = model
        self._skips.total, self._skips.row = state["skipped"]
        self._log = state["log"].tolist()

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        fields = ["momentum"] if self.momentum or self._direction.needs_mean else []
        self._optimizer = ForwardOnly(groups, lr, self.weight_decay, fields, self._take)
        return self._optimizer

    def regrouped(self, optimizer: Optimizer) -> None:
        assert self._model is not None, "attach or restore it first"
        check_model(self._model, "MeZO")
        names = places_of(self._model)
        self._places = {p: names[name] for name, p in self._model.named_parameters() if p.requires_grad}

    def detach(self, model: nn.Module) -> None:
        self._model, self._optimizer, self._places = None, None, {}

    # ---- a step

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        self._step = step

    def _take(self, closure: Closure | Recorded) -> Tensor:
        assert self._model is not None
        assert self._optimizer is not None
        parts = self._optimizer.parts(self._places)
        self._direction.begin(self._step, self.seed, parts)
        seeds = [step_seed(self.seed, self._step, query) for query in range(self.queries)]
        if isinstance(closure, Recorded):
            slopes, loss = closure.slopes, torch.tensor(math.nan)
        else:
            with named_errors("MeZO"):
                slopes, loss = self._slopes(Losses(self._model, closure), seeds)
        lr = self._optimizer.param_groups[0]["lr"]
        self._log.append([lr, *slopes] if finite(slopes) else [lr, *[math.nan] * len(slopes)])
        if finite(slopes):
            terms = [Term(seed, slope / self.queries) for seed, slope in zip(seeds, slopes, strict=True)]
            self._direction.move(parts, terms, lr, self.momentum)
            self._skips.go_on()
        else:
            self._skips.skip()
        self._note(slopes, loss)
        return loss

    def _slopes(self, losses: Losses, seeds: Sequence[int]) -> tuple[list[float], Tensor]:
        """Return the loss's slope along each direction, and the loss of the step; slopes may be no finite numbers."""

        def beside(seed: int, scale: float) -> Tensor:
            def make(weight: Tensor, place: Place, rows: Rows) -> Tensor:
                return self._direction.perturb(weight, place, rows, seed, scale)

            return losses.beside(make)

        if self.sides == "two":
            pairs = [(beside(seed, self.epsilon), beside(seed, -self.epsilon)) for seed in seeds]
            numbers = [(float(above), float(below)) for above, below in pairs]
            slopes = [(above - below) / (2 * self.epsilon) for above, below in numbers]
            return slopes, torch.stack([loss for pair in pairs for loss in pair]).mean()
        here = losses.plain()
        values = [beside(seed, self.epsilon) for seed in seeds]
        level, numbers = float(here), [float(value) for value in values]
        spread = self.epsilon if self.scale == "epsilon" else deviation(numbers)
        return [(number - level) / spread if spread else 0.0 for number in numbers], here

    def _note(self, slopes: Sequence[float], loss: Tensor) -> None:
        self._numbers = {
            "mezo_slope": loss.new_tensor(sum(map(abs, slopes)) / len(slopes)),
            "mezo_skipped": loss.new_tensor(float(self._skips.total)),
        }

    def logged(self) -> Mapping[str, Tensor]:
        """Return the mean size of the last step's slopes, and the number of skipped steps."""
        return self._numbers

    # ---- what is kept

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": [self._skips.total, self._skips.row], "log": self.log}

    @property
    def log(self) -> Tensor:
        """Learning rate and slopes of each step so far, NaN where it was skipped: (steps, 1 + queries) float64."""
        return torch.tensor(self._log, dtype=torch.float64).view(-1, 1 + self.queries)

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
        raise BadInput(f"MeZO: objective is {objective!r}; give loss, accuracy, or a metric of torchmetrics.")
