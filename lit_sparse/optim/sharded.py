"""Tensors that may be sharded over ranks (DTensor): this rank's part, sums over all parts, and norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def shard_like(value: Any, parameter: Tensor) -> Any:
    """Return the shard of a full tensor, with the mesh and placements of `parameter`; a DTensor.

    No communication: every rank must hold the full tensor. Values that are not plain tensors of `parameter`'s shape are
    returned unchanged, and so is every value if `parameter` is not sharded.
    """
    plain = torch.is_tensor(value) and not isinstance(value, DTensor)
    if not plain or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def full_tensor(tensor: Any) -> Tensor:
    """Gather a DTensor: every rank must call it, and gets the full value. Return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, without communication. Return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Part:
    """This rank's part of a tensor.

    Attributes:
        values: The part, in the memory of the tensor; empty on ranks beyond the last row.
        start: Row and column of its first entry within the tensor, and 0 for a column that it lacks.
    """

    values: Tensor
    start: tuple[int, int]


def part_of(tensor: Tensor) -> Part:
    """Return this rank's part of `tensor`; all of it, unless that is a DTensor."""
    start = [0, 0]
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):  # chunks as torch.chunk makes them: the last ones may be smaller or empty
                side, mesh = tensor.shape[placement.dim], tensor.device_mesh
                start[placement.dim] = min(side, -(-side // mesh.size(axis)) * mesh.get_local_rank(axis))
    return Part(local_shard(tensor.detach()), (start[0], start[1]))


def sum_over_shards(values: Tensor, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
    """Return the sum or maximum of `values` over the ranks with the shards of `tensor`, on the device they compute on.

    Where several ranks have the same shard (HSDP), each group of ranks that has the whole reduces its own. Unless
    `tensor` is a DTensor, `values` are returned unchanged. Every rank must call it.
    """
    if not isinstance(tensor, DTensor):
        return values
    mesh = tensor.device_mesh
    kinds = [Partial(op) if isinstance(placement, Shard) else Replicate() for placement in tensor.placements]
    return DTensor.from_local(values.to(mesh.device_type), mesh, kinds).full_tensor()


def device_of(tensor: Tensor) -> torch.device:
    """Return the device that computes with `tensor`: of a DTensor whose shards are in host memory, that of its mesh."""
    return torch.device(tensor.device_mesh.device_type) if isinstance(tensor, DTensor) else tensor.device


def sum_scalars(scalars: Sequence[Tensor]) -> Tensor:
    """Return the sum of `scalars`, some of which may be DTensors, such as the sum of the entries of a DTensor.

    All DTensors must have the same mesh and placements: they are added up locally first and reduced together, in one
    collective instead of one each.
    """
    sharded = [scalar for scalar in scalars if isinstance(scalar, DTensor)]
    terms = [scalar for scalar in scalars if not isinstance(scalar, DTensor)]
    if sharded:
        local = torch.stack([local_shard(scalar) for scalar in sharded]).sum()
        terms.append(full_tensor(DTensor.from_local(local, sharded[0].device_mesh, sharded[0].placements)))
    return torch.stack(terms).sum()


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients together, an fp32 scalar, the same on all ranks.

    Some may be DTensors, and the others the same on all ranks. Every rank must call it.
    """
    kinds = [[g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)]]
    # Of bf16 gradients a norm is a bf16 number.
    norms = [full_tensor(torch.nn.utils.get_total_norm(kind)).float() for kind in kinds if kind]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[-1].device) for norm in norms]))
