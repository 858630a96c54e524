"""Entries that trained before: they keep their value, or get the base's back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_sparse.entries.linear import EntryLinear, read_entries, write_entries


class FormerEntries:
    """What is remembered for entries that stop training, by name of the layer.

    Args:
        restored: Whether they get the base's value back. Else they keep their own, which a checkpoint must hold.

    Attributes:
        start: If restored: the base's values of the entries that train, (N, 1) in the weight's dtype.
        left: If not: positions (M,), sorted, and values (M, 1) of the entries that trained before, on the host.
    """

    def __init__(self, restored: bool) -> None:
        self.restored = restored
        self.start: dict[str, Tensor] = {}
        self.left: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(self, name: str, layer: EntryLinear) -> None:
        """Remember what the base has where a layer trains, before its first step."""
        if self.restored:
            self.start[name] = layer.entries.detach().to(layer.get_parameter("weight").dtype, copy=True)

    def change(self, name: str, layer: EntryLinear, new: Tensor, stays: Tensor, stayed: Tensor) -> Tensor:
        """Let entries go as the layer is to train those at `new`; return the base's or the weight's values of these.

        Args:
            new: Positions (N,) of the entries that train from now on, sorted.
            stays: Which of `new` train already, bool (N,).
            stayed: Which of those that train now are among `new`, bool.
        """
        weight, gone = layer.get_parameter("weight"), layer.index[~stayed]
        if name in self.start:
            write_entries(weight, gone, self.start[name][~stayed])
        else:
            self._keep(name, gone, layer.entries.detach()[~stayed].to(weight.dtype), new)
        values = read_entries(weight, new)
        if name in self.start:
            start = values.to(weight.dtype, copy=True)  # of an fp32 weight else the masters themselves
            start[stays] = self.start[name][stayed]
            self.start[name] = start
        return values

    def _keep(self, name: str, gone: Tensor, values: Tensor, new: Tensor) -> None:
        before, held = self.left.get(name, (gone[:0].cpu(), values[:0].cpu()))
        still = ~torch.isin(before, new.cpu())
        positions = torch.cat([before[still], gone.cpu()])
        order = positions.argsort()
        self.left[name] = positions[order], torch.cat([held[still], values.cpu()])[order]

    def clear(self) -> None:
        """Forget all."""
        self.start.clear()
        self.left.clear()

    def state_of(self, name: str) -> dict[str, Any]:
        """Return what `load` takes of a layer."""
        state: dict[str, Any] = {}
        if name in self.start:
            state["start"] = self.start[name]
        if name in self.left:
            state["left"], state["left_values"] = self.left[name]
        return state

    def load(self, name: str, layer: EntryLinear, state: Mapping[str, Any]) -> None:
        """Take what `state_of` returned, and write the values of former entries into the weight."""
        if "left" in state:
            self.left[name] = state["left"].cpu(), state["left_values"].cpu()
            write_entries(layer.get_parameter("weight"), *self.left[name])
        if "start" in state:
            self.start[name] = state["start"].to(layer.index.device)
