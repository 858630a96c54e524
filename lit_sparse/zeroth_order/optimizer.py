"""The optimizer of methods without a backward pass: losses along directions, and what is kept from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput
from lit_sparse.optim import device_of, part_of
from lit_sparse.zeroth_order.directions import Part
from lit_sparse.zeroth_order.perturbed import Make, Perturbed, Place, places_of
from lit_sparse.zeroth_order.together import RandomState, Together, random_state, set_random_state

Closure = Callable[[], Tensor]
"""Returns the loss of the step's batch, a scalar that is the same on all ranks."""


class Recorded:
    """Stands for the closure of a step that is taken again from a log.

    Args:
        numbers: What was measured in the step; NaN where it was skipped.
    """

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers = list(numbers)

    def first(self, count: int) -> list[float]:
        """Return as many numbers as a step has: others in the log have more.

        Raises:
            BadInput: if there are fewer.
        """
        if len(self._numbers) < count:
            raise BadInput(
                f"a step has {count} numbers with these settings, but the log has {len(self._numbers)} of each; take "
                "the settings of the run that wrote it."
            )
        return self._numbers[:count]


class ForwardOnly(Optimizer):
    """An optimizer whose steps are a method's: `take(closure)` returns the loss of the step.

    Args:
        groups: Parameter groups with `param_names`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay of the groups that set none of their own.
        fields: Names of the fp32 tensors that each parameter has as its state, zero at first.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        fields: Sequence[str],
        take: Callable[[Closure | Recorded], Tensor],
    ) -> None:
        self._take, self._fields = take, tuple(fields)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure | Recorded | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step, and return its loss.

        Raises:
            TypeError: without a closure: the losses are all that the method learns from.
        """
        if closure is None:
            raise TypeError("a step without gradients needs the closure that computes the loss.")
        return self._take(closure)

    def parts(self, places: Mapping[Tensor, Place]) -> list[Part]:
        """Return what trains here, with its state, which is made where there is none."""
        found = []
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in self._fields:
                    if name not in state:
                        state[name] = torch.zeros_like(parameter, dtype=_state_dtype(parameter))
                keep = 1 - group["lr"] * group["weight_decay"]
                here = part_of(parameter)
                found.append(Part(here.values, places[parameter], here.start[0], state, keep))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; unlike torch, leave its tensors in fp32 beside parameters in bf16."""
        super().load_state_dict(state_dict)
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        keys = [key for group in self._reordered(state_dict) for key in group["params"]]
        for parameter, key in zip(own, keys, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, _state_dtype(parameter), copy=True)

    def _reordered(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the groups of a state as the hooks put them into this optimizer's order (`match_by_name`)."""
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        return state_dict["param_groups"]


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


class Losses:
    """Computes losses at the weights and beside them, all of a step with the same dropout masks.

    Args:
        model: The model.
        closure: Returns the loss of the step's batch.
        at_once: Losses that a forward pass computes. More than one need a closure that has `of_probes`, as
            `lit_sparse.modules.forward_only.WindowLoss`.
    """

    def __init__(self, model: nn.Module, closure: Closure, at_once: int = 1) -> None:
        self._model, self._closure, self._at_once = model, closure, at_once
        self._random: RandomState | None = None
        self._places = places_of(model)
        if at_once > 1 and not hasattr(closure, "of_probes"):
            raise BadInput(
                f"probes_at_once is {at_once}, but the given loss function takes one batch at a time; set it to 1, or "
                "give an object that also has of_probes(), as modules.forward_only.WindowLoss."
            )

    def of(self, makes: Sequence[Make | None]) -> list[Tensor]:
        """Return the loss at the weights as each of `makes` perturbs them; None leaves them."""
        return [loss for loss, _ in self._each(makes, rows=False)]

    def of_rows(self, makes: Sequence[Make | None]) -> list[tuple[Tensor, Tensor]]:
        """Return the same, each with the losses of this rank's rows (N,), from the same passes.

        Raises:
            BadInput: if the closure does not know them.
        """
        if not hasattr(self._closure, "of_rows"):
            raise BadInput(
                "the curvature is estimated from the losses of single examples, but the given loss function returns "
                "their mean only; give an object that also has of_rows(), as modules.forward_only.WindowLoss."
            )
        return self._each(makes, rows=True)

    def _each(self, makes: Sequence[Make | None], rows: bool) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(makes), self._at_once):
            some = makes[start : start + self._at_once]
            found += [self._one(some[0], rows)] if len(some) == 1 else self._together(some)
        return found

    def _one(self, make: Make | None, rows: bool) -> tuple[Tensor, Tensor]:
        self._replay_random()
        mode = None if make is None else Perturbed(self._model, self._places, make)
        with mode or nullcontext():
            loss, of_rows = self._closure.of_rows() if rows else (self._closure(), torch.empty(0))  # pyright: ignore[reportFunctionMemberAccess]
        if loss.numel() != 1:
            raise BadInput(
                f"the objective is a tensor of shape {tuple(loss.shape)}, but a step compares single numbers; return "
                "its mean."
            )
        if mode is not None:
            check_read(mode.read, self._places)
        return loss.detach().reshape(()), of_rows

    def _together(self, makes: Sequence[Make | None]) -> list[tuple[Tensor, Tensor]]:
        self._replay_random()
        mode = Together(self._model, self._places, makes)
        losses, rows = self._closure.of_probes(mode)  # pyright: ignore[reportFunctionMemberAccess]
        check_read(mode.read, self._places)
        return list(zip(losses.detach(), rows, strict=True))

    def _replay_random(self) -> None:
        """Give each forward pass the random state that the first one had."""
        device = device_of(next(self._model.parameters()))  # of a shard in host memory the GPU, which draws the masks
        if self._random is None:
            self._random = random_state(device)
        else:
            set_random_state(self._random, device)


def check_read(read: set[str], places: Mapping[str, Place]) -> None:
    """Refuse weights that the loss does not read, which steps would move at random; experts may have had no token.

    Raises:
        BadInput: naming the first.
    """
    if unread := [name for name in places if name not in read and "expert" not in name]:
        raise BadInput(
            f"the loss reads nothing of {len(unread)} of the {len(places)} weights that train, the first is "
            f"{unread[0]}, so its steps would be noise; freeze it, or train an adapter (mezo_lora.yaml)."
        )


def finite(losses: Sequence[float]) -> bool:
    """Return whether all losses are numbers."""
    return all(math.isfinite(loss) for loss in losses)


class Skips:
    """Counts steps that were skipped since a loss was no finite number, and ends a run that only skips.

    Args:
        method: Name of the strategy.
        most: Steps in a row that may be skipped.

    Attributes:
        total: All so far.
        row: Those in a row.
    """

    def __init__(self, method: str, most: int) -> None:
        self._method, self._most = method, most
        self.total = self.row = 0

    def skip(self) -> None:
        """Count a step.

        Raises:
            BadInput: if it is one too many.
        """
        self.total, self.row = self.total + 1, self.row + 1
        if self.row > self._most:
            raise BadInput(
                f"{self._method}: the losses of {self.row} steps in a row are not finite, and were skipped; lower "
                "model.lr or epsilon, check the data, or raise the method's max_skipped."
            )

    def go_on(self) -> None:
        """Note a step that was taken."""
        self.row = 0


@contextmanager
def named_errors(method: str) -> Iterator[None]:
    """Begin the sentence of an error with the strategy's name."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{method}: {error}") from error
