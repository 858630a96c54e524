"""HELENE: forward passes only, with annealed momentum and a floored diagonal curvature.

arXiv 2411.10696 (EMNLP 2025). With z a random direction, t the step from 0, b an example of the batch's B:

    c = (L(w + eps_p z) - L(w - eps_p z)) / (2 eps_p), and c_b alike of the loss of b alone
    alpha = beta1 + (1 - beta1) exp(-t / T)
    m = beta1 m + alpha c z
    every k steps: h = beta2 h + (1 - beta2) mean_b(c_b^2) z^2               A-GNB, with the true labels
    w = w - lr (m / (gamma max(h, lambda_i) + eps) + weight_decay w)         lambda_i: the floor of layer i

Published, as far as it is known here: the paper's text and code were not at hand, and these equations are those that
third parties give and that its reviewers describe. Momentum is not normalised: its gain is alpha / (1 - beta1), about
10, so that a learning rate is a tenth of MeZO's. lambda_i bounds the step from the side of flat directions, and does
not clip it as Sophia does.

Choices of ours, since no setting is known, or since the published one does not hold:

- With one direction for all weights, the mean of c^2 z_i^2 is |grad|^2 + (kurtosis - 1) grad_i^2, in which the weight's
  own part is one of d; with signs it is c^2 for every weight exactly. So `h: scalar`, the default, is `tensor` with
  half the state: the same weights with signs, and without the noise of z^2 with Gaussian directions. `layer` measures
  each layer by directions of its own, which does tell layers apart, for two more forward passes a layer and refresh.
- h is divided by 1 - beta2^(number of refreshes), as in Adam: from 0 it would take a hundred refreshes to rise.
- `gamma: null` is 1 / (mean of the estimates in the first 100 steps), and the floors are of gamma h, which is then
  about 1: no setting depends on the loss's scale.
- `theory`: lambda_i = R / (2 sqrt(d_i)) as in the paper's bound, d_i the weights of layer i, with R such that a layer
  of average size has `floor`.
- The perturbation's eps_p and the denominator's eps, one symbol in the paper, are two settings.
- As in MeZO (lit_sparse.strategies.mezo): weights are not perturbed in place, noise is the same on any number of
  ranks, bf16 weights are rounded stochastically, dropout has the same masks in all passes of a step.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput
from lit_sparse.optim import local_shard
from lit_sparse.strategies.base import Context, Need, UpdateStrategy
from lit_sparse.strategies.forward_only import (
    MEASURING,
    ForwardOnlyMethod,
    check_above_zero,
    check_at_least,
    check_one_of,
)
from lit_sparse.zeroth_order.curvature import Curvature, Estimate, Layers, layers_of, squared_slopes
from lit_sparse.zeroth_order.directions import Dense, Part
from lit_sparse.zeroth_order.optimizer import Losses
from lit_sparse.zeroth_order.perturbed import Make, Place, Rows
from lit_sparse.zeroth_order.quantile import quantiles
from lit_sparse_kernels import momentum_noise
from lit_sparse_kernels.add_noise import Term
from lit_sparse_kernels.philox import Kind, step_seed

CALIBRATION = 100
"""Steps whose estimates are the unit of curvature where gamma is not given."""
Curved = Literal["scalar", "layer", "tensor"]
Floors = Literal["const", "theory", "quantile"]
KINDS: dict[str, Any] = {"h": Curved, "gnb": Estimate, "floors": Floors, "direction": Kind}
"""Settings that are one of a few words."""


@dataclasses.dataclass
class HELENE(ForwardOnlyMethod, UpdateStrategy):
    """Train by forward passes, with annealed momentum and a floored curvature (HELENE, arXiv 2411.10696).

    It trains whatever the stacked method makes trainable; all weights if used alone.

    Args:
        epsilon: Length of the perturbation of a weight.
        beta1: Decay of the momentum, which is not normalised: its gain is 1 / (1 - beta1).
        beta2: Decay of the curvature from one refresh to the next.
        refresh_every: Steps between estimates of the curvature (the paper's k).
        anneal_steps: Steps in which the share of a new gradient in the momentum falls from 1 towards beta1 by a factor
            of e (the paper's T); null keeps it at 1.
        h: What the curvature is: a `scalar`; a number for each `layer`, from two more forward passes a layer and
            refresh; or a `tensor` (the paper's), which is 4 bytes a weight more.
        gnb: The estimate: mean of the squared slopes of single `examples`; or of the `batch`, B times the square of the
            mean slope.
        floors: Least curvature of a layer: the same for all (`const`), less in larger layers (`theory`), or a
            `quantile` of the layer's own, with `h: tensor`.
        floor: Of gamma x curvature: the least, that of a layer of average size with `theory`, or which quantile.
        gamma: Factor of the curvature; null is 1 / (mean of the estimates in the first 100 steps).
        eps: Added to the denominator.
        direction: `rademacher` (signs) or `gaussian` (the paper's).
        weight_decay: Decoupled weight decay of matrices.
        micro_batch: Rows of a forward pass; null is the whole batch. Losses are of the whole batch in any case.
        probes_at_once: Losses that one forward pass computes, on so many copies of the rows; 2 saves time on an
            adapter, and takes twice inference's memory for activations.
        max_skipped: Steps in a row that may be skipped since a loss is not finite, before the run ends.
        seed: Seed of the directions.
    """

    epsilon: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    refresh_every: int = 10
    anneal_steps: int | None = 1000
    h: Curved = "scalar"
    gnb: Estimate = "examples"
    floors: Floors = "const"
    floor: float = 0.5
    gamma: float | None = None
    eps: float = 1e-8
    direction: Kind = "rademacher"
    weight_decay: float = 0.0
    micro_batch: int | None = None
    probes_at_once: int = 1
    max_skipped: int = 10
    seed: int = 0

    needs: ClassVar[frozenset[Need]] = frozenset({"fixed_set"})
    supports_sharding: ClassVar[bool] = True
    probing: ClassVar[frozenset[str]] = MEASURING | {"gnb"}

    def __post_init__(self) -> None:
        self._check()
        self._prepare()
        self._layers = Layers([], {})
        self._dense = Dense(self.direction)
        self._curvature = Curvature(self.beta2)

    def _check(self) -> None:
        least = {"refresh_every": 1, "anneal_steps": 1, "max_skipped": 0, "weight_decay": 0, "eps": 0, "micro_batch": 1}
        check_at_least(self, {**least, "probes_at_once": 1})
        check_above_zero(self, "epsilon", "gamma")
        check_one_of(self, {name: get_args(kind) for name, kind in KINDS.items()})
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"HELENE: {name} is {getattr(self, name)}; it must be from 0 to below 1.")
        if self.floors == "quantile" and self.h != "tensor":
            raise BadInput(
                f"HELENE: floors is quantile, with h {self.h}, but one number has no quantiles; set h to tensor, or "
                "floors to const or theory."
            )
        if not 0 < self.floor < (1 if self.floors == "quantile" else math.inf):
            wanted = "between 0 and 1, which quantile" if self.floors == "quantile" else "above 0"
            raise BadInput(f"HELENE: floor is {self.floor}, with floors {self.floors}; it must be {wanted}.")

    # ---- preparing

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        for name in ("h", "floors"):
            if state[name] != getattr(self, name):
                raise BadInput(
                    f"HELENE: {name} is {getattr(self, name)}, but the checkpoint was written with {state[name]}, "
                    f"whose curvature is kept in another way; set {name} to {state[name]}."
                )
        super().restore(model, state, context)
        self._curvature.load(state["curvature"])

    @property
    def _fields(self) -> list[str]:
        return ["momentum", "curvature"] if self.h == "tensor" else ["momentum"]

    def regrouped(self, optimizer: Optimizer) -> None:
        super().regrouped(optimizer)
        assert self._model is not None
        self._layers = layers_of(self._model, apart=self.h == "layer" or self.floors != "const")

    # ---- a step

    @property
    def _refreshes(self) -> bool:
        return not self._curvature.refreshes or (self._step - 1) % self.refresh_every == 0

    @property
    def _count(self) -> int:
        estimates = len(self._layers.sizes) if self.h == "layer" else 1
        return 1 + estimates * self._refreshes

    def _measure(self, losses: Losses) -> tuple[list[float], Tensor]:
        """Return the slope along the step's direction and, where the curvature is refreshed, its estimates."""
        if not self._refreshes:
            above, below = losses.of(self._sides(None))
            return [self._slope(above, below)], torch.stack([above, below]).mean()
        slope, estimate, loss = self._probe(losses, None)
        if self.h != "layer":
            return [slope, estimate], loss
        return [slope, *(self._probe(losses, layer)[1] for layer in range(len(self._layers.sizes)))], loss

    def _probe(self, losses: Losses, layer: int | None) -> tuple[float, float, Tensor]:
        """Return the slope along a direction (of a layer's weights, or all), the estimate, and the sides' mean loss."""
        (above, above_N), (below, below_N) = losses.of_rows(self._sides(layer))
        slope, slopes_N = self._slope(above, below), (above_N.double() - below_N.double()) / (2 * self.epsilon)
        return slope, squared_slopes(slopes_N, slope, self.gnb), torch.stack([above, below]).mean()

    def _slope(self, above: Tensor, below: Tensor) -> float:
        return (float(above) - float(below)) / (2 * self.epsilon)

    def _sides(self, layer: int | None) -> list[Make]:
        """Return both perturbations along a direction of all weights, or of a layer's."""
        seed = self._seed_of(0 if layer is None else 1 + layer)

        def beside(scale: float) -> Make:
            def make(weight: Tensor, place: Place, at: Rows) -> Tensor:
                if layer is not None and self._layers.of[place.number] != layer:
                    return weight
                return self._dense.perturb(weight, place, at, seed, scale)

            return make

        return [beside(self.epsilon), beside(-self.epsilon)]

    def _seed_of(self, query: int) -> int:
        return step_seed(self.seed, self._step, query)

    def _move(self, parts: Sequence[Part], numbers: Sequence[float], lr: float) -> None:
        """Take the step in one pass over the weights; in two where floors are quantiles of what the first refreshes."""
        slope, *estimates = numbers
        curvature, terms = self._curvature, [Term(self._seed_of(0), annealed(self, self._step) * slope)]
        rule = momentum_noise.Rule(lr, self.beta1)
        if estimates:
            curvature.refresh(estimates, calibrate=self._step <= CALIBRATION)
            if self.h == "tensor":
                rule = rule._replace(rest=self.beta2, refresh=((1 - self.beta2) * estimates[0],))
            if self.floors == "quantile":
                self._launch(parts, terms, rule._replace(step=0.0, eps=1.0))
                curvature.quantiles = quantiles(self._layers.tensors(parts, "curvature"), self.floor)
                rule, terms = rule._replace(decay=1.0, refresh=None), [terms[0]._replace(scale=0.0)]
        self._launch(parts, terms, rule._replace(gamma=self._gamma / curvature.grown, eps=self.eps))

    @property
    def _gamma(self) -> float:
        return 1 / self._curvature.unit if self.gamma is None else self.gamma

    def _launch(self, parts: Sequence[Part], terms: Sequence[Term], rule: momentum_noise.Rule) -> None:
        bounds = [self._bound(layer, rule) for layer in range(len(self._layers.sizes))]
        for keep in dict.fromkeys(part.keep for part in parts):
            pieces = [
                momentum_noise.Piece(
                    part.tensor,
                    local_shard(part.state["momentum"]),
                    local_shard(part.state["curvature"]) if self.h == "tensor" else None,
                    bounds[self._layers.of[part.place.number]],
                    part.place.number,
                    part.first,
                )
                for part in parts
                if part.keep == keep
            ]
            kept = rule._replace(keep=keep if rule.step else 1.0)
            momentum_noise.momentum_noise(pieces, terms, kept, self.direction, stochastic=True)

    def _bound(self, layer: int, rule: momentum_noise.Rule) -> float:
        """Return the floor of a layer's h; where that is one number, the factor of the layer's step."""
        if self.floors == "quantile":
            return self._curvature.quantiles[layer] if self._curvature.quantiles else 0.0
        sizes, floor = self._layers.sizes, self.floor
        if self.floors == "theory":
            floor *= math.sqrt(sum(sizes) / len(sizes) / sizes[layer])
        if self.h == "tensor":
            return floor / rule.gamma
        here = self._curvature.values[layer if self.h == "layer" else 0]
        return 1 / (max(rule.gamma * here, floor) + rule.eps)

    def _to_show(self, numbers: Sequence[float]) -> dict[str, float]:
        return {"slope": abs(numbers[0]), "curvature": self._curvature.mean}

    # ---- what is kept

    def state_dict(self) -> dict[str, Any]:
        kept = {"h": self.h, "floors": self.floors, "curvature": self._curvature.saved()}
        return {**super().state_dict(), **kept}

    def describe(self) -> dict[str, Any]:
        """Return the forward passes of a step, the factor of the curvature, and how many steps were skipped."""
        more = 2 * len(self._layers.sizes) / self.refresh_every if self.h == "layer" else 0
        return {
            "forwards_per_step": 2 + more,
            "gamma": self._gamma,
            "skipped_steps": self._skips.total,
        }


def annealed(strategy: HELENE, step: int) -> float:
    """Return the share of a new gradient in the momentum at step `step` (from 1): alpha, from 1 down to beta1."""
    fallen = 1.0 if strategy.anneal_steps is None else math.exp(-(step - 1) / strategy.anneal_steps)
    return strategy.beta1 + (1 - strategy.beta1) * fallen
