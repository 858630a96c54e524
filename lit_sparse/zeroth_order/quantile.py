"""Quantiles of many tensors at once, without sorting and without a copy of them, also of shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lit_sparse.optim import local_shard
from lit_sparse.ranks import all_reduce_mean

BITS = range(30, 15, -1)
"""Of an fp32 number that is not negative, those that are found: its exponent and seven more, as bf16 has."""
CHUNK = 2**20
"""Elements that are compared at a time."""


def quantiles(groups: Sequence[Sequence[Tensor]], share: float) -> list[float]:
    """Return of each group the largest number that at most `share` of its elements are below, rounded down to bf16.

    The bits are found one after the other, by counting: sixteen passes, in each of which ranks exchange a number a
    group. Every rank must call it.

    Args:
        groups: Tensors of finite numbers, none negative; some may be DTensors.
        share: Above 0 and below 1.
    """
    most = share * _counts(groups, [math.inf] * len(groups))
    found = torch.zeros(len(groups), dtype=torch.int32)
    for bit in BITS:
        tried = found | 1 << bit
        below = _counts(groups, tried.view(torch.float32).tolist())
        found = torch.where(below <= most, tried, found)
    return found.view(torch.float32).tolist()


def _counts(groups: Sequence[Sequence[Tensor]], bounds: Sequence[float]) -> Tensor:
    """Return how many elements of each group are below its bound, on all ranks; float64 on the CPU."""
    counts = []
    for group, bound in zip(groups, bounds, strict=True):
        parts = [
            _shards(t) * (part < bound).count_nonzero() for t in group for part in local_shard(t).view(-1).split(CHUNK)
        ]
        counts.append(torch.stack(parts).sum())
    return all_reduce_mean(torch.stack(counts).double()).cpu()


def _shards(tensor: Tensor) -> int:
    """Return into how many shards a tensor is cut: a mean over ranks counts each of its elements so many times less."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh, placements = tensor.device_mesh, tensor.placements
    return math.prod(mesh.size(axis) for axis, placement in enumerate(placements) if isinstance(placement, Shard))
