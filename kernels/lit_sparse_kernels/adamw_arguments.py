"""Arguments of the AdamW ops: the rule, the tensors of each item, and the checks that both ops share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_sparse_kernels.jit import FLOATS

FORMS = 4096
"""Forms of tensors that are remembered at most."""
_passed: set[tuple[Any, ...]] = set()
"""Forms of items that have passed `check_state`."""


@dataclass(frozen=True)
class Rule:
    """The arguments of AdamW, under the names that torch.optim.AdamW has for them."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False

    def factors(self) -> tuple[float, ...]:
        """Return the kernels' arguments, computed in double: decay, b1, +-(1 - b1), b2, 1 - b2, eps."""
        (first, second), sign = self.betas, -1.0 if self.maximize else 1.0  # v does not see the gradient's sign
        given = self.lr * self.weight_decay, first, sign * (1 - first), second, 1 - second, self.eps
        return tuple(map(float, given))  # an int would be another kernel

    def corrections(self, step: float) -> tuple[float, float]:
        """Of one step: lr / (1 - b1^t), sqrt(1 - b2^t)."""
        first, second = self.betas
        return self.lr / (1 - first**step), math.sqrt(1 - second**step)


class Item(NamedTuple):
    """One tensor's part; `master` is the weight itself where that is fp32."""

    weight: Tensor
    grad: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float

    def moved(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the kernels' tables."""
        return self.weight, self.grad, self.master, self.exp_avg, self.exp_avg_sq


def items_of(names: Sequence[str], lists: Sequence[Sequence[Any]]) -> list[Item]:
    """The lists tensor by tensor.

    Raises:
        ValueError: if their lengths differ.
    """
    for name, given in zip(names, lists, strict=True):
        if len(given) != len(lists[0]):
            raise ValueError(f"{name} has {len(given)} entries; expected {len(lists[0])}, as {names[0]} has.")
    return [Item(*row) for row in zip(*lists, strict=True)]


def check_state(number: int, item: Item, like: Tensor) -> None:
    """Refuse gradients and states that do not go with the master, whose shape and layout are to be those of `like`."""
    form = (like is item.weight, *map(_form, item.moved()))
    if form in _passed and item.step >= 1:  # all that is checked, at a tenth of the time
        return
    master = torch.promote_types(item.weight.dtype, torch.float32)
    allowed = FLOATS if item.weight.is_cuda else (*FLOATS, torch.float64)
    for name, tensor, dtypes in (
        ("weights", item.weight, allowed),
        ("grads", item.grad, allowed),
        ("masters", item.master, (master,)),
        ("exp_avgs", item.exp_avg, (master,)),
        ("exp_avg_sqs", item.exp_avg_sq, (master,)),
    ):
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}[{number}] is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}.")
        if tensor.device != like.device:
            raise ValueError(f"{name}[{number}] is on {tensor.device}; expected {like.device}.")
        if name != "weights" and tensor.shape != like.shape:
            raise ValueError(f"{name}[{number}] has shape {tuple(tensor.shape)}; expected {tuple(like.shape)}.")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}[{number}] is {tensor.layout}; expected a dense tensor.")
        if name != "weights" and not same_layout(tensor, like):
            raise ValueError(
                f"{name}[{number}] has strides {tensor.stride()}; expected {like.stride()}, without gaps or overlap."
            )
    if item.step < 1:
        raise ValueError(f"steps[{number}] is {item.step}; expected 1 or more.")
    if len(_passed) >= FORMS:
        _passed.clear()
    _passed.add(form)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    return tensor.dtype, tensor.device, tensor.shape, strides, tensor.layout


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Return whether elements have the same order in memory, without gaps, so that both can be read end to end."""
    if tensor.is_contiguous() and other.is_contiguous():
        return True
    return tensor.stride() == other.stride() and _is_dense(other)


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def scale_on(device: torch.device, grad_scale: Tensor | None) -> Tensor | None:
    """The scale where the kernel reads it.

    Raises:
        ValueError: if it is no single fp32 number.
    """
    if grad_scale is None:
        return None
    if grad_scale.numel() != 1 or grad_scale.dtype != torch.float32:
        raise ValueError(
            f"grad_scale is {grad_scale.dtype} of shape {tuple(grad_scale.shape)}; expected one torch.float32 number."
        )
    return grad_scale.to(device, non_blocking=True)
