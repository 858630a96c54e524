"""MEFT's adapters in a model that is not reversible, with activation checkpointing: what MEFT has to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_sparse.anatomy import decoder_layers
from lit_sparse.reversible.decoder import Recipe, Seen, parallels, reversible
from lit_sparse.reversible.segment import Call, ReversibleLayer
from lit_sparse.strategies.base import BaseWeights, Claim, Context, Leaves, Probe, UpdateStrategy


@dataclasses.dataclass
class PlainAdapters(UpdateStrategy):
    """Train the adapters of MEFT's variant 1, as many and in the same places, in the model's own single stream.

    Args:
        bottleneck: Width of the adapters.
        every: Layers that are recomputed together in the backward pass, from the stored hidden states before them; at 0
            all activations are stored.
    """

    bottleneck: int = 8
    every: int = 0

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})
    base: ClassVar[BaseWeights] = "kept"
    leaves: ClassVar[Leaves] = "own_forward"

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        assert isinstance(model, PreTrainedModel)
        layers, seen = decoder_layers(model), Seen.of(model)
        model.requires_grad_(False)
        recipe = Recipe(variant=1, bottleneck=self.bottleneck, relative=True, factor=1.0)
        parts = zip(layers, parallels(model), strict=True)
        Chain([reversible(recipe, layer, mlp, layer is layers[-1], seen) for layer, mlp in parts], self.every)


class Chain:
    """The layers of a model with their adapters, of which `every` are recomputed together. It takes their `forward`."""

    def __init__(self, layers: Sequence[ReversibleLayer], every: int) -> None:
        self._layers, self._every = layers, every
        self._group: list[tuple[ReversibleLayer, Call]] = []
        for number, layer in enumerate(layers):
            layer.module.forward = partial(self._run, number)

    def _run(self, number: int, hidden: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        self._group.append((self._layers[number], (args, kwargs)))
        if number + 1 == len(self._layers) or (number + 1) % max(self._every, 1) == 0:  # else a later layer runs it
            run, self._group = partial(forward, self._group), []
            again = self._every and torch.is_grad_enabled()
            hidden = checkpoint(run, hidden, use_reentrant=False) if again else run(hidden)  # pyright: ignore
        outputs = self._layers[number].outputs
        return (hidden, *[None] * (outputs - 1)) if outputs else hidden


def forward(group: Sequence[tuple[ReversibleLayer, Call]], hidden: Tensor) -> Tensor:
    """Return the hidden states (B, S, H) after a group of layers, each followed by its second adapter."""
    for layer, call in group:
        whole, *adapters = layer.halves
        hidden = whole.function(hidden, call)
        for adapter in adapters:
            hidden = hidden + adapter.function(hidden, call)
    return hidden
