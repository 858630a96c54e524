"""Calls, floating-point operations and bytes of every op of a training step, counted from their shapes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lit_sparse_profiling.attention_flops import attention_flops, is_attention, is_causal
from lit_sparse_profiling.ledger import storages, tensors

ALLOCATES = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::empty_permuted"),
    *("aten::new_empty", "aten::new_empty_strided", "aten::record_stream"),
}
"""Their outputs are not written, whatever their schemas say."""

OVERWRITES = {
    *("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_", "aten::bernoulli_"),
    *("aten::_foreach_copy_", "aten::_foreach_zero_", "aten::nll_loss_backward"),
}
"""Their `self` is not read: it is written to, or tells no more than a shape."""

PICKS = {
    **dict.fromkeys(("aten::index", "aten::index_select", "aten::gather", "aten::nll_loss_forward"), "self"),
    **dict.fromkeys(("aten::index_put_", "aten::_index_put_impl_", "aten::index_add_", "aten::index_copy_"), "self"),
    **dict.fromkeys(("aten::scatter_", "aten::scatter_add_"), "self"),
    "aten::embedding": "weight",
}
"""The argument of which they touch only as much as their other tensors have."""

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul", "gemm", "conv", "convolution", "linear", "attention", "attn"}
"""Words in the names of ops that multiply matrices: one without a formula is reported, not taken for free."""


def _grouped(given: Mapping[str, Any]) -> int:
    """FLOPs of one product a group, which share out the rows, the columns or the sum of a single one."""
    left, right = [tensor.shape for tensor in given.values() if isinstance(tensor, Tensor)][:2]
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2 * groups * math.prod(left[-2:]) * right[-1]


FORMULAS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "aten::_grouped_mm": _grouped,
    "aten::_int_mm": _grouped,
    "aten::_addmm_activation": lambda given: 2 * math.prod(given["mat1"].shape) * given["mat2"].shape[-1],
    "transformers::grouped_mm_fallback": _grouped,
    "transformers::grouped_mm_fallback_backward": lambda given: 2 * _grouped(given),
}
"""Formulas that torch lacks, of the arguments by name: experts of a mixture, 8-bit products."""


@dataclass
class OpCount:
    """All calls of one op: `bytes` are those read and written, each once; None is what there is no count of."""

    calls: int = 0
    flops: int | None = None
    bytes: int | None = None


class OpCounts(TorchDispatchMode):
    """Counts the ops that run inside the block, forward and backward: `with OpCounts() as counts: ...`.

    For one whole training step that is not timed; what it has counted stays when the block ends, no tensor does. FLOPs
    are those of matrix products, convolutions and attention, by the formulas in torch's `flop_registry`, where this
    project's kernels register theirs too, and in `attention_flops`. Causal attention counts as full in `flops`, and
    `masked` is the half that its mask rules out. Bytes are those that a perfect kernel would move: every tensor that
    the op reads and every one that it writes, once. A dimension that was expanded counts once, and ops that only make
    views or allocate move nothing.

    Attributes:
        ops: By name as torch.profiler spells it (`aten::mm`). Of an op that is made of others these
            are there; of a higher-order op (cond, flex attention) only itself is, without bytes.
        recomputed: FLOPs of the forward ops that run again in the backward pass, for activation checkpointing.
        masked: Half of the FLOPs of causal attention, recomputed ones not included. Attention is causal if the op was
            told so or if its mask rules out all later positions; attention made of plain products counts as full.
        masked_recomputed: The same of recomputed ones.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, OpCount] = {}
        self.recomputed = self.masked = self.masked_recomputed = 0
        self._plain_backwards: set[int] = set()

    @property
    def uncounted(self) -> dict[str, int]:
        """Calls of ops that multiply matrices, judging by their names, and for which no formula is known."""
        unknown = {name: op.calls for name, op in self.ops.items() if op.flops is None}
        return {name: calls for name, calls in unknown.items() if PRODUCTS & set(name.rpartition("::")[2].split("_"))}

    @property
    def flops(self) -> int:
        """Floating-point operations of all ops."""
        return sum(op.flops or 0 for op in self.ops.values())

    @property
    def bytes(self) -> int:
        """Bytes that all ops read and wrote."""
        return sum(op.bytes or 0 for op in self.ops.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):
            with self:  # in inference mode composite ops come here whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        overload = isinstance(func, OpOverload)
        count = self.ops.setdefault(func._schema.name if overload else func.name(), OpCount())
        count.calls += 1
        given = bound(func, args, kwargs) if overload else {}
        flops = flops_of(func, given, args, kwargs, out)
        if flops is not None:
            count.flops = (count.flops or 0) + flops
            self._add_parts(flops, given)
        if overload:
            count.bytes = (count.bytes or 0) + moved_bytes(func, given, out)

    def _add_parts(self, flops: int, given: dict[str, Any]) -> None:
        again, masked = self._recomputes(), flops // 2 if is_causal(given) else 0
        if again:
            self.recomputed += flops
            self.masked_recomputed += masked
        else:
            self.masked += masked

    def _recomputes(self) -> bool:
        """Return whether the op is a forward that runs again in the backward pass, as checkpointing does.

        Such a forward is recorded, for a backward of its own, and the backward around it is not. If that is too
        (`create_graph=True`), only the stack tells them apart.
        """
        if torch._C._current_autograd_node() is None:
            return False
        task = torch._C._current_graph_task_id()
        if not torch.is_grad_enabled():
            self._plain_backwards.add(task)
            return False
        return task in self._plain_backwards or _in_checkpoint()


