"""Samplers of decoder layers, which decide what trains in the next interval.

All randomness comes from (seed, number of the draw), so that every rank and every resumed run draws the same layers.
"""

from __future__ import annotations

import dataclasses
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_sparse.errors import BadInput
from lit_sparse.optim import full_tensor

Order = Literal["ascending", "descending", "random"]


class Sampler(ABC):
    """Draw layers, possibly by the gradient norms observed so far, which are then its state.

    Attributes:
        sees_gradients: Whether `observe` gets the gradient norms of the layers that train.
        probe_batches: Training batches on which all layers' gradient norms are measured before the first draw; 0: none.
    """

    sees_gradients: ClassVar[bool] = False
    probe_batches: int = 0

    @abstractmethod
    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        """Return the indices of `count` different layers, sorted.

        Args:
            layers: All decoder layers.
            number: Number of the draw, from 0. The same seed and number must give the same layers on every rank.
        """

    def observe(self, norms: Mapping[int, float]) -> None:
        """Record the gradient norm of each layer, by its index: the root mean square of the gradient's entries."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `load_state_dict` takes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another sampler of the same kind."""


@dataclasses.dataclass
class Uniform(Sampler):
    """Draw every layer with the same probability, as the authors of LISA do (arXiv 2403.17919)."""

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        return sorted(generator_of(seed, number).sample(range(len(layers)), count))


@dataclasses.dataclass
class Cyclic(Sampler):
    """Draw the layers one after the other, each equally often (the orders of BAdam, arXiv 2404.02827).

    Args:
        order: `ascending` (first to last), `descending`, or `random`, a new permutation each round.
    """

    order: Order = "random"

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        total, chosen, place = len(layers), list[int](), number * count
        while len(chosen) < count:
            layer = self._round(total, seed, place // total)[place % total]
            chosen += [layer] * (
                layer not in chosen
            )  # a draw may span two rounds, the second starting with the same layer
            place += 1
        return sorted(chosen)

    def _round(self, total: int, seed: int, turn: int) -> list[int]:
        layers = list(range(total))
        if self.order == "random":
            generator_of(seed, turn).shuffle(layers)
        return layers[::-1] if self.order == "descending" else layers


@dataclasses.dataclass
class WeightNorm(Sampler):
    """Draw layers in proportion to the root mean square of their weights."""

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        sizes = [rms(parameter.detach() for parameter in layer.parameters()) for layer in layers]
        return draw_weighted(torch.stack(sizes).tolist(), count, seed, number)


@dataclasses.dataclass
class GradNorm(Sampler):
    """Draw layers with larger gradients more often. Our own construction, in the spirit of GRASS (arXiv 2604.07808).

    A layer's score is a running mean of the root mean square of its gradient, measured for all layers before training
    and for each layer while it trains. When one layer is drawn, its probability is (1 - exploration) times its share of
    the sum of scores^(1 / temperature), plus exploration divided by the number of layers.

    Args:
        memory: Decay of the running mean, from 0 to below 1.
        temperature: Above 0; larger makes the probabilities more uniform.
        exploration: Share of uniform draws, from 0 to 1, so that a layer with small gradients is still drawn.
        probe_batches: Training batches on which gradients are measured before training.
    """

    memory: float = 0.9
    temperature: float = 1.0
    exploration: float = 0.1
    probe_batches: int = 4

    sees_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (
            0 <= self.memory < 1 and self.temperature > 0 and 0 <= self.exploration <= 1 and self.probe_batches > 0
        ):
            raise BadInput(
                f"the sampler grad_norm has memory {self.memory}, temperature {self.temperature}, exploration "
                f"{self.exploration} and probe_batches {self.probe_batches}; memory must be from 0 to below 1, "
                "temperature above 0, exploration from 0 to 1, and probe_batches at least 1."
            )
        self.scores: dict[int, float] = {}

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        powers = [self.scores[layer] ** (1 / self.temperature) for layer in range(len(layers))]
        total, even = sum(powers), self.exploration / len(layers)
        shares = [(1 - self.exploration) * power / total + even if total else even for power in powers]
        return draw_weighted(shares, count, seed, number)

    def observe(self, norms: Mapping[int, float]) -> None:
        for layer, norm in norms.items():
            old = self.scores.get(layer, norm)
            self.scores[layer] = self.memory * old + (1 - self.memory) * norm

    def state_dict(self) -> dict[str, Any]:
        return {"scores": [self.scores[layer] for layer in sorted(self.scores)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scores = dict(enumerate(state["scores"]))


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "uniform": Uniform,
    "cyclic": Cyclic,
    "weight_norm": WeightNorm,
    "grad_norm": GradNorm,
}
"""The samplers by the names they have in YAML."""


def sampler_of(name: str) -> Sampler:
    """Return a new sampler with that name in YAML, with default settings.

    Raises:
        BadInput: if there is none of that name.
    """
    if name not in SAMPLERS:
        raise BadInput(f"the sampler {name!r} was asked for; choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]()


def generator_of(seed: int, number: int) -> random.Random:
    """Return the generator of one draw; Python's, whose numbers for a string seed do not depend on the device."""
    return random.Random(f"{seed} {number}")


def draw_weighted(weights: Sequence[float], count: int, seed: int, number: int) -> list[int]:
    """Return `count` different indices, sorted, drawn one by one in proportion to the remaining weights.

    Gumbel top-k (arXiv 1903.06059): the largest of log weight + Gumbel noise are such a draw without replacement. Zero
    weights come last.
    """
    source = generator_of(seed, number)
    keys = [(math.log(weight) if weight > 0 else -math.inf) + gumbel(source) for weight in weights]
    return sorted(sorted(range(len(weights)), key=lambda index: -keys[index])[:count])


def gumbel(source: random.Random) -> float:
    """Draw from the standard Gumbel distribution."""
    uniform = source.random() or 2.0**-53  # random() may return 0, whose logarithm does not exist
    return -math.log(-math.log(uniform))


def rms(tensors: Any) -> Tensor:
    """Return the root mean square of the entries of all tensors, an fp32 scalar on their device.

    DTensors count in full, which is one scalar collective each: every rank must call it.
    """
    squares, count = [], 0
    for tensor in tensors:
        squares.append(torch.linalg.vector_norm(tensor, dtype=torch.float32).square())
        count += tensor.numel()
    total = torch.stack([full_tensor(square) for square in squares]).sum()
    return (total / count).sqrt()
