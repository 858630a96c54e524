"""Sums and means over ranks, and what they must agree on; a single process keeps its value."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_sparse.errors import BadInput

BUCKET_BYTES = 32 * 2**20
"""Gradients that are reduced together: long messages use the links fully, short ones keep the copy small."""


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all ranks, in place, and return it.

    Every rank must call it, and every rank gets the same bits.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its mean over all ranks, as `all_reduce_sum` does, and return it."""
    if dist.is_available() and dist.is_initialized():
        all_reduce_sum(tensor).div_(dist.get_world_size())
    return tensor


def of_first_rank(tensor: Tensor) -> Tensor:
    """Return the values of rank 0's `tensor`, which has the same shape on all ranks. Every rank must call it."""
    if dist.is_available() and dist.is_initialized():
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor


def largest_of_ranks(values: Sequence[float]) -> float:
    """Return the largest of the `values` of all ranks, not a number if one is none. Every rank must call it."""
    found: list[Any] = [values]
    if world_size() > 1:
        found *= world_size()
        dist.all_gather_object(found, values)
    return max(chain.from_iterable(found), key=lambda value: (math.isnan(value), value))


def check_agreement(values: Mapping[str, Any]) -> None:
    """Refuse to go on where ranks differ in what must be the same: they would train apart, or wait for one another.

    Every rank must call it, with the same keys.

    Args:
        values: Numbers or strings, by what they are.

    Raises:
        BadInput: on all ranks alike, naming the first key and the first rank that differs from rank 0.
    """
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, dict(values))
    for key, first in found[0].items():
        for rank, other in enumerate(found):
            if other[key] != first:
                raise BadInput(
                    f"ranks differ in {key}: rank 0 has {first}, rank {rank} has {other[key]}; give every rank the "
                    "same configuration, data and software, and draw from the seed and the step only."
                )


def digest_of(value: Any) -> str:
    """Return a hash of the numbers, strings and integer tensors nested in `value`, which ranks compute exactly alike.

    Floating-point tensors, which may be sharded or differ in a rounding, do not count.
    """
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Mapping):
            add(list(item.items()))
        elif isinstance(item, list | tuple):
            for one in item:
                add(one)
        elif isinstance(item, Tensor):
            digest.update(repr(tuple(item.shape)).encode())
            if not isinstance(item, DTensor) and not item.is_floating_point():
                digest.update(item.cpu().numpy().tobytes())
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()[:12]


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradient of each parameter by its mean over ranks, where it counts as zero on ranks without one.

    One all-reduce for each bucket. A parameter that has no gradient on any rank has none afterwards. Every rank must
    call it with the same parameters in the same order.
    """
    if world_size() == 1:
        return
    for bucket in _buckets(parameters):
        grads = [parameter.grad for parameter in bucket]
        here = torch.tensor([grad is not None for grad in grads], dtype=bucket[0].dtype).to(bucket[0].device)
        values = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(bucket, grads, strict=True)]
        flat = torch.cat([here, *(value.flatten() for value in values)])
        dist.all_reduce(flat)
        found, flat = flat.split([len(bucket), len(flat) - len(bucket)])
        means = (flat / world_size()).split([value.numel() for value in values])
        for n, (parameter, value, mean) in enumerate(zip(bucket, values, means, strict=True)):
            if parameter.grad is not None or found[n] > 0:  # read, and waited for, only on a rank that lacks it
                parameter.grad = value.copy_(mean.view_as(value))


def _buckets(parameters: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Split parameters into lists of one dtype and device, of about BUCKET_BYTES each."""
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and not (alike and size < BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
