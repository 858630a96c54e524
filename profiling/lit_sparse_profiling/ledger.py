"""Exact bytes of what a training state holds, and of what a forward pass saves for backward.

What counts is the storage, not the tensor: a view keeps its whole storage alive. Tensors that share a storage count
once. Of a distributed tensor, the local shard counts. A tensor on the meta device, or a fake one, counts what it
would take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_sparse_profiling.record import Ledger

Key = tuple[str, int]
"""Names a storage for as long as it is alive."""

Share = tuple[Key, int]
"""A storage's key and its bytes."""


def ledger(model: nn.Module, optimizer: Optimizer | None = None, strategy_state: Any = None) -> Ledger:
    """The bytes that are held now, by category.

    A storage in several categories counts in the first of: trainable weights, frozen weights, buffers, gradients,
    optimizer state, strategy state. Parameters that only the optimizer knows count as the model's own do.

    Args:
        model: Its parameters, their gradients and its buffers, non-persistent ones too.
        optimizer: Its state and options as far as they are tensors; what other objects hold in there is not seen.
        strategy_state: Tensors nested in dicts, lists and tuples; everything else in there is ignored.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    weights = [*model.parameters(), *(p for group in groups for p in group["params"])]
    held = {
        "trainable": [p for p in weights if p.requires_grad],
        "frozen": [p for p in weights if not p.requires_grad],
        "buffers": model.buffers(),
        "gradients": [p.grad for p in weights if p.grad is not None],
        "optimizer": [] if optimizer is None else tensors([optimizer.state, groups]),
        "strategy": tensors(strategy_state),
    }
    seen: set[Key] = set()
    return Ledger(**{category: _unseen_bytes(members, seen) for category, members in held.items()})


def tensors(nested: Any) -> Iterator[Tensor]:
    """All tensors in dicts' values, lists, tuples and sets, however deep; what else is in there is passed over."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        yield from tensors(list(nested.values()))
    elif isinstance(nested, list | tuple | Set):
        for item in nested:
            yield from tensors(item)


class SavedBytes:
    """Bytes of the storages that autograd holds for backward: `now`, and at most so far, `peak`."""

    def __init__(self, exclude: nn.Module) -> None:
        self.now = 0
        self.peak = 0
        self._excluded = {key for t in [*exclude.parameters(), *exclude.buffers()] for key, _ in storages(t)}
        self._holders: Counter[Key] = Counter()

    def take(self, shares: list[Share]) -> None:
        """One more saved tensor lives in these storages."""
        for key, size in shares:
            self.now += 0 if self._holders[key] or key in self._excluded else size
            self._holders[key] += 1
        self.peak = max(self.peak, self.now)

    def release(self, shares: list[Share]) -> None:
        """One saved tensor in these storages is gone."""
        for key, size in shares:
            self._holders[key] -= 1
            self.now -= 0 if self._holders[key] or key in self._excluded else size


class _Packed:
    """A saved tensor in autograd's hands. Autograd drops it when it drops the tensor: no address is reused before."""

    def __init__(self, tensor: Tensor, shares: list[Share], counter: SavedBytes) -> None:
        self.tensor, self.shares, self.counter = tensor, shares, counter
        counter.take(shares)

    def __del__(self) -> None:
        self.counter.release(self.shares)


@contextmanager
def saved_for_backward(exclude: nn.Module) -> Iterator[SavedBytes]:
    """Count what the forward passes inside this block save for backward; backward may run inside or later.

    `peak` is the most that was saved at one time, so that it also holds for accumulated batches. The storages of
    `exclude`'s parameters and buffers do not count; a batch that is saved does. Use it for an untimed step. Not seen
    are tensors that a custom function keeps without `save_for_backward`, and what non-reentrant activation
    checkpointing computes again during backward.
    """
    counter = SavedBytes(exclude)

    def pack(tensor: Tensor) -> _Packed:
        return _Packed(tensor, list(storages(tensor)), counter)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        yield counter


def storages(tensor: Tensor) -> Iterator[Share]:
    """The storages that hold `tensor`: one, or those of the parts of a sparse, distributed or quantized tensor."""
    parts = _parts(tensor)
    for part in parts:
        yield from storages(part)
    if not parts:
        storage = tensor.untyped_storage()
        # fake and meta storages have no address, and are told apart by themselves
        identity = storage._cdata if storage.device.type == "meta" else storage.data_ptr()
        yield (str(storage.device), identity), storage.nbytes()


def _parts(tensor: Tensor) -> list[Tensor]:
    if is_traceable_wrapper_subclass(tensor):  # DTensor, torchao's quantized tensors: the outer storage is a dummy
        return list(tensors([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]))
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def _unseen_bytes(members: Iterable[Tensor], seen: set[Key]) -> int:
    """Bytes of the members' storages that are not in `seen` yet; adds them to it."""
    fresh = {key: size for tensor in members for key, size in storages(tensor) if key not in seen}
    seen.update(fresh)
    return sum(fresh.values())
