"""The frozen floor: a step in which nothing is trained, to compare methods with."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_sparse.anatomy import decoder_layers, linears, role
from lit_sparse.strategies.base import Claim, Probe, UpdateStrategy

NAME = "floor"
"""Name of the placeholder parameter: no computation uses it, so that the optimizer never moves it."""


@dataclasses.dataclass
class Floor(UpdateStrategy):
    """Runs forward and backward through frozen weights, down to the outputs of q, k and v of the first layer.

    These become leaves that want a gradient, so that the graph is that of a method that trains q, k and v from the
    first layer on, without the gradients of weights. A method whose lowest trained layer is higher up has a shorter
    backward.
    """

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})

    def attach(self, model: nn.Module, probe: Probe) -> None:
        model.requires_grad_(False)
        model.register_parameter(NAME, nn.Parameter(torch.zeros(1)))
        first = set(decoder_layers(model)[0].modules())
        self._handles: list[RemovableHandle] = [
            linear.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
            for name, linear in linears(model).items()
            if linear in first and role(name) in ("q", "k", "v", "qkv")
        ]

    def detach(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(model, NAME)
