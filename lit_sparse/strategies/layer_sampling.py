"""Which decoder layers train next: samplers of layers, each a small object.

All randomness comes from (seed, number of the draw), so that every rank and every resumed run draws the same.
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
    """Draws layers. What it has seen of their gradients, if it asks for that, is its state.

    Attributes:
        sees_gradients: Whether it is told the gradient norms of the layers that train.
        probe_batches: Training batches on which all layers' gradient norms are measured before the first draw.
    """

    sees_gradients: ClassVar[bool] = False
    probe_batches: int = 0

    @abstractmethod
    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        """Numbers of `count` different layers, sorted: the `number`-th draw, from 0."""

    def observe(self, norms: Mapping[int, float]) -> None:
        """Take note of layers' gradient norms: of each layer, root mean square of its gradient's entries."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another was."""


@dataclasses.dataclass
class Uniform(Sampler):
    """Every layer with the same probability (LISA, arXiv 2403.17919, as its authors run it)."""

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        return sorted(stream(seed, number).sample(range(len(layers)), count))


@dataclasses.dataclass
class Cyclic(Sampler):
    """One layer after the other, each equally often (the orders of BAdam, arXiv 2404.02827).

    Args:
        order: From the first to the last, from the last to the first, or in a new random order each round.
    """

    order: Order = "random"

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        total, chosen, place = len(layers), list[int](), number * count
        while len(chosen) < count:
            layer = self._round(total, seed, place // total)[place % total]
            chosen += [layer] * (layer not in chosen)  # a random round may begin with what the last one ended with
            place += 1
        return sorted(chosen)

    def _round(self, total: int, seed: int, turn: int) -> list[int]:
        layers = list(range(total))
        if self.order == "random":
            stream(seed, turn).shuffle(layers)
        return layers[::-1] if self.order == "descending" else layers


@dataclasses.dataclass
class WeightNorm(Sampler):
    """Layers of larger weights more often: in proportion to the root mean square of a layer's weights."""

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        sizes = [rms(parameter.detach() for parameter in layer.parameters()) for layer in layers]
        return weighted(torch.stack(sizes).tolist(), count, seed, number)


@dataclasses.dataclass
class GradNorm(Sampler):
    """Layers of larger gradients more often; ours, in the spirit of GRASS (arXiv 2604.07808).

    A layer's score is a running mean of its gradient's root mean square, measured for all layers before training, and
    for a layer whenever it trains. Its probability in a draw of one is (1 - exploration) times its share of the sum of
    scores^(1 / temperature), plus exploration divided by the number of layers.

    Args:
        memory: Weight of the old mean, 0 to below 1.
        temperature: Above 0; the larger, the more alike are the probabilities.
        exploration: Share of uniform draws, 0 to 1, by which no layer is forgotten.
        probe_batches: Training batches whose gradients are measured first.
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
                f"{self.exploration} and probe_batches {self.probe_batches}; memory must lie from 0 to below 1, "
                "temperature above 0, exploration from 0 to 1, and there must be a batch."
            )
        self.scores: dict[int, float] = {}

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        powers = [self.scores[layer] ** (1 / self.temperature) for layer in range(len(layers))]
        total, even = sum(powers), self.exploration / len(layers)
        shares = [(1 - self.exploration) * power / total + even if total else even for power in powers]
        return weighted(shares, count, seed, number)

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
"""The samplers by their names in YAML, with their defaults."""


def sampler_of(name: str) -> Sampler:
    """The sampler of that name.

    Raises:
        BadInput: if there is none.
    """
    if name not in SAMPLERS:
        raise BadInput(f"the sampler {name!r} was asked for; there is {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]()


def stream(seed: int, number: int) -> random.Random:
    """Random numbers that belong to one draw."""
    return random.Random(f"{seed} {number}")


def weighted(weights: Sequence[float], count: int, seed: int, number: int) -> list[int]:
    """`count` different indices, drawn one by one in proportion to the weights that are left (Gumbel's way)."""
    source = stream(seed, number)
    keys = [(math.log(weight) if weight > 0 else -math.inf) + gumbel(source) for weight in weights]
    return sorted(sorted(range(len(weights)), key=lambda index: -keys[index])[:count])


def gumbel(source: random.Random) -> float:
    uniform = source.random() or 2.0**-53  # 0 has no logarithm
    return -math.log(-math.log(uniform))


def rms(tensors: Any) -> Tensor:
    """Root mean square of all entries, a scalar in fp32 on their device; of DTensors, of all their shards."""
    squares, count = [], 0
    for tensor in tensors:
        squares.append(torch.linalg.vector_norm(tensor, dtype=torch.float32).square())
        count += tensor.numel()
    total = torch.stack([full_tensor(square) for square in squares]).sum()
    return (total / count).sqrt()
