"""Kept block columns of a layer's input, packed side by side; and packed columns back in their places.

    packed[:, j w : (j + 1) w] = X[:, c_j w : (c_j + 1) w]

A real copy, so that the rest of X can be freed between forward and backward: a view would keep all of it alive.
Both ways are one pass in which each block column of the result comes from one of the source, or is zero.

Legend: T tokens, K in, C kept block columns, P packed (C x w), w block width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_sparse_kernels.jit import Listed, check_matrix, enqueue, jit, listed, on_cuda, power_of_2, runs_directly, tl

CASES = [
    # tokens, in, block width, kept block columns, dtype, dtype of the copy
    (64, 96, 32, [0, 2], torch.float32, torch.float32),
    (63, 80, 32, [1, 2], torch.float32, torch.float32),  # the last block column is ragged
    (17, 48, 16, [0, 1, 2], torch.bfloat16, torch.bfloat16),  # all of them
    (300, 72, 24, [1], torch.float16, torch.float32),
    (40, 1000, 300, [0, 1, 3], torch.float32, torch.float16),  # columns wider than a program's piece
    (65, 80, 16, [0, 3, 4], torch.float32, torch.bfloat16),
    (5, 64, 64, [], torch.float32, torch.float32),
    (5, 24, 64, [0], torch.float32, torch.float32),  # nothing but a ragged column
]
"""Shapes that the test and the benchmark share."""
ELEMENTS = 4096
"""Of a program: with 128 threads, loads of 64 bytes or more in flight for each."""


def reference(x_TK: Tensor, columns_C: Tensor, width: int) -> Tensor:
    """The definition, a column at a time. Returns (T, C w)."""
    padded = pad(x_TK, (0, -x_TK.shape[1] % width))
    parts = [padded[:, c * width : (c + 1) * width] for c in columns_C.tolist()]
    return torch.cat(parts, dim=1) if parts else x_TK.new_empty(len(x_TK), 0)


@jit
def _copy_columns_kernel(
    source,
    origins,
    out,
    tokens,
    columns,
    source_end,
    out_end,
    stride_t,
    stride_k,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    # A program copies M tokens of N (or fewer) entries of one block column; programs of the same tokens are neighbours.
    pieces: tl.constexpr = (W + N - 1) // N
    position = tl.program_id(0) % (columns * pieces)
    token = tl.program_id(0) // (columns * pieces) * M + tl.arange(0, M)
    column, n = position // pieces, position % pieces * N + tl.arange(0, N)
    origin = tl.load(origins + column)  # -1: from nowhere
    keep_m = token < tokens
    from_N, to_N = origin * W + n, column * W + n
    token = token.to(tl.int64)  # tokens x columns may pass 2^31
    keep = keep_m[:, None] & ((origin >= 0) & (n < W) & (from_N < source_end))[None, :]
    # The columns' stride too: to copy all of a transposed input first would cost more than the packing.
    value = tl.load(source + token[:, None] * stride_t + from_N.to(tl.int64)[None, :] * stride_k, mask=keep, other=0.0)
    inside = keep_m[:, None] & ((n < W) & (to_N < out_end))[None, :]
    tl.store(out + token[:, None] * out_end + to_N[None, :], value.to(out.dtype.element_ty), mask=inside)


def launch(x_TK: Tensor, columns: Listed, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """The kernel's packed columns, (T, C w)."""
    origins, _ = _tables(columns, -(-x_TK.shape[1] // width), x_TK.device)
    return _launch(x_TK, origins, len(columns.rows) * width, width, dtype or x_TK.dtype)


def launch_unpack(packed_TP: Tensor, columns: Listed, width: int, inputs: int) -> Tensor:
    """The kernel's columns in their places, (T, K)."""
    _, origins = _tables(columns, -(-inputs // width), packed_TP.device)
    return _launch(packed_TP, origins, inputs, width, packed_TP.dtype)


def _launch(source: Tensor, origins: Tensor, out_end: int, width: int, dtype: torch.dtype) -> Tensor:
    tokens = len(source)
    out = source.new_empty(tokens, out_end, dtype=dtype)
    n = min(256, max(16, power_of_2(width)))
    m = ELEMENTS // n
    programs = -(-tokens // m) * len(origins) * -(-width // n)
    enqueue(
        _copy_columns_kernel,
        (programs,),
        source.device,
        source,
        origins,
        out,
        tokens,
        len(origins),
        source.shape[1],
        out_end,
        *source.stride(),
        W=width,
        M=m,
        N=n,
        num_warps=4,
    )
    return out


def _tables(columns: Listed, available: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each packed column its origin in X, and for each of X its origin among the packed ones, -1 for none."""
    if device not in columns.tables:
        kept = [column for (column,) in columns.rows]
        places = dict(zip(kept, range(len(kept)), strict=True))
        back = [places.get(column, -1) for column in range(available)]
        columns.tables[device] = tuple(torch.tensor(t, dtype=torch.int32, device=device) for t in (kept, back))
    return columns.tables[device]


def on_host(x_TK: Tensor, columns: Listed, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """The same by torch: a selection of the whole columns, then the ragged one if it is kept."""
    whole_C, end = _whole(columns, x_TK.shape[1], width, x_TK.device)
    tokens, count = len(x_TK), len(whole_C)
    packed_TP = x_TK[:, :end].view(tokens, end // width, width).index_select(1, whole_C).view(tokens, count * width)
    if len(whole_C) < len(columns.rows):
        packed_TP = torch.cat([packed_TP, pad(x_TK[:, end:], (0, end + width - x_TK.shape[1]))], dim=1)
    return packed_TP.to(dtype or x_TK.dtype)


def unpack_on_host(packed_TP: Tensor, columns: Listed, width: int, inputs: int) -> Tensor:
    """The same by torch, over zeros."""
    whole_C, end = _whole(columns, inputs, width, packed_TP.device)
    packed_end = len(whole_C) * width
    x_TK = packed_TP.new_zeros(len(packed_TP), inputs)
    packed_TCw = packed_TP[:, :packed_end].unflatten(1, (len(whole_C), width))
    x_TK[:, :end].unflatten(1, (end // width, width)).index_copy_(1, whole_C.long(), packed_TCw)
    if len(whole_C) < len(columns.rows):
        x_TK[:, end:] = packed_TP[:, packed_end : packed_end + inputs - end]
    return x_TK


def _whole(columns: Listed, inputs: int, width: int, device: torch.device) -> tuple[Tensor, int]:
    """The kept columns but for a ragged one, which is the last; and where whole ones end in the input."""
    available = inputs // width
    kept, _ = _tables(columns, -(-inputs // width), device)
    whole = len(columns.rows) - (columns.rows[-1:] == [(available,)])
    return kept[:whole], available * width


def _pack_columns(x_TK: Tensor, columns_C: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    _check_forms("x_TK", x_TK, columns_C, None)
    run = launch if on_cuda(x_TK) else on_host
    return run(x_TK, _checked(columns_C, -(-x_TK.shape[1] // width)), width, dtype)


_pack_columns_op = torch.library.custom_op("lit_sparse::pack_columns", _pack_columns, mutates_args=())


@_pack_columns_op.register_fake
def _(x_TK: Tensor, columns_C: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    _check_forms("x_TK", x_TK, columns_C, None)
    return x_TK.new_empty(len(x_TK), len(columns_C) * width, dtype=dtype)


def _unpack_columns(packed_TP: Tensor, columns_C: Tensor, width: int, inputs: int) -> Tensor:
    _check_forms("packed_TP", packed_TP, columns_C, len(columns_C) * width)
    run = launch_unpack if on_cuda(packed_TP) else unpack_on_host
    return run(packed_TP, _checked(columns_C, -(-inputs // width)), width, inputs)


_unpack_columns_op = torch.library.custom_op("lit_sparse::unpack_columns", _unpack_columns, mutates_args=())


@_unpack_columns_op.register_fake
def _(packed_TP: Tensor, columns_C: Tensor, width: int, inputs: int) -> Tensor:
    _check_forms("packed_TP", packed_TP, columns_C, len(columns_C) * width)
    return packed_TP.new_empty(len(packed_TP), inputs)


def _check_forms(name: str, tensor: Tensor, columns_C: Tensor, size: int | None) -> None:
    check_matrix(name, tensor, (None, size))
    if columns_C.device != tensor.device:
        raise ValueError(f"columns_C is on {columns_C.device}; expected {tensor.device}, where {name} is.")


def _checked(columns_C: Tensor, available: int) -> Listed:
    inside = f"columns below {available}"
    columns = listed("columns_C", columns_C, None, available, lambda column: column < available, inside)
    if columns.rows != sorted(columns.rows):
        raise ValueError(f"columns_C is {columns_C.tolist()}; expected sorted columns.")
    return columns


def pack_columns(x_TK: Tensor, columns_C: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """The kept block columns of `x_TK`, side by side.

    Args:
        x_TK: (T, K), floating numbers, any strides.
        columns_C: Sorted indices of block columns, integer tensor on the device of `x_TK`.
        width: Block width; a ragged last block column is filled with zeros.
        dtype: What to round to on the way; that of `x_TK` if not given.

    Returns:
        (T, C w). Where every column is kept in its own dtype and `x_TK` is contiguous without anything around it,
        `x_TK` itself: it is as small as its copy. Under `torch.compile`, which cannot tell, always a copy.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes are not such, or a column lies outside, comes twice or out of order.
    """
    if not torch.compiler.is_compiling() and _is_its_copy(x_TK, columns_C, width, dtype):
        _check_forms("x_TK", x_TK, columns_C, None)
        _checked(columns_C, len(columns_C))
        return x_TK
    run = _pack_columns if runs_directly(x_TK, columns_C) else _pack_columns_op
    return run(x_TK, columns_C, width, dtype)


def _is_its_copy(x_TK: Tensor, columns_C: Tensor, width: int, dtype: torch.dtype | None) -> bool:
    whole = x_TK.shape[1:] == (columns_C.numel() * width,) and dtype in (None, x_TK.dtype)
    return whole and x_TK.is_contiguous() and x_TK.untyped_storage().nbytes() == x_TK.nbytes


def unpack_columns(packed_TP: Tensor, columns_C: Tensor, width: int, inputs: int) -> Tensor:
    """Packed block columns back in their places of a (T, K) tensor, zeros elsewhere.

    Args:
        packed_TP: (T, C w), floating numbers, any strides.
        columns_C: As in `pack_columns`.
        width: Block width.
        inputs: K; of a ragged last block column only what lies within is taken.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes do not go together, or columns are not as in `pack_columns`.
    """
    run = _unpack_columns if runs_directly(packed_TP, columns_C) else _unpack_columns_op
    return run(packed_TP, columns_C, width, inputs)
