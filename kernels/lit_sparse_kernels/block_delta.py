"""Add the products of blocks to the output of a linear layer, and to the gradient of its input.

For blocks D_i (h, w) at block row r_i and packed block column p_i,

    Y[:, r h : (r + 1) h] = base[:, r h : (r + 1) h] + sum of P[:, p_i w : (p_i + 1) w] D_i^T  over blocks with r_i = r
    dP[:, p w : (p + 1) w] = sum of dY[:, r_i h : (r_i + 1) h] D_i  over blocks with p_i = p

P holds the block columns of the input that are needed, packed side by side (`pack_columns`). Both are the same product
with the roles of rows and columns exchanged: a group of blocks (of a row, or of a column) is summed in one program, and
its sum goes with the base to memory once.

Legend: T tokens, O out, P packed in (kept block columns x w), N blocks, h x w block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lit_sparse_kernels.jit import (
    Listed,
    check_matrix,
    enqueue,
    fp32_is_exact,
    jit,
    listed,
    on_cuda,
    power_of_2,
    runs,
    runs_directly,
    tl,
)

CASES = [
    # tokens, out, packed columns, block size, blocks as (row, packed column), dtype
    (64, 96, 64, (32, 32), [(0, 0), (2, 0), (1, 1)], torch.float32),
    (63, 80, 32, (32, 32), [(2, 0)], torch.float32),  # one block, in the ragged last row
    (17, 40, 48, (16, 24), [(r, c) for c in range(2) for r in range(3)], torch.float32),  # all blocks, h and w differ
    (64, 64, 64, (32, 32), [(1, 0), (0, 1), (1, 1)], torch.bfloat16),
    (150, 300, 192, (224, 64), [(1, 0), (0, 2), (1, 2)], torch.float16),  # tiles that end in a block, a place unused
    (130, 144, 320, (48, 160), [(2, 0), (0, 1), (2, 1)], torch.float32),
    (5, 64, 64, (64, 64), [], torch.float32),
]
"""Shapes that the test and the benchmark share."""


def reference(delta_Nhw: Tensor, blocks_N2: Tensor, out: int, packed: int) -> Tensor:
    """The definition: the blocks as a dense (O, P) matrix, by which both products are ordinary ones."""
    _, height, width = delta_Nhw.shape
    dense = delta_Nhw.new_zeros(-(-out // height) * height, packed)
    for block, (row, place) in zip(delta_Nhw, blocks_N2.tolist(), strict=True):
        dense[row * height : (row + 1) * height, place * width : (place + 1) * width] = block
    return dense[:out]


@jit
def _block_delta_kernel(
    left,
    delta,
    groups,
    members,
    base,
    out,
    tokens,
    left_end,
    out_end,
    stride_left,
    stride_base,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    STEP_K: tl.constexpr,
    STEP_N: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program makes an (M, N) tile of one group: M tokens, N of the OUTER columns of `out` that its blocks add to.
    # Each block is INNER x OUTER with strides STEP_K and STEP_N; INNER is what is summed over, in pieces of K.
    pieces: tl.constexpr = (INNER + K - 1) // K
    tiles_n: tl.constexpr = (OUTER + N - 1) // N
    tiles_m = tl.cdiv(tokens, M)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) // tiles_m % tiles_n
    place, first, count = tl.load(groups + group * 3), tl.load(groups + group * 3 + 1), tl.load(groups + group * 3 + 2)

    m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    n = tile * N + tl.arange(0, N)
    column = place * OUTER + n
    keep_m = m < tokens
    keep_n = (n < OUTER) & (column < out_end)
    token = m.to(tl.int64)  # tokens x columns may pass 2^31
    sum_MN = tl.full((M, N), 0.0, tl.float32)
    # One loop over the pieces of all blocks, and not one in another: loads then run ahead across the blocks' ends.
    for step in range(first * pieces, (first + count) * pieces):
        member = members + step // pieces * 2
        origin, slot = tl.load(member), tl.load(member + 1)
        k = step % pieces * K + tl.arange(0, K)
        keep_k = (k < INNER) & (origin * INNER + k < left_end)
        left_MK = left + token[:, None] * stride_left + (origin * INNER + k)[None, :]
        delta_KN = delta + slot.to(tl.int64) * (INNER * OUTER) + k[:, None] * STEP_K + n[None, :] * STEP_N
        left_value = tl.load(left_MK, mask=keep_m[:, None] & keep_k[None, :], other=0.0)
        delta_value = tl.load(delta_KN, mask=keep_k[:, None] & keep_n[None, :], other=0.0)
        sum_MN = tl.dot(left_value, delta_value, sum_MN, input_precision=PRECISION)

    keep = keep_m[:, None] & keep_n[None, :]
    if base is not None:
        base_MN = base + token[:, None] * stride_base + column[None, :]
        sum_MN += tl.load(base_MN, mask=keep, other=0.0).to(tl.float32)
    out_MN = out + token[:, None] * out_end + column[None, :]
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=keep)


def launch(base_TO: Tensor, packed_TP: Tensor, delta_Nhw: Tensor, blocks: Listed) -> Tensor:
    """The kernel's base + blocks' part, (T, O)."""
    _, height, width = delta_Nhw.shape
    rows, places = -(-base_TO.shape[1] // height), packed_TP.shape[1] // width
    by_row, _ = _tables(blocks, rows, places, packed_TP.device)
    base_TO = base_TO if base_TO.stride(1) == 1 else base_TO.contiguous()
    return _launch(packed_TP, delta_Nhw.contiguous(), by_row, base_TO, base_TO.shape[1], (width, height), (1, width))


def launch_input_grad(dy_TO: Tensor, delta_Nhw: Tensor, blocks: Listed, packed: int) -> Tensor:
    """The kernel's gradient of the packed input, (T, P)."""
    _, height, width = delta_Nhw.shape
    _, by_place = _tables(blocks, -(-dy_TO.shape[1] // height), packed // width, dy_TO.device)
    return _launch(dy_TO, delta_Nhw.contiguous(), by_place, None, packed, (height, width), (width, 1))


def _launch(
    left: Tensor,
    delta_Nhw: Tensor,
    table: tuple[Tensor, Tensor],
    base: Tensor | None,
    out_end: int,
    sides: tuple[int, int],
    steps: tuple[int, int],
) -> Tensor:
    tokens, (groups, members), (inner, outer) = len(left), table, sides
    left = left if left.stride(1) == 1 else left.contiguous()
    out = left.new_empty(tokens, out_end)
    m, n = (min(128, max(16, power_of_2(size))) for size in (tokens, outer))
    k = min(64 if left.element_size() == 2 else 32, max(16, power_of_2(inner)))
    programs = len(groups) * -(-outer // n) * -(-tokens // m)
    enqueue(
        _block_delta_kernel,
        (programs,),
        left.device,
        left,
        delta_Nhw,
        groups,
        members,
        base,
        out,
        tokens,
        left.shape[1],
        out_end,
        left.stride(0),
        0 if base is None else base.stride(0),
        INNER=inner,
        OUTER=outer,
        STEP_K=steps[0],
        STEP_N=steps[1],
        M=m,
        N=n,
        K=k,
        PRECISION="ieee" if fp32_is_exact() else "tf32",
        num_warps=8 if m * n > 64 * 64 else 4,
        num_stages=5,  # the table's loads, on which the others' addresses wait, share them: two tiles run ahead
    )
    return out


def _tables(blocks: Listed, rows: int, places: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
    """The blocks grouped by row, and grouped by place."""
    if device not in blocks.tables:
        by_row = [(row, place, slot) for slot, (row, place) in enumerate(blocks.rows)]
        by_place = [(place, row, slot) for row, place, slot in by_row]
        blocks.tables[device] = _grouped(by_row, rows, device), _grouped(by_place, places, device)
    return blocks.tables[device]


def _grouped(members: list[tuple[int, int, int]], groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of members (group, origin, slot): (group, first, count) with the fullest first, and their (origin, slot)."""
    members = sorted(members)
    firsts, counts = [0] * groups, [0] * groups
    for position, (group, _, _) in enumerate(members):
        firsts[group] = firsts[group] if counts[group] else position
        counts[group] += 1
    heads = [(group, firsts[group], counts[group]) for group in range(groups)]
    heads.sort(key=lambda head: -head[2])  # the longest programs start first, and short ones fill what they leave
    tails = [(origin, slot) for _, origin, slot in members]
    made = (torch.tensor(rows, dtype=torch.int32, device=device) for rows in (heads, tails))
    return next(made).view(-1, 3), next(made).view(-1, 2)


def on_host(base_TO: Tensor, packed_TP: Tensor, delta_Nhw: Tensor, blocks: Listed) -> Tensor:
    """The same by torch: a product for each run of blocks that stand one below the other, in order."""
    _, height, width = delta_Nhw.shape
    y_TO = base_TO.clone(memory_format=torch.contiguous_format)
    for first, count, (row, place) in runs(blocks):
        target = y_TO[:, row * height : (row + count) * height]
        below = delta_Nhw[first : first + count].reshape(-1, width)[: target.shape[1]]
        target.addmm_(packed_TP[:, place * width : (place + 1) * width], below.t())
    return y_TO


def input_grad_on_host(dy_TO: Tensor, delta_Nhw: Tensor, blocks: Listed, packed: int) -> Tensor:
    """The same by torch, over zeros."""
    _, height, width = delta_Nhw.shape
    d_TP = dy_TO.new_zeros(len(dy_TO), packed)
    for first, count, (row, place) in runs(blocks):
        dy = dy_TO[:, row * height : (row + count) * height]
        below = delta_Nhw[first : first + count].reshape(-1, width)[: dy.shape[1]]
        d_TP[:, place * width : (place + 1) * width].addmm_(dy, below)
    return d_TP


def _block_delta(base_TO: Tensor, packed_TP: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor) -> Tensor:
    _check_forms(base_TO, packed_TP, delta_Nhw, blocks_N2)
    run = launch if on_cuda(packed_TP) else on_host
    blocks = _checked(blocks_N2, base_TO.shape[1], packed_TP.shape[1], delta_Nhw.shape)
    return run(base_TO, packed_TP, delta_Nhw, blocks)


_block_delta_op = torch.library.custom_op("lit_sparse::block_delta", _block_delta, mutates_args=())


@_block_delta_op.register_fake
def _(base_TO: Tensor, packed_TP: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor) -> Tensor:
    _check_forms(base_TO, packed_TP, delta_Nhw, blocks_N2)
    return base_TO.new_empty(base_TO.shape)


def _block_delta_input_grad(dy_TO: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor, packed: int) -> Tensor:
    _check_forms_of_grad(dy_TO, delta_Nhw, blocks_N2, packed)
    run = launch_input_grad if on_cuda(dy_TO) else input_grad_on_host
    return run(dy_TO, delta_Nhw, _checked(blocks_N2, dy_TO.shape[1], packed, delta_Nhw.shape), packed)


_block_delta_input_grad_op = torch.library.custom_op(
    "lit_sparse::block_delta_input_grad", _block_delta_input_grad, mutates_args=()
)


@_block_delta_input_grad_op.register_fake
def _(dy_TO: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor, packed: int) -> Tensor:
    _check_forms_of_grad(dy_TO, delta_Nhw, blocks_N2, packed)
    return dy_TO.new_empty(len(dy_TO), packed)


@register_flop_formula(torch.ops.lit_sparse.block_delta)
def _(base: Sequence[int], packed: Any, delta: Sequence[int], blocks: Any, **_: Any) -> int:
    return 2 * base[0] * prod(delta)  # of the arguments only shapes are given: rows past a ragged end count too


@register_flop_formula(torch.ops.lit_sparse.block_delta_input_grad)
def _(dy: Sequence[int], delta: Sequence[int], blocks: Any, packed: int, **_: Any) -> int:
    return 2 * dy[0] * prod(delta)


def _check_forms(base_TO: Tensor, packed_TP: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor) -> None:
    check_matrix("packed_TP", packed_TP, (None, None))
    check_matrix("base_TO", base_TO, (len(packed_TP), None), like=packed_TP)
    check_matrix("delta_Nhw", delta_Nhw, (len(blocks_N2), None, None), like=packed_TP)
    if packed_TP.shape[1] % delta_Nhw.shape[2]:
        columns, width = packed_TP.shape[1], delta_Nhw.shape[2]
        raise ValueError(f"packed_TP has {columns} columns; expected a multiple of the blocks' width {width}.")


def _check_forms_of_grad(dy_TO: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor, packed: int) -> None:
    check_matrix("dy_TO", dy_TO, (None, None))
    check_matrix("delta_Nhw", delta_Nhw, (len(blocks_N2), None, None), like=dy_TO)
    if packed % delta_Nhw.shape[2]:
        raise ValueError(f"packed is {packed}; expected a multiple of the blocks' width {delta_Nhw.shape[2]}.")


def _checked(blocks_N2: Tensor, out: int, packed: int, shape_Nhw: torch.Size) -> Listed:
    _, height, width = shape_Nhw
    rows, places = -(-out // height), packed // width
    return listed(
        "blocks_N2",
        blocks_N2,
        2,
        (rows, places),
        lambda row, place: row < rows and place < places,
        f"(row, place), with {rows} rows and {places} places",
    )


def block_delta(base_TO: Tensor, packed_TP: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor) -> Tensor:
    """A layer's output with the blocks' part added, in fp32 (fp64 for fp64 input) and rounded once on a GPU.

    Args:
        base_TO: What to add to, (T, O), any strides; not changed.
        packed_TP: Packed input columns, (T, P), of the same dtype, P a multiple of the block width.
        delta_Nhw: The blocks, (N, h, w), of the same dtype; what lies past a ragged end is not read.
        blocks_N2: (N, 2) integer tensor: block row, place of the block column in `packed_TP`.

    Returns:
        (T, O); the base itself, in new memory, in rows of W that have no block.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes do not go together, or a block lies outside or comes twice.
    """
    direct = runs_directly(base_TO, packed_TP, delta_Nhw, blocks_N2)
    return (_block_delta if direct else _block_delta_op)(base_TO, packed_TP, delta_Nhw, blocks_N2)


def block_delta_input_grad(dy_TO: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor, packed: int) -> Tensor:
    """The blocks' part of the gradient of the packed input, (T, P), zero in columns that have no block.

    Args:
        dy_TO: Gradient of the output, (T, O), any strides.
        delta_Nhw: The blocks, (N, h, w), of the same dtype.
        blocks_N2: As in `block_delta`.
        packed: Width P of the packed input.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes do not go together, or a block lies outside or comes twice.
    """
    run = _block_delta_input_grad if runs_directly(dy_TO, delta_Nhw, blocks_N2) else _block_delta_input_grad_op
    return run(dy_TO, delta_Nhw, blocks_N2, packed)
