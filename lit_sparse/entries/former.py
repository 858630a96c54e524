"""Entries that trained before: they keep their value, or get the base's back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_sparse.anatomy import role
from lit_sparse.entries.linear import EntryLinear, read_entries, write_entries

HOST = "cpu"
"""Device of what is kept on the host; a plan of a GPU's memory, whose tensors are all on the CPU, leaves it out."""


@dataclass(frozen=True)
class Former:
    """Entries of one weight that trained before and keep their value, which a checkpoint must hold.

    Attributes:
        positions: In the weight as it is stored, (M,) int32, sorted; on the host, as the values are.
        values: (M,), of the weight's dtype.
    """

    positions: Tensor
    values: Tensor

    @staticmethod
    def none(weight: Tensor) -> Former:
        """Return that of a weight whose entries train from the start, or not at all."""
        return Former.of_size(0, weight)

    @staticmethod
    def of_size(count: int, weight: Tensor) -> Former:
        """Return one of `count` entries without values.

        A plan cannot know how many entries a training's changes leave; it takes as many as train.
        """
        return Former(
            torch.empty(count, dtype=torch.int32, device=HOST), torch.empty(count, dtype=weight.dtype, device=HOST)
        )

    @staticmethod
    def load(state: Mapping[str, Tensor], weight: Tensor) -> Former:
        """Return what had the `state_dict` `state`, and write its values into `weight`; of a sharded one, its part."""
        former = Former(state["positions"].cpu(), state["values"].cpu())
        write_entries(weight, former.positions, former.values[:, None])
        return former

    def changed(self, old: Tensor, values: Tensor, new: Tensor) -> Former:
        """Return those after the entries `old` (N,), of `values` (N,), gave way to the entries `new` (K,)."""
        new, old = new.cpu(), old.cpu()
        still, gone = ~torch.isin(self.positions, new), ~torch.isin(old, new)
        positions = torch.cat([self.positions[still], old[gone]])
        kept = torch.cat([self.values[still], values.detach().cpu()[gone].to(self.values.dtype)])
        order = positions.argsort()
        return Former(positions[order], kept[order])

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `load` takes."""
        return {"positions": self.positions, "values": self.values}


class FormerEntries:
    """What is remembered for entries that stop training, by name of the layer.

    Args:
        restored: Whether they get the base's value back. Else they keep their own, which a checkpoint must hold.

    Attributes:
        start: If restored: the base's values of the entries that train, (N, 1) in the weight's dtype.
        left: If not: the entries that trained before.
    """

    def __init__(self, restored: bool) -> None:
        self.restored = restored
        self.start: dict[str, Tensor] = {}
        self.left: dict[str, Former] = {}

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
        weight = layer.get_parameter("weight")
        if name in self.start:
            write_entries(weight, layer.index[~stayed], self.start[name][~stayed])
        else:
            former = self.left.get(name, Former.none(weight))
            self.left[name] = former.changed(layer.index, layer.entries.squeeze(1), new)
        values = read_entries(weight, new)
        if name in self.start:
            start = values.to(weight.dtype, copy=True)  # of an fp32 weight else the masters themselves
            start[stays] = self.start[name][stayed]
            self.start[name] = start
        return values

    def plan(self, name: str, layer: EntryLinear) -> None:
        """Hold, in a plan, what changes are taken to leave."""
        if name not in self.start:
            self.left[name] = Former.of_size(len(layer.index), layer.get_parameter("weight"))

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
            state["left"] = self.left[name].state_dict()
        return state

    def load(self, name: str, layer: EntryLinear, state: Mapping[str, Any]) -> None:
        """Take what `state_of` returned, and write the values of former entries into the weight."""
        if "left" in state:
            self.left[name] = Former.load(state["left"], layer.get_parameter("weight"))
        if "start" in state:
            self.start[name] = state["start"].to(layer.index.device)


def described(trained: Mapping[str, tuple[int, int]], former: Iterable[Former]) -> dict[str, Any]:
    """Return the numbers of trained entries, and of those that trained before; and the trained share by role.

    Args:
        trained: Of each layer the number of trained entries, and that of all, by name.
    """
    shares: dict[str, list[int]] = {}
    for name, numbers in trained.items():
        of_role = shares.setdefault(role(name), [0, 0])
        of_role[:] = (one + other for one, other in zip(of_role, numbers, strict=True))
    return {
        "entries": sum(count for count, _ in trained.values()),
        "left": sum(len(one.positions) for one in former),
        "share": {what: count / weights for what, (count, weights) in shares.items()},
    }
