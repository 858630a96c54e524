"""Which path a tensor takes: Triton for CUDA tensors, torch for all others; and the lists of blocks that both read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for macOS and Windows, where no tensor needs it
    triton: Any = None
    tl: Any = None

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that kernels accept; the torch paths accept float64 too."""
PLAIN = (Tensor, torch.nn.Parameter)
"""Classes of tensors whose operations only torch itself dispatches."""
MULTIPROCESSORS = 132
"""Of an H100: what work is divided for where no device says otherwise (interpretation, compilation ahead of time)."""
SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have, likewise."""


@dataclass(eq=False)
class Listed:
    """An index tensor as the host and the kernels read it.

    Attributes:
        rows: Its rows.
        tables: What kernels read in its place, by device (and part); made when first needed.
    """

    rows: list[tuple[int, ...]]
    tables: dict[Any, Any] = field(default_factory=dict)


def jit(kernel: Callable[..., Any] | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """A Triton kernel, or the bare function where there is no Triton.

    Args:
        do_not_specialize: Numbers whose divisibility does not matter: no new value of them compiles the kernel anew.
    """
    if kernel is None:
        return lambda kernel: jit(kernel, do_not_specialize=do_not_specialize)
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=do_not_specialize)


def on_cuda(tensor: Tensor) -> bool:
    """Return whether the Triton kernel is to run: for CUDA tensors.

    Raises:
        ImportError: if it is, but there is no Triton.
    """
    if tensor.is_cuda and triton is None:
        raise ImportError("CUDA tensors need Triton, which is not installed here: pip install triton.")
    return tensor.is_cuda


def runs_directly(*tensors: Tensor) -> bool:
    """Return whether an op may skip torch's dispatcher, which costs 40 us of host time a call.

    Not under torch.compile, a dispatch mode (which counts or fakes operations), vmap and the like, nor where autograd
    would record what the op does, nor for tensors of another class or device.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    records = torch.is_grad_enabled()
    return not any(
        type(tensor) not in PLAIN or tensor.device.type not in ("cuda", "cpu") or (records and tensor.requires_grad)
        for tensor in tensors
    )


def fp32_is_exact() -> bool:
    """Return whether torch computes products of fp32 matrices on a GPU in fp32, and not in TF32.

    Both of torch's settings count: once the newer one was used, the older one's getter raises.
    """
    matmul = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if matmul is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return (torch.backends.fp32_precision if matmul == "none" else matmul) != "tf32"  # pyright: ignore


def enqueue(kernel: Any, programs: Sequence[int], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its tensors: Triton takes the current one, wherever the tensors are."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[tuple(programs)](*arguments, **constants)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_bytes(device: torch.device) -> int:
    """Return how much shared memory a program may have."""
    if device.type != "cuda":
        return SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


# ---- arguments


def check_matrix(name: str, tensor: Tensor, shape: Sequence[int | None], like: Tensor | None = None) -> None:
    """Refuse what is no matrix, or stack of matrices, of floating numbers of that shape (None is any size).

    Args:
        like: A tensor that it must resemble in dtype and device.

    Raises:
        ValueError: naming the argument, what it is and what was expected.
    """
    allowed = FLOATS if tensor.is_cuda else (*FLOATS, torch.float64)
    if tensor.ndim != len(shape) or any(
        wanted not in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({wanted}).")
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, allowed))}.")
    if like is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected {like.dtype} on {like.device}.")


_listed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def listed(
    name: str, blocks: Tensor, columns: int | None, shape: Hashable, fits: Callable[..., bool], inside: str
) -> Listed:
    """The rows of an index tensor (N, columns); read and checked once for a tensor and the `shape` it indexes.

    Args:
        columns: Numbers a row; None for a tensor (N,), which is read as (N, 1).
        fits: Whether a row, its numbers given one by one, lies inside.
        inside: What is inside, in words.

    Raises:
        ValueError: if the tensor is of another form, a row lies outside, or one comes twice.
    """
    version = None if blocks.is_inference() else blocks._version  # inference tensors count no versions
    known = _listed.get(blocks)
    if known is not None and version is not None and known[0] == (version, shape):
        return known[1]
    form = () if columns is None else (columns,)
    if blocks.ndim != 1 + len(form) or blocks.shape[1:] != form or blocks.dtype not in (torch.int32, torch.int64):
        wanted = "(N,)" if columns is None else f"(N, {columns})"
        raise ValueError(
            f"{name} is {blocks.dtype} of shape {tuple(blocks.shape)}; expected integers of shape {wanted}."
        )
    rows = [tuple(row) for row in blocks.reshape(len(blocks), columns or 1).tolist()]
    for row in rows:
        if min(row) < 0 or not fits(*row):
            raise ValueError(f"{name} has {row}, which lies outside; expected {inside}.")
    if len(set(rows)) < len(rows):
        twice = next(row for row in rows if rows.count(row) > 1)
        raise ValueError(f"{name} has {twice} twice; blocks may not overlap.")
    found = Listed(rows)
    if version is not None:
        _listed[blocks] = (version, shape), found
    return found


def runs(blocks: Listed) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Blocks (..., row, column) that follow on each other down a column: first slot, how many, and the first block."""
    start = 0
    for slot, (*layer, row, column) in enumerate(blocks.rows):
        following = blocks.rows[slot + 1] if slot + 1 < len(blocks.rows) else None
        if following != (*layer, row + 1, column):
            yield start, slot + 1 - start, blocks.rows[start]
            start = slot + 1
