"""LoSiA: train a subnet of each weight matrix in place, some rows times some columns, and move it from time to time.

LoSiA-Pro, arXiv 2507.04487. The subnets start at random. Training is cut into slots of `reselect` steps; in each, the
importance of the entries of one decoder layer's matrices is averaged, the layers taking turns, and at its end the
subnets of that layer move to where it is largest. All others train on without whole gradients: a subnet's gradient is
one small product, and only the input's columns that it reads are kept for the backward pass.

Deliberate differences from the authors' code: a subnet that moved starts with fresh moments *and* a fresh count of
steps (the code zeroes the moments and keeps the count, so that bias correction inflates the first updates up to five
times, which its new warm-up hides); embeddings, norms and the head do not train beside the subnets; gradients are
clipped and accumulated like everyone's, and importance is that of a whole step's gradient, averaged over ranks; masters
are in fp32. The warm-up of a subnet that moved scales its update, which is the same as scaling its learning rate.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.anatomy import has_values, replace, weight_count
from lit_sparse.entries.former import Former, described
from lit_sparse.entries.scores import random_scores, top_entries
from lit_sparse.entries.subnet import Importance, SubnetLinear
from lit_sparse.entries.targets import entry_targets
from lit_sparse.errors import BadInput
from lit_sparse.selections import wanted
from lit_sparse.strategies.base import Attaches, Claim, Context, Need, Probe, UpdateStrategy


@dataclasses.dataclass
class LoSiA(UpdateStrategy):
    """Train subnets of weight matrices, rows times columns, that move to where they matter (LoSiA, arXiv 2507.04487).

    Args:
        trainable_fraction: Share of all weights of the model to train. Every target has the same share of its rows as
            of its columns: the paper's 1/8 of both trains 1/64 of the targets.
        targets: Linear layers of which subnets are trained: roles (q, k, v, qkv, o, gate, up, gate_up, down), endings
            of module names, or `all`.
        reselect: Optimizer steps of a slot, in which one decoder layer is measured and at whose end its subnets move;
            null keeps the first ones, which are drawn from `seed`.
        recovery_steps: Steps over which the updates of subnets that moved grow linearly from 0 to their usual size; at
            most `reselect`, which null stands for. 0 leaves that out.
        decay: Share of the averages of importance that a step keeps.
        seed: Seed of the first subnets.
    """

    trainable_fraction: float = 0.0125
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    reselect: int | None = 50
    recovery_steps: int | None = None
    decay: float = 0.85
    seed: int = 0

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})
    attaches_to: ClassVar[Attaches] = "shards"
    supports_sharding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.trainable_fraction <= 1:
            raise BadInput(f"LoSiA: trainable_fraction is {self.trainable_fraction}; it must be above 0 and at most 1.")
        if not 0 <= self.decay < 1:
            raise BadInput(f"LoSiA: decay is {self.decay}; it must be at least 0 and below 1.")
        if self.reselect is not None and self.reselect < 1:
            raise BadInput(f"LoSiA: reselect is {self.reselect}; it must be at least 1, or null for fixed subnets.")
        if self.recovery_steps is not None and not 0 <= self.recovery_steps <= (self.reselect or math.inf):
            raise BadInput(
                f"LoSiA: recovery_steps is {self.recovery_steps}; it must be at least 0 and at most reselect "
                f"({self.reselect}), when the next layer's subnets move."
            )
        self._swapped: dict[str, tuple[nn.Module, SubnetLinear]] = {}
        self._turns: list[list[str]] = []  # matrices that are measured together, in the order of their layers
        self._measured: dict[str, Importance] = {}
        self._left: dict[str, Former] = {}
        self._before: dict[str, Tensor] = {}  # masters before a step whose update is scaled
        self._step = 0

    @property
    def period(self) -> int | None:
        return self.reselect

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A graph; and to move subnets, gradients that are there beside the optimizer's state."""
        return frozenset({"graph"} if self.reselect is None else {"graph", "gradients"})

    # ---- preparing

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        linears = self._targets(model, context.compute)
        share = self._share(model, linears)
        self._swap(model, {name: self._drawn(name, linear.weight.shape, share) for name, linear in linears.items()})
        self._measure(1)

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        linears = self._targets(model, context.compute)
        saved = state["matrices"]
        for name, entry in saved.items():
            sides = linears[name].weight.shape if name in linears else (0, 0)
            pairs = zip(entry["places"], sides, strict=True)
            if any(len(own) and not 0 <= int(own.min()) <= int(own.max()) < side for own, side in pairs):
                raise BadInput(
                    f"the checkpoint trains rows or columns of {name} that the targets do not have; resume with the "
                    "model and the targets that it was made with."
                )
        self._swap(model, {name: entry["places"] for name, entry in saved.items()})
        self._step = state["step"]
        self._measure(self._step + 1)
        for name, (_, layer) in self._swapped.items():
            if "left" in saved[name]:
                self._left[name] = Former.load(saved[name]["left"], layer.get_parameter("weight"))
            if name in self._measured and "importance" in saved[name]:
                self._measured[name].load(saved[name]["importance"])

    def _targets(self, model: nn.Module, compute: Callable[..., Any]) -> dict[str, Any]:
        return entry_targets(model, self.targets, compute, type(self).__name__)

    def _share(self, model: nn.Module, linears: Mapping[str, Any]) -> float:
        """Return the share of each target that trains."""
        there = sum(linear.weight.numel() for linear in linears.values())
        return wanted("LoSiA", self.trainable_fraction, weight_count(model), there, self.targets) / there

    def _drawn(self, name: str, shape: torch.Size, share: float) -> tuple[Tensor, Tensor]:
        """Return random rows and columns, so many of each that together they are `share` of a weight."""
        rows = max(1, round(math.sqrt(share) * shape[0]))
        columns = min(shape[1], max(1, round(share * shape.numel() / rows)))
        first, second = (
            top_entries(random_scores(torch.Size([n]), self.seed, axis, name), count)
            for axis, (n, count) in enumerate(zip(shape, (rows, columns), strict=True))
        )
        return first, second

    def _swap(self, model: nn.Module, places: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        model.requires_grad_(False)
        for name, (rows, columns) in places.items():
            original = model.get_submodule(name)
            layer = SubnetLinear(original, rows, columns)  # pyright: ignore[reportArgumentType]
            replace(model, name, layer)
            self._swapped[name] = original, layer
        self._turns = _by_layer(places)

    # ---- whose turn it is

    def _measure(self, step: int) -> None:
        """Measure the matrices whose turn it is at optimizer step `step` (from 1), and no others."""
        if self.reselect is None:
            return
        names = self._turns[(step - 1) // self.reselect % len(self._turns)]
        self._measured = {}
        for name, (_, layer) in self._swapped.items():
            layer.observe = None
            if name in names:
                importance = Importance(self.decay, layer.get_parameter("weight").shape, layer.rows.device)
                layer.observe, self._measured[name] = importance.add, importance

    def _recovering(self, step: int) -> tuple[list[str], float]:
        """Return the matrices whose subnets moved last before optimizer step `step`, and the factor of their update."""
        if self.reselect is None or step <= self.reselect:
            return [], 1.0
        slot, place = divmod(step - 1, self.reselect)
        steps = self.reselect if self.recovery_steps is None else self.recovery_steps
        names = self._turns[(slot - 1) % len(self._turns)]
        return (names, (place + 1) / steps) if place + 1 < steps else ([], 1.0)

    # ---- training

    def scale_gradients(self, factor: Tensor) -> None:
        for importance in self._measured.values():
            importance.window *= factor

    def skip_step(self) -> None:
        for importance in self._measured.values():
            importance.window.zero_()

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        for name, importance in self._measured.items():
            importance.end_step(self._swapped[name][1].get_parameter("weight"))
        self._before = {name: self._swapped[name][1].subnet.detach().clone() for name in self._recovering(step)[0]}

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        factor = self._recovering(step)[1]
        for name, before in self._before.items():
            subnet = self._swapped[name][1].subnet
            subnet.copy_(before.lerp_(subnet, factor))
        self._before.clear()
        for _, layer in self._swapped.values():
            layer.write()
        self._step = step
        if self.reselect is not None and step % self.reselect == 0:
            for name, importance in self._measured.items():
                if not importance.steps:  # the losses of all steps of the slot were not finite
                    continue
                layer = self._swapped[name][1]
                self._move(name, layer, importance.best(len(layer.rows), len(layer.columns)), optimizer)
            self._measure(step + 1)
        return False  # the parameters are the same objects, of the same sizes

    def _move(self, name: str, layer: SubnetLinear, new: tuple[Tensor, Tensor], optimizer: Optimizer) -> None:
        weight = layer.get_parameter("weight")
        if not has_values(weight):  # a planned training, of whose later changes the first stands for all
            self._left = {
                other: Former.of_size(one.subnet.numel(), one.get_parameter("weight"))
                for other, (_, one) in self._swapped.items()
            }
            return
        optimizer.state.pop(layer.subnet, None)
        old, values = layer.positions, layer.subnet.detach().flatten().clone()
        layer.choose(*new)
        self._left[name] = self._left.get(name, Former.none(weight)).changed(old, values, layer.positions)

    def written(self) -> Iterator[nn.Parameter]:
        for _, layer in self._swapped.values():
            yield layer.get_parameter("weight")

    # ---- what is kept

    def detach(self, model: nn.Module) -> None:
        for name, (original, layer) in self._swapped.items():
            layer.observe = None
            layer.write()
            replace(model, name, original)
        for kept in (self._swapped, self._measured, self._left, self._before):
            kept.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "matrices": {name: self._state_of(name) for name in self._swapped}}

    def _state_of(self, name: str) -> dict[str, Any]:
        layer = self._swapped[name][1]
        state: dict[str, Any] = {"places": [layer.rows, layer.columns]}
        if name in self._left:
            state["left"] = self._left[name].state_dict()
        if name in self._measured and self._measured[name].steps:
            state["importance"] = self._measured[name].state_dict()
        return state

    def held(self) -> Any:
        """Return the state, and the averages and gradients of what is measured."""
        measured = [[each.mean, each.spread, each.window] for each in self._measured.values()]
        return [self.state_dict(), measured]

    def describe(self) -> dict[str, Any]:
        """Return the numbers of trained entries, and of those that trained before; and the trained share by role."""
        layers = {name: layer for name, (_, layer) in self._swapped.items()}
        numbers = {name: (layer.subnet.numel(), math.prod(layer.matrix.shape)) for name, layer in layers.items()}
        return described(numbers, self._left.values())


def _by_layer(names: Iterable[str]) -> list[list[str]]:
    """Return the names of matrices by the decoder layer that they are in; what is in none stands alone."""
    out: dict[str, list[str]] = {}
    for name in names:
        number = re.match(r".*?\.\d+(?=\.)", name)
        out.setdefault(number[0] if number else name, []).append(name)
    return list(out.values())
