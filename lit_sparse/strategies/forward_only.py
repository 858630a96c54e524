"""Shared hooks, steps and step logs of methods without a backward pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput
from lit_sparse.optim import trainable
from lit_sparse.strategies.base import Attaches, Backward, BaseWeights, Claim, Context, Probe
from lit_sparse.strategies.updates import Updates
from lit_sparse.zeroth_order.directions import Part
from lit_sparse.zeroth_order.optimizer import Closure, ForwardOnly, Losses, Recorded, Skips, finite, named_errors
from lit_sparse.zeroth_order.perturbed import Place, check_model, places_of

MEASURING = frozenset({"epsilon", "micro_batch", "probes_at_once", "max_skipped"})
"""Settings on which losses depend, and a step that is taken again from its numbers does not."""


class ForwardOnlyMethod(ABC):
    """The common part of strategies without a backward pass; a method is this, `UpdateStrategy` and a dataclass.

    A method has the settings `weight_decay`, `micro_batch`, `probes_at_once`, `max_skipped` and `seed`, calls
    `_prepare` when it is made, and defines `_fields`, `_count`, `_measure` and `_move`. A step is a few numbers that
    are measured, the same on all ranks, and what they do to the weights. So a step can be taken again from its numbers.

    Attributes:
        probing: Settings of the method that only the numbers depend on.
    """

    claims: ClassVar[frozenset[Claim]] = frozenset({"optimizer", "backward"})
    backward: ClassVar[Backward] = "none"
    base: ClassVar[BaseWeights] = "kept"
    attaches_to: ClassVar[Attaches] = "either"
    accumulates: ClassVar[bool] = True
    masters: ClassVar[bool] = False
    probing: ClassVar[frozenset[str]] = MEASURING

    weight_decay: float
    micro_batch: int | None
    probes_at_once: int
    max_skipped: int
    seed: int

    def _prepare(self) -> None:
        self._model: nn.Module | None = None
        self._optimizer: ForwardOnly | None = None
        self._places: dict[Tensor, Place] = {}
        self._step = 0
        self._skips = Skips(self._name, self.max_skipped)
        self._tape = Tape({})
        self._shown: dict[str, Tensor] = {}

    @property
    def _name(self) -> str:
        return type(self).__name__

    # ---- what a method defines

    @property
    @abstractmethod
    def _fields(self) -> list[str]:
        """Names of the fp32 tensors that each parameter has as its state."""

    @property
    @abstractmethod
    def _count(self) -> int:
        """How many numbers this step has."""

    @abstractmethod
    def _measure(self, losses: Losses) -> tuple[list[float], Tensor]:
        """Return the numbers of the step, and its loss."""

    @abstractmethod
    def _move(self, parts: Sequence[Part], numbers: Sequence[float], lr: float) -> None:
        """Move the weights as the numbers, all finite, say."""

    def _begin(self, parts: Sequence[Part]) -> None:
        """Prepare for a step, before its first loss."""

    def _to_show(self, numbers: Sequence[float]) -> dict[str, float]:
        """Return what is logged of a step, by name."""
        return {}

    # ---- hooks

    @property
    def rows_at_once(self) -> int | None:
        return self.micro_batch

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._model, self._tape = model, self._new_tape(model, context)

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._model, self._tape = model, self._new_tape(model, context)
        self._skips.total, self._skips.row = state["skipped"]
        self._tape.load(state)

    def _new_tape(self, model: nn.Module, context: Context) -> Tape:
        dtype = next(model.parameters()).dtype
        return Tape({**recipe([self, *context.siblings]), "model.precision": str(dtype).removeprefix("torch.")})

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        self._optimizer = ForwardOnly(groups, lr, self.weight_decay, self._fields, self._take)
        return self._optimizer

    def regrouped(self, optimizer: Optimizer) -> None:
        assert self._model is not None, "attach or restore it first"
        check_model(self._model, self._name)
        places = places_of(self._model)
        self._places = {parameter: places[name] for name, parameter in trainable(self._model)}

    def detach(self, model: nn.Module) -> None:
        self._model, self._optimizer, self._places = None, None, {}

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        self._step = step

    def _take(self, closure: Closure | Recorded) -> Tensor:
        assert self._model is not None
        assert self._optimizer is not None
        parts, lr = self._optimizer.parts(self._places), self._optimizer.param_groups[0]["lr"]
        self._begin(parts)
        if isinstance(closure, Recorded):
            numbers, loss = closure.first(self._count), torch.tensor(math.nan)
        else:
            with named_errors(self._name):
                numbers, loss = self._measure(Losses(self._model, closure, self.probes_at_once))
        self._tape.note(lr, numbers)
        if finite(numbers):
            self._move(parts, numbers, lr)
            self._skips.go_on()
        else:
            self._skips.skip()
        shown = {**self._to_show(numbers), "skipped": float(self._skips.total)}
        self._shown = {f"{self._name.lower()}_{name}": loss.new_tensor(value) for name, value in shown.items()}
        return loss

    def logged(self) -> Mapping[str, Tensor]:
        """Return numbers of the last step, and how many steps were skipped."""
        return self._shown

    # ---- what is kept

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": [self._skips.total, self._skips.row], **self._tape.state()}

    @property
    def tape(self) -> Tape:
        """The numbers of all steps so far."""
        return self._tape


class Tape:
    """The numbers of a run's steps, from which they can be taken again.

    Args:
        recipe: The settings that the steps depend on beside their numbers, by name, as texts.

    Attributes:
        recipe: Those settings.
        changed: The settings that were others in earlier steps, with their values then, as a text; empty if none were.
    """

    def __init__(self, recipe: Mapping[str, str]) -> None:
        self.recipe, self._rows = dict(recipe), list[list[float]]()
        self.changed = ""

    def note(self, lr: float, numbers: Sequence[float]) -> None:
        """Add a step, with NaN for its numbers if one of them is not finite: it was skipped."""
        self._rows.append([lr, *(numbers if finite(numbers) else [math.nan] * len(numbers))])

    @property
    def log(self) -> Tensor:
        """Learning rate and numbers of each step, with NaN for those that it has not: (steps, 1 + most) float64."""
        width = max(map(len, self._rows), default=1)
        padded = [[*row, *[math.nan] * (width - len(row))] for row in self._rows]
        return torch.tensor(padded, dtype=torch.float64).view(-1, width)

    def state(self) -> dict[str, Any]:
        """Return what `load` takes."""
        return {"log": self.log, "recipe": self.recipe, "changed": self.changed}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; a state of before there were recipes is taken for one of the same."""
        self._rows = state["log"].tolist() if "log" in state else []
        then = state.get("recipe", self.recipe)
        others = [f"{name} was {value}" for name, value in then.items() if self.recipe.get(name) != value]
        self.changed = state.get("changed") or ", ".join(others)


