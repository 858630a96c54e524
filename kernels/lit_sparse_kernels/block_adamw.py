"""AdamW on the fp32 masters of blocks of weight matrices, which are written into the matrices in the same pass.

The update is that of `master_adamw`; p is the master (N, h, w) of N blocks, and afterwards

    W[r h : (r + 1) h, c w : (c + 1) w] = p

rounded to the dtype of W, for each block (r, c). What of p lies past the matrix's edge is neither moved nor written; it
stays zero. Many matrices go in one launch. Like `master_adamw`, and for its reasons, this is no torch.library op.

Legend: O out, K in, N blocks, h x w block size, L blocks of a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_sparse_kernels import master_adamw
from lit_sparse_kernels.adamw_arguments import Item, Rule, check_state, items_of, scale_on
from lit_sparse_kernels.jit import Listed, enqueue, jit, listed, on_cuda, power_of_2, tl
from lit_sparse_kernels.master_adamw import adamw, addresses, corrections, pointer, type_of

CASES = [
    # (out, in) of each matrix, block size, blocks of each matrix as (row, column), dtype of the matrices
    ([(64, 64)], (32, 32), [[(0, 0), (1, 1), (1, 0)]], torch.float32),
    ([(64, 64), (96, 32)], (32, 32), [[(1, 0)], [(2, 0), (0, 0)]], torch.bfloat16),
    ([(40, 50), (17, 23)], (16, 24), [[(2, 2), (0, 1), (2, 0)], [(1, 0)]], torch.float16),  # ragged on both sides
    ([(1, 1), (300, 70)], (256, 64), [[(0, 0)], [(1, 1)]], torch.bfloat16),
    ([(64, 64), (64, 64)], (32, 32), [[], [(0, 1)]], torch.float32),
]
"""Shapes that the tests and the benchmark share."""


class Part(NamedTuple):
    """One matrix's part: its blocks, and the matrix (O, K) as `item.weight`."""

    item: Item
    blocks: Listed


