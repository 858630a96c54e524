"""Properties of an op for the trace: its name, and what it would do with unknown values and its operands' memory."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

INNER = {"_run", "__torch_dispatch__", "_fn", "inner"}
"""Frames between an op and its caller."""


def name_of(func: Any) -> str:
    """Return the name of an op without its namespace: `mm`."""
    return func.overloadpacket.__name__ if isinstance(func, OpOverload) else str(func)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values, and in the lists and tuples among them: all that an op takes or returns."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def is_mask(index: Any) -> bool:
    """Return whether an index selects by truth values that are unknown."""
    return isinstance(index, FakeTensor) and index.dtype is torch.bool


def accumulated(args: Sequence[Any], given: Collection[int] = ()) -> Tensor | None:
    """Return the operand of an addition that autograd's engine would overwrite with the sum; None if it would not.

    The engine adds up the gradients of a tensor that is used twice. It does so in place where it has the last reference
    to one of them (`can_accumulate_inplace` in torch/csrc/autograd/input_buffer.cpp), but never within a dispatch mode.
    Storages in `given` belong to the code that called it, too.
    """
    if torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1 or not isinstance(args[1], Tensor):
        return None
    caller = sys._getframe(1)
    while caller is not None and caller.f_code.co_name in INNER:
        caller = caller.f_back
    if caller is None or caller.f_code.co_name != "_engine_run_backward":  # Python code of a backward pass adds
        return None
    one, other = args[:2]
    if one.shape != other.shape or one.dtype != other.dtype:
        return None
    free = (tensor for tensor in (one, other) if tensor.untyped_storage()._cdata not in given)
    return next((tensor for tensor in free if is_last_reference(tensor)), None)


def is_last_reference(tensor: Tensor) -> bool:
    """Return whether the storage of a tensor that was passed to a dispatch mode has no other owner."""
    dense = tensor.is_contiguous() or tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return dense and torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == 2  # the tensor and Python


def written_real(func: Any, args: Sequence[Any]) -> bool:
    """Return whether an op would write unknown values into a real tensor."""
    if (
        not isinstance(func, OpOverload)
        or not args
        or not isinstance(args[0], Tensor)
        or isinstance(args[0], FakeTensor)
    ):
        return False
    alias = func._schema.arguments[0].alias_info
    return alias is not None and alias.is_write
