"""Pretend to be the first of several ranks: collectives that send nothing, and FSDP2 on fake tensors, for a plan."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed._tools import fake_collectives  # noqa: F401 - registers collectives of fake tensors
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from lit_sparse.modules import LitSparse
from lit_sparse.modules.sharding import Sharded
from lit_sparse_profiling.trace import Trace

NAMES_FROM = 2**20
"""Number from which groups are named here, so that they have other names than the process's own."""
GATHERED = "gathered weights"
"""Category of the whole weights of a unit while it computes, and of the buffer into which ranks gather them."""


@contextmanager
def ranks(count: int) -> Iterator[None]:
    """Within the block, be rank 0 of `count`, whatever the process's own group is, which takes no part.

    Collectives return at once. No rank waits for another, so that they may trace for different times.
    """
    world = c10d._world
    own, number, known = world.default_pg, world.group_count, set(world.pg_map)
    hook = sys.excepthook  # torch's names the rank in every traceback from then on
    world.default_pg, world.group_count = None, max(number, NAMES_FROM)
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
        yield
    finally:
        c10d._update_default_pg(own)  # pyright: ignore[reportArgumentType]
        for group in set(world.pg_map) - known:
            dist.destroy_process_group(group)
        _clear_sharding_prop_cache()  # its layouts name the mesh that they were found on, which is gone
        world.group_count, sys.excepthook = number, hook


def mesh_of(count: int, replicas: int) -> DeviceMesh:
    """Return the mesh of `count` pretended ranks: of one dimension, or groups that each have the whole model."""
    if replicas == 1:
        return init_device_mesh("cpu", (count,), mesh_dim_names=("data_parallel",))
    return init_device_mesh("cpu", (replicas, count // replicas), mesh_dim_names=("replicate", "shard"))


@contextmanager
def sharding(module: LitSparse, mesh: DeviceMesh, trace: Trace) -> Iterator[None]:
    """Within the block, `module` shards its model over `mesh` as under `trainer.strategy: fsdp2`."""

    def shard(self: LitSparse) -> None:
        self._sharded = (Sharded(self.build(), mesh),)

    def shard_copy(self: LitSparse, model: PreTrainedModel) -> Callable[..., Any]:
        return Sharded(model, mesh).compute

    def allocate(tensor: Tensor) -> None:
        given(tensor)
        trace.add("all gather", [tensor])
        trace.label(GATHERED, [(f"gathered, {tuple(tensor.shape)}", tensor)])

    def first(self: Any, *args: Any) -> None:
        made(self, *args)
        trace.label(GATHERED, [(f"gathered, {tuple(self._orig_size)}", output) for output in self.all_gather_outputs])

    def release(tensor: Tensor) -> None:
        trace.drop(tensor)
        taken(tensor)

    given, taken = _fsdp_param.alloc_storage, _fsdp_param.free_storage
    made = _fsdp_param.FSDPParam.init_all_gather_outputs

    def shapes(self: Any, schema: Any) -> Any:
        with _disable_current_modes():  # it makes fake tensors of its own, of the whole
            return propagated(self, schema)

    propagated = ShardingPropagator._propagate_tensor_meta_non_cached
    with (
        patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", shapes),
        patch.object(type(module), "to_shard", True),
        patch.object(type(module), "_shard", shard),
        patch.object(type(module), "_shard_copy", shard_copy),
        patch.object(_fsdp_param, "alloc_storage", allocate),
        patch.object(_fsdp_param_group, "alloc_storage", allocate),
        patch.object(_fsdp_param, "free_storage", release),
        patch.object(_fsdp_param.FSDPParam, "init_all_gather_outputs", first),
    ):
        yield


def hollow_like(tensor: Tensor) -> Tensor:
    """Return a tensor of that shape in which one entry stands for all, as in a model that is filled shard by shard."""
    return torch.empty_strided(tensor.shape, (0,) * tensor.ndim, dtype=tensor.dtype, device=tensor.device)


def fits_hollow(module: LitSparse) -> bool:
    """Return whether each rank reads only its shards of the base, since no strategy has to see all of it."""
    return all(update.attaches_to != "whole" for update in module.updates)
