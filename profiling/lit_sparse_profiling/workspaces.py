"""Bytes that kernels allocate for themselves while an op runs, beside its outputs; for `trace.Trace`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten

SUMS = {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}
"""Reductions that copy an operand of another dtype than their result's."""


def cpu_workspace(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the bytes of a CPU kernel: copies of operands that have another dtype than the computation."""
    if func in SUMS:
        return 0 if args[0].dtype is out.dtype else args[0].numel() * out.itemsize
    if not isinstance(func, OpOverload) or torch.Tag.pointwise not in func.tags:
        return 0
    operands = args[1:] if func is aten.where.self else args  # a condition is read as it is
    given = [tensor for tensor in operands if isinstance(tensor, Tensor)]
    dtypes = {tensor.dtype for tensor in given if tensor.ndim}
    if len(dtypes) < 2 or func is aten._to_copy.default:
        return 0
    common = given[0].dtype
    for tensor in given[1:]:
        common = torch.promote_types(common, tensor.dtype)
    return sum(tensor.numel() * common.itemsize for tensor in given if tensor.ndim and tensor.dtype != common)
