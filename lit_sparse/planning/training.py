"""Trace the steps of a training on fake tensors: the module's own strategies, loss and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_sparse.data.collate import scored_positions
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse.modules.forward_only import WindowLoss
from lit_sparse.optim import AdamW, trainable
from lit_sparse.planning import pretended
from lit_sparse.planning.base_model import load
from lit_sparse.planning.device_choices import Device
from lit_sparse.ranks import average_gradients
from lit_sparse_profiling.trace import Trace

CUBLAS_WORKSPACE = 32 * 2**20
"""Bytes that cuBLAS keeps for each thread that multiplies, on Hopper; 8 MiB on older cards."""
MICRO_BATCHES = 2
"""Batches of a step that are traced: the second finds the gradients of the first, and each later one is like it."""


@dataclass(frozen=True)
class Setting:
    """Settings that a plan needs beside the module.

    Attributes:
        device: `cuda` or `cpu`: whose choices of dtype, kernels and chunks are followed.
        batch_size: Rows of a batch.
        length: Tokens of each row.
        micro_batches: Batches of an optimizer step.
        clip: Whether gradients are clipped by their norm.
        ranks: Processes of data-parallel training.
        sharded: Whether they shard the model (FSDP2), or each have all of it (DDP).
        replicas: Groups of ranks that each have the whole model, sharded within the group (HSDP).
    """

    device: Device = "cuda"
    batch_size: int = 4
    length: int = 512
    micro_batches: int = 1
    clip: float | None = None
    ranks: int = 1
    sharded: bool = False
    replicas: int = 1


def trace_training(module: LitSparse, batch: Mapping[str, Tensor], trace: Trace, setting: Setting) -> Optimizer:
    """Run loading, selection and steps of `module` under `trace`, and one more step as a repetition of the last."""
    with ExitStack() as stack:
        if setting.ranks > 1 or setting.sharded:
            stack.enter_context(pretended.ranks(setting.ranks))
        if setting.sharded:
            mesh = pretended.mesh_of(setting.ranks, setting.replicas)
            stack.enter_context(pretended.sharding(module, mesh, trace))
        # Else each call of a method of a fake tensor takes a detour through Python, which is of no use here.
        stack.enter_context(
            patch.object(FakeTensor, "__torch_function__", torch._C._disabled_torch_function_impl)  # as of parameters
        )
        stack.enter_context(trace.noting_given_gradients())
        stack.enter_context(trace)
        if setting.device == "cpu":  # activation checkpointing keeps one for each layer; on a GPU they are on the host
            stack.enter_context(
                patch.object(torch, "get_rng_state", lambda: _recorded(trace, "rng state", rng_state()))
            )
        load(module, trace, setting.device, setting.sharded)
        model = module.build()
        batch = dict(batch)
        trace.add("batch", batch.values())
        trace.label("batch", batch.items())
        trace.label("buffers", model.named_buffers())
        stack.enter_context(trace.naming(model))
        trace.phase("selection")
        module._prepare()
        probe = _probe_of(module, batch, trace, setting.device)
        module._attach_and_shard(lambda kinds: module.updates.attach(model, probe, module._context, kinds))
        module._after_attach()
        stack.enter_context(trace.naming(model))
        optimizer = module.updates.optimizer(module.lr, module.make_optimizer)
        if setting.device == "cuda":
            _take_foreach(optimizer)
        reduces = setting.ranks > 1 and module.updates.backward != "none"
        if reduces and not _averages(module, setting):  # DDP reduces gradients in buckets of its own
            size = sum(parameter.numel() * parameter.itemsize for _, parameter in trainable(model))
            trace.label("DDP buckets", [("buckets", buckets := trace.fake_bytes(size))])
            stack.callback(lambda: buckets)
        if setting.device == "cuda":
            workspaces = [trace.fake_bytes(CUBLAS_WORKSPACE) for _ in range(2)]
            trace.label("workspaces", [("cuBLAS", workspace) for workspace in workspaces])
            stack.callback(workspaces.clear)
        _label(trace, module, optimizer)
        since = trace.now
        for step in steps_of(module):
            since = trace.now
            _step(module, optimizer, step, batch, setting, trace)
        trace.repeat(since)
    return optimizer


def _averages(module: LitSparse, setting: Setting) -> bool:
    """Return whether the host averages gradients over ranks: those beside a sharded model, or of a set that changes."""
    return setting.sharded or (setting.ranks > 1 and any(update.period is not None for update in module.updates))


rng_state = torch.get_rng_state


def _recorded(trace: Trace, name: str, tensor: Tensor) -> Tensor:
    trace.add(name, [tensor])
    return tensor


def steps_of(module: LitSparse) -> list[int]:
    """Return the numbers of the steps to trace: the first, or those around the first change of the trainable set.

    Two come before the change: the second finds the state of the first, beside the gradients.
    """
    last = max((update.period for update in module.updates if update.period is not None), default=None)
    return [1] if last is None else [*range(max(1, last - 1), last + 2)]


def batch_of(module: LitSparse, setting: Setting) -> dict[str, Tensor]:
    """Return a batch of full rows, all of whose tokens are scored; a classifier has a label for each row."""
    rows = (torch.arange(setting.length) % 7 + 1).repeat(setting.batch_size, 1)
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    if isinstance(module, CausalLM):
        return {**batch, "labels": rows.clone(), "scored": scored_positions(rows)}
    return {**batch, "labels": torch.zeros(setting.batch_size, dtype=torch.int64)}


def _probe_of(module: LitSparse, batch: Mapping[str, Tensor], trace: Trace, device: Device) -> Any:
    count = 2 if any(update.base == "moved" for update in module.updates) else 1
    size = sum(tensor.nbytes for tensor in batch.values())

    def probe(steps: int, /, weighed: bool = True) -> Iterator[Tensor]:
        read = []
        if weighed and device == "cpu":  # the host reads all of them before, to weigh them; a GPU has one
            read = [trace.fake_bytes(size) for _ in range(steps - 1)]
            trace.label("batch", [("batches of the selection", one) for one in read])
        for _ in range(min(steps, count)):
            with module.autocast():
                yield module.compute(module.loss, batch)[0]
        del read

    return probe


def _step(
    module: LitSparse, optimizer: Optimizer, step: int, batch: Mapping[str, Tensor], setting: Setting, trace: Trace
) -> None:
    """Take an optimizer step as the host does."""
    updates, micro_batches = module.updates, setting.micro_batches
    if updates.backward == "none":
        trace.phase("optimizer step")
        updates.before_step(step, optimizer)
        with torch.no_grad():
            batches = [batch] * min(micro_batches, MICRO_BATCHES)
            optimizer.step(WindowLoss(module, batches))  # pyright: ignore[reportArgumentType, reportCallIssue]
    else:
        if updates.backward == "fused":
            updates.before_step(step, optimizer)
        loss: Tensor | None = None
        for _ in range(min(micro_batches, MICRO_BATCHES)):
            trace.phase("forward")
            loss = module.weighed_loss(batch, micro_batches)
            trace.phase("backward")
            updates.run_backward(loss)
        if _averages(module, setting):
            average_gradients(parameter for _, parameter in updates.named if not isinstance(parameter, DTensor))
        scale = module._window.close(micro_batches)[-1]
        if scale is not None:
            updates.scale_gradients(scale)
        _label(trace, module, optimizer)
        trace.phase("optimizer step")
        if updates.backward == "autograd":
            updates.before_step(step, optimizer)
        if setting.clip:
            _clip(optimizer, setting.clip)
        optimizer.step()
        del loss
    _label(trace, module, optimizer)
    if updates.after_step(step, optimizer):
        module._upcast()
        updates.regroup(optimizer)
    optimizer.zero_grad()
    _label(trace, module, optimizer)


def _clip(optimizer: Optimizer, norm: float) -> None:
    if isinstance(optimizer, AdamW):
        optimizer.clip_norm(norm)
    else:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, norm)


def _take_foreach(optimizer: Optimizer) -> None:
    """Make torch's own optimizers take lists of tensors, as they do by default on a GPU."""
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True


def _label(trace: Trace, module: LitSparse, optimizer: Optimizer | None) -> None:
    """Name weights, gradients and state as they are now."""
    model = module.build()
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    trace.label("buffers", model.named_buffers())
    for update in module.updates:
        trace.label("strategy state", _nested(type(update).__name__, update.held()))
    for parameter, name in names.items():
        trace.label("trained weights" if parameter.requires_grad else "frozen weights", [(name, parameter)])
        if parameter.grad is not None:
            trace.label("gradients", [(f"{name}.grad", parameter.grad)])
    states: Mapping[Any, Any] = {} if optimizer is None else optimizer.state
    for parameter, state in states.items():
        trace.label("optimizer state", _nested(names.get(parameter, "weight"), state))


def _nested(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors nested in a value, with dotted names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nested(f"{name}.{key}", item)
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from _nested(f"{name}.{number}", item)
