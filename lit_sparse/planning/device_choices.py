"""The choices that torch and our own code make for the device of a plan, made for fake tensors on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lit_sparse import loss
from lit_sparse.entries import former
from lit_sparse.modules.precision import HALF
from lit_sparse.zeroth_order.perturbed import CHUNK
from lit_sparse_kernels import (
    add_noise,
    block_adamw,
    block_delta,
    block_grad,
    glu_density,
    master_adamw,
    momentum_noise,
    pack_columns,
    philox,
    subspace_adam,
)

Device = Literal["cuda", "cpu"]
ON_CPU = {
    value._opoverload: value._init_fn
    for part in (block_delta, block_grad, glu_density, pack_columns)
    for value in vars(part).values()
    if isinstance(value, CustomOpDef)
}
"""Functions that our own ops run on a CPU, by op: torch's ops, with temporaries that count."""


@contextmanager
def choices_of(device: Device) -> Iterator[None]:
    """Make the choices of our own code, which depend on the device of tensors, those of `device`; tensors are fake."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.Module, "_apply", _convert))
        if device == "cuda":
            stack.enter_context(patch.object(loss, "chunk_tokens", _chunk_on_cuda))
            for kernel in (master_adamw, block_adamw, add_noise, momentum_noise, subspace_adam):  # one launch, in place
                stack.enter_context(patch.object(kernel, "on_host", lambda *_: None))
            stack.enter_context(patch.object(subspace_adam, "on_host_back", lambda *_: None))
            stack.enter_context(patch.object(philox, "on_host", _noise_on_cuda))
            for chunk in (CHUNK, loss.HEAD_WEIGHTS):
                stack.enter_context(patch.dict(chunk, cpu=chunk["cuda"]))
            stack.enter_context(patch.object(former, "HOST", "meta"))
            stack.enter_context(CUDAAutocast())
        yield


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert a module's tensors as `nn.Module._apply` does, which cannot swap fake ones that someone refers to."""
    for child in module.children() if recurse else ():
        _convert(child, function)
    with torch.no_grad():
        for name, value in list(module._parameters.items()):
            if value is not None and (out := function(value)) is not value:
                module._parameters[name] = nn.Parameter(out, requires_grad=value.requires_grad)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = function(value)
    return module


_chunk = loss.chunk_tokens


def _chunk_on_cuda(vocabulary: int, device: torch.device) -> int:
    return _chunk(vocabulary, torch.device("cuda"))


def _noise_on_cuda(firsts_R: Tensor, width: int, *_: Any) -> Tensor:
    return firsts_R.new_empty(len(firsts_R), width, dtype=torch.float32)


IN_FP32 = {
    *(F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax),
    *(F.cross_entropy, F.kl_div, F.mse_loss, F.group_norm, F.softplus, torch.cumsum, Tensor.cumsum, torch.sum),
    *(Tensor.sum, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.log),
    *(Tensor.log, torch.norm, Tensor.norm, torch.reciprocal, Tensor.reciprocal, F.normalize, F.cosine_similarity),
}
"""Functions that autocast runs in fp32 on a GPU, but not on a CPU, where the trace's tensors seem to be."""


class CUDAAutocast(TorchFunctionMode):
    """Casts the arguments of such functions to fp32 wherever autocast is on."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:  # within which the mode would be off, also for what checkpointing computes again
            start, retain = torch.ones_like(args[0]), bool(kwargs.get("retain_graph"))
            with self:
                options: Any = {"allow_unreachable": True, "accumulate_grad": True}
                return _engine_run_backward((args[0],), (start,), retain, False, (), **options)
        if func in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _in_fp32, (args, kwargs))
        return func(*args, **kwargs)


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
