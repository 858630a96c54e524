"""Exact bytes of a training state: weights, gradients, optimizer and strategy state.

Storages count, not tensors: a view keeps its whole storage alive, and tensors that share a storage count once. Of a
sharded tensor, the local shard counts. A meta or fake tensor counts with the bytes that a real one would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_sparse_profiling.sections import Ledger

Key = tuple[str, int]
"""Device and address of a storage. It is unique only while the storage is alive."""

SizedKey = tuple[Key, int]
"""Key of a storage, and its bytes."""


def ledger(model: nn.Module, optimizer: Optimizer | None = None, strategy_state: Any = None) -> Ledger:
    """Return the bytes held now, by category.

    A storage in several categories counts in the first of: trainable weights, frozen weights, buffers, gradients,
    optimizer state, strategy state. Parameters that only the optimizer has, such as fp32 masters, count as the model's.

    Args:
        model: Parameters, their gradients, and buffers, non-persistent ones included.
        optimizer: Tensors in its state and options; tensors inside other objects are not seen.
        strategy_state: Tensors nested in dicts, lists, tuples and sets; everything else is ignored.
    """
    seen: set[Key] = set()
    members = categories(model, optimizer, strategy_state)
    return Ledger(**{category: _unseen_bytes(tensors, seen) for category, tensors in members.items()})


def categories(model: nn.Module, optimizer: Optimizer | None, strategy_state: Any) -> dict[str, list[Tensor]]:
    """Return the tensors of each category of a `Ledger`, in the order that decides a shared storage's category."""
    groups = [] if optimizer is None else optimizer.param_groups
    weights = [*model.parameters(), *(p for group in groups for p in group["params"])]
    return {
        "trainable": [p for p in weights if p.requires_grad],
        "frozen": [p for p in weights if not p.requires_grad],
        "buffers": list(model.buffers()),
        "gradients": [p.grad for p in weights if p.grad is not None],
        "optimizer": [] if optimizer is None else list(tensors([optimizer.state, groups])),
        "strategy": list(tensors(strategy_state)),
    }


def tensors(nested: Any) -> Iterator[Tensor]:
    """Iterate over the tensors nested in values of dicts, lists, tuples and sets; skip everything else."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        yield from tensors(list(nested.values()))
    elif isinstance(nested, list | tuple | Set):
        for item in nested:
            yield from tensors(item)


def storages(tensor: Tensor) -> Iterator[SizedKey]:
    """Iterate over key and bytes of the storages that hold `tensor`."""
    for storage in untyped_storages(tensor):
        # Fake and meta storages all have the address 0: only their objects tell them apart.
        identity = storage._cdata if storage.device.type == "meta" else storage.data_ptr()
        yield (str(storage.device), identity), storage.nbytes()


def untyped_storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Iterate over the storages of `tensor`: one, or those of the parts of a sparse, sharded or quantized tensor."""
    parts = _parts(tensor)
    for part in parts:
        yield from untyped_storages(part)
    if not parts:
        yield tensor.untyped_storage()


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
    """Return the bytes of the members' storages that are not in `seen`, and add these to it."""
    fresh = {key: size for tensor in members for key, size in storages(tensor) if key not in seen}
    seen.update(fresh)
    return sum(fresh.values())