def _in_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def flops_of(func: Any, given: Mapping[str, Any], args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int | None:
    """Return the FLOPs of a call; None if there is no formula for its op."""
    if not isinstance(func, OpOverload):  # a higher-order op, such as flex attention, has no schema
        if is_attention(func.name()):  # flex attention, for which torch 2.11 has no formula
            return attention_flops(func.name(), dict(zip(("query", "key", "value"), args, strict=False)))
        formula = flop_registry.get(func)
        return None if formula is None else formula(*args, **kwargs, out_val=out)
    name = func._schema.name
    if is_attention(name):
        return attention_flops(name, given)
    if name in FORMULAS:
        return FORMULAS[name](given)
    formula = flop_registry.get(func.overloadpacket) or flop_registry.get(_in_new_memory(name))
    return None if formula is None else formula(*args, **kwargs, out_val=out)


@cache
def has_formula(func: Any) -> bool:
    """Return whether `flops_of` may have a formula for an op; those without need no arguments by name."""
    if not isinstance(func, OpOverload):
        return True
    name = func._schema.name
    known = is_attention(name) or name in FORMULAS or func.overloadpacket in flop_registry
    return known or _in_new_memory(name) in flop_registry


def _in_new_memory(name: str) -> Any:
    """Return the op that does in new memory what this one does in its input's (`addmm` for `addmm_`); None: none."""
    namespace, _, own = name.partition("::")
    return getattr(getattr(torch.ops, namespace), own.removesuffix("_"), None) if own.endswith("_") else None


def bound(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names in the op's schema; those left at their defaults are absent."""
    return dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs


def moved_bytes(op: OpOverload, given: dict[str, Any], out: Any) -> int:
    """Return the bytes that a call of `op` with these arguments and this result read and wrote."""
    schema = op._schema
    if schema.name in ALLOCATES or torch.Tag.inplace_view in op.tags:
        return 0
    written = {argument.name for argument in schema.arguments if _is_written(argument, given)}
    fresh, viewed = _outputs(given, out)
    if viewed and not fresh and not written:
        return 0
    sizes = _sizes(given)
    if schema.name in PICKS:
        picked = PICKS[schema.name]
        others = sum(size for name, size in sizes.items() if name != picked)
        sizes[picked] = min(sizes[picked], others + fresh)
    unread = _unread(schema)
    return fresh + sum(size * ((name not in unread) + (name in written)) for name, size in sizes.items())


def _is_written(argument: Any, given: dict[str, Any]) -> bool:
    # the fused optimizers say that they write gradients: they do so only to take the loss scale out
    spared = argument.name == "grads" and given.get("grad_scale") is None
    return argument.is_write and not spared


def _unread(schema: Any) -> set[str]:
    """Names of the arguments that are not read: those to write to, and those that only tell a shape."""
    stem = schema.name.split("::")[-1]
    shape_only = schema.name in OVERWRITES or stem.endswith("_like") or stem.startswith("new_")
    return {argument.name for argument in schema.arguments if argument.is_out} | ({"self"} if shape_only else set())


def _outputs(given: dict[str, Any], out: Any) -> tuple[int, bool]:
    """Bytes of the outputs that live in no input's storage, and whether there are others."""
    known = {key for tensor in tensors(given) for key, _ in storages(tensor)}
    shares = [(span(tensor), any(key in known for key, _ in storages(tensor))) for tensor in tensors(out)]
    return sum(size for size, viewed in shares if not viewed), any(viewed for _, viewed in shares)


def _sizes(given: dict[str, Any]) -> dict[str, int]:
    """Bytes of each argument's tensors; a tensor that is given twice counts where it is given first."""
    seen: set[int] = set()

    def unseen(nested: Any) -> Iterator[Tensor]:
        for tensor in tensors(nested):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor

    return {name: sum(span(tensor) for tensor in unseen(value)) for name, value in given.items()}


def span(tensor: Tensor) -> int:
    """Bytes that a tensor shows: of a view only those seen through it, of an expanded dimension one."""
    if tensor.layout is not torch.strided:
        return sum(size for _, size in storages(tensor))
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride or not size else 1
    return numel * tensor.element_size()
