"""The optimizer of methods without a backward pass: losses along directions, and what is kept from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput
from lit_sparse.optim import part_of
from lit_sparse.zeroth_order.directions import Part
from lit_sparse.zeroth_order.perturbed import Make, Perturbed, Place, places_of

Closure = Callable[[], Tensor]
"""Returns the loss of the step's batch, a scalar that is the same on all ranks."""


class Recorded:
    """Stands for the closure of a step that is taken again from a log.

    Args:
        slopes: The loss's slope along each direction; NaN where the step was skipped.
    """

    def __init__(self, slopes: Sequence[float]) -> None:
        self.slopes = list(slopes)


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
    """

    def __init__(self, model: nn.Module, closure: Closure) -> None:
        self._model, self._closure = model, closure
        self._random: tuple[Tensor, Tensor | None] | None = None
        self._places = places_of(model)

    def plain(self) -> Tensor:
        """Return the loss at the weights."""
        self._replay_random()
        loss = self._closure()
        if loss.numel() != 1:
            raise BadInput(
                f"the objective is a tensor of shape {tuple(loss.shape)}, but a step compares single numbers; return "
                "its mean."
            )
        return loss.detach().reshape(())

    def beside(self, make: Make) -> Tensor:
        """Return the loss at weights as `make` perturbs them."""
        mode = Perturbed(self._model, self._places, make)
        with mode:
            loss = self.plain()
        check_read(mode.read, self._places)
        return loss

    def _replay_random(self) -> None:
        """Give each forward pass the random state that the first one had."""
        device = next(self._model.parameters()).device
        if self._random is None:
            there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            self._random = torch.get_rng_state(), there
            return
        here, there = self._random
        torch.set_rng_state(here)
        if there is not None:
            torch.cuda.set_rng_state(there, device)


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
                "model.lr or epsilon, or check the data."
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
