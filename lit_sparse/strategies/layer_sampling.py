"""Samplers of decoder layers, which decide what trains in the next interval.

All randomness comes from (seed, number of the draw), so that every rank and every resumed run draws the same layers.
"""

from __future__ import annotations

import dataclasses
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_sparse.anatomy import has_values, is_linear, matrix
from lit_sparse.errors import BadInput
from lit_sparse.optim import full_tensor, local_shard, sum_over_shards
from lit_sparse.ranks import all_reduce_mean, all_reduce_sum

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

    def measure(self, layers: Sequence[nn.Module], losses: Iterator[Tensor]) -> Mapping[int, float]:
        """Return what `observe` gets before the first draw, of training batches; called if there are `probe_batches`.

        Args:
            losses: The losses of those batches, with a graph.
        """
        return {}

    def observe(self, norms: Mapping[int, float]) -> None:
        """Record a number of each layer, by its index: what `measure` returned before the first draw, then the
        gradient norms, root mean squares of the gradient's entries, if the sampler sees them.
        """

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

    def measure(self, layers: Sequence[nn.Module], losses: Iterator[Tensor]) -> Mapping[int, float]:
        return gradient_norms(layers, losses)

    def observe(self, norms: Mapping[int, float]) -> None:
        for layer, norm in norms.items():
            old = self.scores.get(layer, norm)
            self.scores[layer] = self.memory * old + (1 - self.memory) * norm

    def state_dict(self) -> dict[str, Any]:
        return {"scores": [self.scores[layer] for layer in sorted(self.scores)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scores = dict(enumerate(state["scores"]))


@dataclasses.dataclass
class Outliers(Sampler):
    """Draw layers in proportion to their share of outliers among weights times inputs (OWS, arXiv 2405.18380).

    With the norms a_j of a linear layer's inputs over the batches, an entry of its weight is an outlier if |W_ij| a_j
    is above `threshold` times the mean of its matrix. A layer's share is the mean over its matrices. The authors do not
    say whether means are of a row, a matrix or a layer; ours are of a matrix.

    Args:
        threshold: The paper's M; at 0 all layers are alike.
        probe_batches: Training batches on which inputs are measured before training.
    """

    threshold: float = 13.0
    probe_batches: int = 4

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and self.probe_batches > 0):
            raise BadInput(
                f"the sampler outliers has threshold {self.threshold} and probe_batches {self.probe_batches}; "
                "threshold must be at least 0, and probe_batches at least 1."
            )
        self.shares: dict[int, float] = {}

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        shares = [self.shares[layer] for layer in range(len(layers))]
        return draw_weighted(shares if any(shares) else [1.0] * len(shares), count, seed, number)

    def measure(self, layers: Sequence[nn.Module], losses: Iterator[Tensor]) -> Mapping[int, float]:
        return outlier_shares(layers, losses, self.threshold)

    def observe(self, norms: Mapping[int, float]) -> None:
        self.shares |= norms

    def state_dict(self) -> dict[str, Any]:
        return {"shares": [self.shares[layer] for layer in sorted(self.shares)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shares = dict(enumerate(state["shares"]))


class Costliest(Sampler):
    """Draw the layers that take the most memory to train, for a plan; measure and observe as another sampler does.

    Args:
        sampler: The sampler that the training has.
        first: Draw the first layer and the last ones, instead of the last ones alone.
    """

    def __init__(self, sampler: Sampler, first: bool) -> None:
        self.sampler, self.first = sampler, first
        self.probe_batches = sampler.probe_batches

    @property
    def sees_gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.sampler.sees_gradients

    def draw(self, layers: Sequence[nn.Module], count: int, seed: int, number: int) -> list[int]:
        last = [*range(max(0, len(layers) - count), len(layers))]
        return [0, *last[1:]] if self.first else last

    def measure(self, layers: Sequence[nn.Module], losses: Iterator[Tensor]) -> Mapping[int, float]:
        return self.sampler.measure(layers, losses)

    def observe(self, norms: Mapping[int, float]) -> None:
        self.sampler.observe(norms)


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "uniform": Uniform,
    "cyclic": Cyclic,
    "weight_norm": WeightNorm,
    "grad_norm": GradNorm,
    "outliers": Outliers,
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


# ---- what is measured before the first draw


def gradient_norms(layers: Sequence[nn.Module], losses: Iterator[Tensor]) -> dict[int, float]:
    """Return the root mean square of each layer's gradient over some batches, by the layer's index.

    Each gradient is freed as soon as it is measured, so the gradients of all layers never exist at once. Ranks
    must agree, or they would draw different layers and wait for each other forever.
    """
    squares: dict[int, list[Tensor]] = {number: [] for number in range(len(layers))}
    steps = 0
    with _measuring(layers, squares):
        for loss in losses:
            loss.backward()
            steps += 1
    sums = torch.stack([torch.stack(squares[number]).sum() for number in squares]) / steps
    weight = next(layers[0].parameters())
    if isinstance(weight, DTensor):  # FSDP2 has averaged the gradients, and each rank measured its shards of them
        sums = sum_over_shards(sums, weight)
    else:
        all_reduce_mean(sums)
    counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    return {n: (total / count) ** 0.5 for n, (total, count) in enumerate(zip(sums.tolist(), counts, strict=True))}


@contextmanager
def _measuring(layers: Sequence[nn.Module], squares: dict[int, list[Tensor]]) -> Iterator[None]:
    """Within the context, append the squared norm of each parameter's gradient to `squares`, and free the gradient.

    Makes all layers trainable, and leaves them so.
    """

    def hook_of(number: int) -> Any:
        def measure(parameter: Tensor) -> None:
            assert parameter.grad is not None
            squares[number].append(torch.linalg.vector_norm(local_shard(parameter.grad), dtype=torch.float32).square())
            parameter.grad = None

        return measure

    handles = []
    for number, layer in enumerate(layers):
        layer.requires_grad_(True)
        handles += [p.register_post_accumulate_grad_hook(hook_of(number)) for p in layer.parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outlier_shares(layers: Sequence[nn.Module], losses: Iterator[Tensor], threshold: float) -> dict[int, float]:
    """Return each layer's share of outliers (see `Outliers`), by its index; over the batches of all ranks.

    Matrices are scored one at a time. Every rank must call it.
    """
    linears = [[module for module in layer.modules() if is_linear(module)] for layer in layers]
    squares: dict[nn.Module, Tensor] = {}

    def add(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        here = args[0].detach().flatten(0, -2).float().square().sum(0)
        squares[linear] = squares[linear] + here if linear in squares else here

    hooks = [linear.register_forward_pre_hook(add) for of_layer in linears for linear in of_layer]
    try:
        with torch.no_grad():
            for _ in losses:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    shares: dict[int, float] = {}
    for number, of_layer in enumerate(linears):
        reached = [linear for linear in of_layer if linear in squares]
        found = [_outliers(matrix(linear), all_reduce_sum(squares[linear]).sqrt(), threshold) for linear in reached]  # pyright: ignore[reportArgumentType]
        mean = torch.stack(found).mean() if found else torch.zeros(())
        shares[number] = float(mean) if has_values(mean) else 1.0  # a planned training draws any layers
    return shares


def _outliers(weight: Tensor, norms: Tensor, threshold: float) -> Tensor:
    """Return the share of the entries of `weight` (out, in) whose magnitude times `norms` (in,) is an outlier."""
    scores = full_tensor(weight.detach()).float().abs() * norms
    return (scores > threshold * scores.mean()).float().mean()