def recipe(strategies: Iterable[Any]) -> dict[str, str]:
    """Return what steps depend on beside their numbers, by name, as texts.

    That is the settings of the forward-only method, and of what decides on the trainable set (LISA).
    """
    found: dict[str, str] = {}
    for one in strategies:
        probing = getattr(one, "probing", None)
        if probing is None and ("trainable" not in one.claims or "modules" in one.claims):
            continue
        named = [field.name for field in fields(one) if field.init and field.name not in (probing or ())]
        found |= {f"{type(one).__name__}.{name}": repr(getattr(one, name)) for name in named}
    return found


def take_again(
    updates: Updates, optimizer: Optimizer, log: Tensor, changed: Callable[[], object] | None = None
) -> None:
    """Take the steps of a log, from the first on.

    Args:
        updates: The strategies that took them, as they are before their first step.
        optimizer: Theirs.
        log: As `Tape.log`.
        changed: Called where the trainable set changed, in place of `updates.regroup`.
    """
    for step, (lr, *numbers) in enumerate(log.tolist(), 1):
        updates.before_step(step, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.no_grad():
            optimizer.step(Recorded(numbers))  # pyright: ignore[reportArgumentType, reportCallIssue]
        if updates.after_step(step, optimizer):
            updates.regroup(optimizer) if changed is None else changed()


def check_at_least(strategy: Any, least: Mapping[str, float]) -> None:
    """Refuse settings below a bound; None passes.

    Raises:
        BadInput: naming the first.
    """
    for name, bound in least.items():
        value = getattr(strategy, name)
        if value is not None and value < bound:
            raise BadInput(f"{type(strategy).__name__}: {name} is {value}; it must be at least {bound}.")


def check_above_zero(strategy: Any, *names: str) -> None:
    """Refuse settings that are not above 0 and finite; None passes.

    Raises:
        BadInput: naming the first.
    """
    for name in names:
        value = getattr(strategy, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"{type(strategy).__name__}: {name} is {value}; it must be above 0.")


def check_one_of(strategy: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Refuse settings that are none of their choices.

    Raises:
        BadInput: naming the first.
    """
    for name, allowed in choices.items():
        value = getattr(strategy, name)
        if value not in allowed:
            raise BadInput(f"{type(strategy).__name__}: {name} is {value!r}; give one of {', '.join(allowed)}.")