def reference(
    item: Item, index_N2: Tensor, rule: Rule, grad_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, out of place. Returns the weight, and master, exp_avg and exp_avg_sq (N, h, w)."""
    _, master, m, v = master_adamw.reference(item, rule, grad_scale)
    weight, (height, width) = item.weight.clone(), master.shape[1:]
    for block, (row, column) in zip(master, index_N2.tolist(), strict=True):
        target = weight[row * height : (row + 1) * height, column * width : (column + 1) * width]
        target.copy_(block[: target.shape[0], : target.shape[1]])
    return weight, master, m, v


# ---- Triton


@jit
def _block_adamw_kernel(
    table,
    corrections,
    blocks,
    scale,
    step_size,
    root,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ORDER: tl.constexpr,
    ALIGNED: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    # A program updates an (M, N) tile of one block.
    tiles_n: tl.constexpr = (W + N - 1) // N
    tiles: tl.constexpr = (H + M - 1) // M * tiles_n
    block = blocks + tl.program_id(0) // tiles * 4
    tile = tl.program_id(0) % tiles
    matrix, slot = tl.load(block), tl.load(block + 3).to(tl.int64)
    block_row, block_column = tl.load(block + 1).to(tl.int64), tl.load(block + 2).to(tl.int64)
    row = table + matrix * 9
    weight_OK = pointer(row, WEIGHT, ALIGNED)
    grad_Nhw = pointer(row + 1, GRAD, ALIGNED)
    master_Nhw = pointer(row + 2, tl.float32, ALIGNED)
    m_Nhw = pointer(row + 3, tl.float32, ALIGNED)
    v_Nhw = pointer(row + 4, tl.float32, ALIGNED)
    outs, ins = tl.load(row + 5), tl.load(row + 6)
    stride_o, stride_k = tl.load(row + 7), tl.load(row + 8)
    if ALIGNED:  # the sides bound masks, which would forbid wide accesses
        outs, ins = tl.multiple_of(outs, 16), tl.multiple_of(ins, 16)
        stride_o, stride_k = tl.multiple_of(stride_o, 16), tl.multiple_of(stride_k, 16)
    if ORDER == "row":
        stride_k = 1
    if ORDER == "column":
        stride_o = 1

    m = tile // tiles_n * M + tl.arange(0, M)
    n = tile % tiles_n * N + tl.arange(0, N)
    out, into = block_row * H + m, block_column * W + n
    keep = ((m < H) & (out < outs))[:, None] & ((n < W) & (into < ins))[None, :]
    at = slot * (H * W) + m[:, None] * W + n[None, :]
    if corrections is not None:  # the matrices' steps differ
        step_size, root = tl.load(corrections + matrix * 2), tl.load(corrections + matrix * 2 + 1)
    grad = tl.load(grad_Nhw + at, mask=keep, other=0.0).to(tl.float32)
    p = tl.load(master_Nhw + at, mask=keep, other=0.0)
    avg = tl.load(m_Nhw + at, mask=keep, other=0.0)
    avg_sq = tl.load(v_Nhw + at, mask=keep, other=0.0)
    p, avg, avg_sq = adamw(p, grad, avg, avg_sq, scale, step_size, root, decay, beta1, rest1, beta2, rest2, eps)
    tl.store(master_Nhw + at, p, mask=keep)
    tl.store(m_Nhw + at, avg, mask=keep)
    tl.store(v_Nhw + at, avg_sq, mask=keep)
    tl.store(weight_OK + out[:, None] * stride_o + into[None, :] * stride_k, p.to(WEIGHT), mask=keep)


def launch(parts: Sequence[Part], rule: Rule, grad_scale: Tensor | None = None) -> None:
    """The kernel on matrices of one device: a launch for each combination of block size, dtypes and alignment."""
    kinds: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        if part.blocks.rows:
            item, order = part.item, _order(part.item.weight)
            kind = (item.weight.dtype, item.grad.dtype, tuple(item.master.shape[1:]), order, _aligned(item, order))
            kinds.setdefault(kind, []).append(part)
    for (weight, grad, size, order, aligned), alike in kinds.items():
        constants = {"WEIGHT": type_of(weight), "GRAD": type_of(grad), "ORDER": order, "ALIGNED": aligned}
        _launch(alike, rule, grad_scale, size, **constants)
    touched = [tensor for part in parts for tensor in (part.item.weight, *part.item.moved()[2:])]
    torch.autograd.graph.increment_version(touched)  # as an operation of torch's would


def _launch(
    parts: Sequence[Part], rule: Rule, grad_scale: Tensor | None, size: tuple[int, int], **constants: Any
) -> None:
    (height, width), device = size, parts[0].item.weight.device
    # For a matrix held as its transpose a tile is also read through shared memory, so both sides are to be long.
    n = min(64, power_of_2(width))
    m = min(2048 // n, power_of_2(height))
    blocks_L4 = _blocks(tuple(part.blocks for part in parts), device)
    items = [part.item for part in parts]
    rows = tuple(
        (*(tensor.data_ptr() for tensor in item.moved()), *item.weight.shape, *item.weight.stride()) for item in items
    )
    corrected, step_size, root = corrections(items, rule, device)
    enqueue(
        _block_adamw_kernel,
        (len(blocks_L4) * -(-height // m) * -(-width // n),),
        device,
        addresses(rows, device),
        corrected,
        blocks_L4,
        grad_scale,
        step_size,
        root,
        *rule.factors(),
        H=height,
        W=width,
        M=m,
        N=n,
        num_warps=4,
        **constants,
    )


@lru_cache(maxsize=16)
def _blocks(blocks: tuple[Listed, ...], device: torch.device) -> Tensor:
    """(matrix, row, column, slot) of all blocks of a launch, (L, 4); kept while the choice stays."""
    rows = [(number, *row, slot) for number, of_matrix in enumerate(blocks) for slot, row in enumerate(of_matrix.rows)]
    return torch.tensor(rows, dtype=torch.int32).to(device)


def _order(weight_OK: Tensor) -> str:
    """Along which side neighbours stand next to each other in memory."""
    return "row" if weight_OK.stride(1) == 1 else "column" if weight_OK.stride(0) == 1 else "none"


def _aligned(item: Item, order: str) -> bool:
    """Return whether accesses may be 16 bytes wide, in the blocks and in the matrix."""
    lead = item.weight.stride(0 if order == "row" else 1)
    numbers = (*(tensor.data_ptr() for tensor in item.moved()), *item.weight.shape, lead)
    return order != "none" and all(number % 16 == 0 for number in numbers)


# ---- torch


def on_host(parts: Sequence[Part], rule: Rule, grad_scale: Tensor | None = None) -> None:
    """The same by torch: the masters' update, then their copies."""
    master_adamw.on_host([part.item._replace(weight=part.item.master) for part in parts], rule, grad_scale)
    for part in parts:
        _write(part)


def _write(part: Part) -> None:
    weight_OK, master_Nhw = part.item.weight, part.item.master
    height, width = master_Nhw.shape[1:]
    rows, columns = weight_OK.shape[0] // height, weight_OK.shape[1] // width
    slots, places, ragged = _whole(part.blocks, rows, columns)
    if len(slots):
        whole = (
            weight_OK[: rows * height, : columns * width].unflatten(1, (columns, width)).unflatten(0, (rows, height))
        )
        values = master_Nhw if len(slots) == len(master_Nhw) else master_Nhw[slots]
        whole.transpose(1, 2)[places] = values.to(weight_OK.dtype)
    for slot, (row, column) in ragged:
        target = weight_OK[row * height : (row + 1) * height, column * width : (column + 1) * width]
        target.copy_(master_Nhw[slot, : target.shape[0], : target.shape[1]])


def _whole(blocks: Listed, rows: int, columns: int) -> tuple[Tensor, tuple[Tensor, Tensor], list[Any]]:
    """Slots and (rows, columns) of the blocks that do not reach over an edge; the others by slot."""
    host = torch.device("cpu")
    if host not in blocks.tables:
        inside = [(slot, *place) for slot, place in enumerate(blocks.rows) if place[0] < rows and place[1] < columns]
        slots, row, column = torch.tensor(inside, dtype=torch.int64).view(-1, 3).unbind(1)
        known = {slot for slot, *_ in inside}
        ragged = [(slot, place) for slot, place in enumerate(blocks.rows) if slot not in known]
        blocks.tables[host] = slots, (row.contiguous(), column.contiguous()), ragged
    return blocks.tables[host]


def _checked(number: int, item: Item, index_N2: Tensor) -> Part:
    weight, master = item.weight, item.master
    if weight.ndim != 2:
        raise ValueError(f"weights[{number}] has shape {tuple(weight.shape)}; expected (any, any).")
    if master.ndim != 3 or 0 in master.shape[1:]:
        raise ValueError(f"masters[{number}] has shape {tuple(master.shape)}; expected (blocks, height, width).")
    if not master.is_contiguous():
        raise ValueError(f"masters[{number}] has strides {master.stride()}; expected a contiguous tensor.")
    check_state(number, item, master)
    rows, columns = (-(-side // step) for side, step in zip(weight.shape, master.shape[1:], strict=True))
    blocks = listed(
        f"indices[{number}]",
        index_N2,
        2,
        (rows, columns),
        lambda row, column: row < rows and column < columns,
        f"(row, column), with {rows} rows and {columns} columns of blocks",
    )
    if len(blocks.rows) != len(master):
        raise ValueError(f"indices[{number}] has {len(blocks.rows)} blocks; expected {len(master)}, as the master has.")
    return Part(item, blocks)


@torch.no_grad()
def block_adamw(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[float],
    rule: Rule,
    grad_scale: Tensor | None = None,
) -> None:
    """One AdamW step of the blocks of all matrices, in place; the matrices hold the blocks afterwards.

    Args:
        weights: Matrices (O, K), in any mix of dtypes, with any strides.
        indices: Of each matrix its blocks, (N, 2) integers: row, column.
        grads: (N, h, w) contiguous. Left as they are on a GPU; on the host divided by `grad_scale` in place.
        masters: The blocks in fp32 (fp64 of fp64 matrices, on the host), (N, h, w) contiguous, zero past an edge.
        exp_avgs, exp_avg_sqs: First and second moments, as `masters`.
        steps: Of each matrix the number of this step, from 1.
        rule: The arguments of AdamW.
        grad_scale: One fp32 number that divides the gradients.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes do not go together, or a block lies outside or comes twice.
    """
    names = ("weights", "grads", "masters", "exp_avgs", "exp_avg_sqs", "steps")
    items = items_of(names, (weights, grads, masters, exp_avgs, exp_avg_sqs, steps))
    if len(indices) != len(items):
        raise ValueError(f"indices has {len(indices)} entries; expected {len(items)}, as weights has.")
    parts = [_checked(number, item, index) for number, (item, index) in enumerate(zip(items, indices, strict=True))]
    for device in {part.item.weight.device: None for part in parts}:
        here, scale = [part for part in parts if part.item.weight.device == device], scale_on(device, grad_scale)
        run = launch if on_cuda(here[0].item.weight) else on_host
        run(here, rule, scale)
