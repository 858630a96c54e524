"""Estimates of a diagonal curvature by Gauss, Newton and Bartlett from slopes along random directions, and their mean.

The mean of squared slopes of single examples, with their true labels, is z^T F z for F the empirical Fisher matrix. It
is the Hessian where a model's predictions are right on average, and only near there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_sparse.anatomy import decoder_layers
from lit_sparse.ranks import all_reduce_sum
from lit_sparse.zeroth_order.directions import Part
from lit_sparse.zeroth_order.perturbed import places_of

Estimate = Literal["examples", "batch"]


def squared_slopes(slopes_N: Tensor, slope: float, how: Estimate) -> float:
    """Return the estimate along a direction, the same on all ranks: mean of c_b^2, or B c^2.

    Args:
        slopes_N: Slopes c_b of the losses of this rank's examples.
        slope: The slope c of their mean.
        how: Which of the two.
    """
    sums = torch.stack([slopes_N.square().sum(), slopes_N.new_tensor(float(len(slopes_N)))])
    total, count = all_reduce_sum(sums).tolist()
    if how == "batch":
        return count * slope * slope
    return total / count if count else 0.0


class Curvature:
    """The mean of estimates over refreshes, from 0 on, one number or one for each layer, and the unit of curvature.

    Args:
        decay: Its decay from one refresh to the next.

    Attributes:
        refreshes: How many there were.
        values: The means, to be divided by `grown`.
        quantiles: Floors of the layers' h that was found at the last refresh; empty where they are computed.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.refreshes = 0
        self.values: list[float] = []
        self.quantiles: list[float] = []
        self._measured: list[float] = [0.0, 0.0]  # sum and number of the estimates that make the unit

    def refresh(self, estimates: Sequence[float], calibrate: bool) -> None:
        """Add an estimate for each value; to the unit too with `calibrate`."""
        self.refreshes += 1
        before = self.values or [0.0] * len(estimates)
        self.values = [self._decay * h + (1 - self._decay) * s for h, s in zip(before, estimates, strict=True)]
        if calibrate:
            total, count = self._measured
            self._measured = [total + sum(estimates), count + len(estimates)]

    @property
    def grown(self) -> float:
        """The weight of all estimates in a value: 1 - decay^refreshes."""
        return 1 - self._decay**self.refreshes

    @property
    def mean(self) -> float:
        """The mean of the values, divided."""
        return sum(self.values) / len(self.values) / self.grown if self.values else 0.0

    @property
    def unit(self) -> float:
        """The mean of the estimates with `calibrate`; 1 where they are all 0."""
        total, count = self._measured
        return total / count if total else 1.0

    def saved(self) -> dict[str, Any]:
        """Return what `load` takes."""
        return {
            "refreshes": self.refreshes,
            "values": self.values,
            "quantiles": self.quantiles,
            "measured": self._measured,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `saved` returned."""
        self.refreshes, self.values = state["refreshes"], list(state["values"])
        self.quantiles, self._measured = list(state["quantiles"]), list(state["measured"])


@dataclass(frozen=True)
class Layers:
    """The trainable weights by layer: each decoder layer, what comes before them, and what comes after.

    Attributes:
        sizes: Weights of each layer that has any.
        of: Layer of each parameter, by the number of its place.
    """

    sizes: list[int]
    of: dict[int, int]

    def tensors(self, parts: Sequence[Part], field: str) -> list[list[Tensor]]:
        """Return a field of the parts' state by layer."""
        return [
            [part.state[field] for part in parts if self.of[part.place.number] == layer]
            for layer in range(len(self.sizes))
        ]


def layers_of(model: nn.Module, apart: bool) -> Layers:
    """Return the layers of what trains in `model`; all as one unless they are told `apart`.

    Raises:
        BadInput: if they are to be told apart, and its decoder layers are not found.
    """
    layers = decoder_layers(model) if apart else []
    inside = {parameter: n for n, layer in enumerate(layers) for parameter in layer.parameters()}
    after, found, sizes = False, dict[int, int](), dict[int, int]()
    places = places_of(model)
    for name, parameter in model.named_parameters():
        after |= parameter in inside
        layer = inside.get(parameter, len(layers) if after else -1)
        if name in places:
            found[places[name].number] = layer
            sizes[layer] = sizes.get(layer, 0) + places[name].shape.numel()
    order = {layer: n for n, layer in enumerate(sorted(sizes))}
    return Layers([sizes[layer] for layer in order], {number: order[layer] for number, layer in found.items()})
