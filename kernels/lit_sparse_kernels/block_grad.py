"""Gradients of selected blocks of the weights of linear layers that share their input.

For Y = X W^T with W (O, K) cut into blocks of h x w, the gradient of block (r, c) is

    dS_i = dY[:, r h : (r + 1) h]^T  X[:, c w : (c + 1) w]

and nothing else of dW = dY^T X is formed. X comes with only the block columns that are needed, packed side by side
(`pack_columns`), so a block names its column by its place in there. Layers of one input (q, k and v) go in one launch.
arXiv 2405.15525, section 3.

Legend: T tokens, O out, P packed in (kept block columns x w), N blocks, h x w block size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

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
    multiprocessors,
    on_cuda,
    power_of_2,
    runs,
    runs_directly,
    shared_bytes,
    tl,
)

CASES = [
    # tokens, out of each layer, packed columns, block size, blocks as (layer, row, packed column), dtype
    (64, (96,), 64, (32, 32), [(0, 0, 0), (0, 2, 0), (0, 1, 1)], torch.float32),
    (63, (80,), 32, (32, 32), [(0, 2, 0)], torch.float32),  # one block, in the ragged last row
    (17, (40,), 48, (16, 24), [(0, r, c) for c in range(2) for r in range(3)], torch.float32),  # all of them
    (300, (64,), 64, (32, 32), [(0, 1, 0), (0, 0, 1)], torch.bfloat16),
    (600, (64, 72), 64, (32, 32), [(0, 1, 0), (1, 2, 0), (1, 0, 1)], torch.float32),  # tokens divided, ragged
    (100, (64, 40, 48), 64, (32, 32), [(0, 1, 0), (1, 0, 0), (1, 1, 1), (2, 1, 1), (2, 1, 0)], torch.float16),
    (40, (32, 32, 32, 32), 16, (16, 16), [(n, r, 0) for n in (3, 0, 1, 2) for r in (0, 1)], torch.float32),
    (5, (64,), 64, (64, 64), [], torch.float32),
]
"""Shapes that the tests and the benchmark share."""
LAYERS = 3
"""Layers of one launch: q, k and v."""


class Plan(NamedTuple):
    """Tile of a launch: sides `m` and `n`, and tokens `k` of each step of its sum."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def reference(dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks_N3: Tensor, size: Sequence[int]) -> Tensor:
    """The definition, through the dense dY^T X in fp32 (fp64 for fp64 input). Returns (N, h, w)."""
    height, width = size
    dtype = torch.promote_types(packed_TP.dtype, torch.float32)
    out = [packed_TP.new_empty(0, height, width, dtype=dtype)]
    dense = [dy_TO.to(dtype).t() @ packed_TP.to(dtype) for dy_TO in dys_TO]
    padded = [torch.nn.functional.pad(dense_OP, (0, 0, 0, -len(dense_OP) % height)) for dense_OP in dense]
    for layer, row, place in blocks_N3.tolist():
        out.append(padded[layer][None, row * height : (row + 1) * height, place * width : (place + 1) * width])
    return torch.cat(out)


@jit(do_not_specialize=("tokens", "steps", "splits"))  # or each new length of a batch would be compiled anew
def _block_grad_kernel(
    dy_0,
    dy_1,
    dy_2,
    x,
    table,
    out,
    parts,
    tokens,
    steps,
    splits,
    end_0,
    end_1,
    end_2,
    end_x,
    stride_0,
    stride_1,
    stride_2,
    stride_x,
    ADD: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dY[first : last, row : row + M]^T X[first : last, column : column + N], an (M, N) tile of a block's gradient.
    # `splits` programs share the `steps` steps of a tile; with one, the tile goes to `out`, otherwise sums to `parts`.
    tiles_n: tl.constexpr = (W + N - 1) // N
    tiles: tl.constexpr = (H + M - 1) // M * tiles_n
    program = tl.program_id(0)
    number, split = program // splits, program % splits
    entry, tile = table + number // tiles * 4, number % tiles
    layer, row, place, slot = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    dy = tl.where(layer == 0, dy_0, tl.where(layer == 1, dy_1, dy_2))
    end_m = tl.where(layer == 0, end_0, tl.where(layer == 1, end_1, end_2))
    stride = tl.where(layer == 0, stride_0, tl.where(layer == 1, stride_1, stride_2))
    row_m, column_n = tile // tiles_n * M, tile % tiles_n * N
    first, last = split * steps // splits * K, tl.minimum((split + 1) * steps // splits * K, tokens)
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    at_m, at_n = row * H + row_m + m, place * W + column_n + n
    keep_m, keep_n = at_m < tl.minimum(end_m, row * H + H), at_n < tl.minimum(end_x, place * W + W)
    token = (first + k).to(tl.int64)  # tokens x columns may pass 2^31
    dy_MK = dy + token[None, :] * stride + at_m[:, None]
    x_KN = x + token[:, None] * stride_x + at_n[None, :]
    sum_MN = tl.full((M, N), 0.0, tl.float32)
    for start in range(first, last, K):
        keep_k = start + k < last
        left = tl.load(dy_MK, mask=keep_m[:, None] & keep_k[None, :], other=0.0)
        right = tl.load(x_KN, mask=keep_k[:, None] & keep_n[None, :], other=0.0)
        sum_MN = tl.dot(left, right, sum_MN, input_precision=PRECISION)
        dy_MK += K * stride
        x_KN += K * stride_x
    if splits == 1:
        inside = (row_m + m < H)[:, None] & (column_n + n < W)[None, :]
        out_MN = out + slot.to(tl.int64) * (H * W) + (row_m + m)[:, None] * W + (column_n + n)[None, :]
        if ADD:
            sum_MN += tl.load(out_MN, mask=inside, other=0.0)
        tl.store(out_MN, sum_MN, mask=inside)
    else:
        tl.store(parts + program.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :], sum_MN)


@jit(do_not_specialize=("splits",))
def _join_parts_kernel(
    parts,
    table,
    out,
    splits,
    ADD: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    # Adds up, in the order of the tokens, R rows of a tile that `splits` programs of `_block_grad_kernel` have made.
    tiles_n: tl.constexpr = (W + N - 1) // N
    tiles: tl.constexpr = (H + M - 1) // M * tiles_n
    number = tl.program_id(0)
    m, n = tl.program_id(1) * R + tl.arange(0, R), tl.arange(0, N)
    part_RN = parts + number.to(tl.int64) * splits * (M * N) + m[:, None] * N + n[None, :]
    sum_RN = tl.load(part_RN)
    for split in range(1, splits):
        sum_RN += tl.load(part_RN + split * (M * N))
    row_m, column_n = number % tiles // tiles_n * M, number % tiles % tiles_n * N
    inside = (row_m + m < H)[:, None] & (column_n + n < W)[None, :]
    slot = tl.load(table + number // tiles * 4 + 3).to(tl.int64)
    out_RN = out + slot * (H * W) + (row_m + m)[:, None] * W + (column_n + n)[None, :]
    if ADD:
        sum_RN += tl.load(out_RN, mask=inside, other=0.0)
    tl.store(out_RN, sum_RN, mask=inside)


def launch(
    dys_TO: Sequence[Tensor],
    packed_TP: Tensor,
    blocks: Listed,
    size: Sequence[int],
    into: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Return the kernel's result, (N, h, w) in fp32; added to `into`, in place, if that is given.

    On an H200 torch's whole dY^T X and a copy of its blocks take 200 us for q, k and v of Llama-3.2-1B at 8,192 tokens,
    this takes 171 us for all 96 blocks of 256: no share of blocks is large enough for the whole product.
    """
    count, (height, width) = len(blocks.rows), size
    plan = plan or plan_for(packed_TP, size)
    out = packed_TP.new_empty(count, height, width, dtype=torch.float32) if into is None else into
    packed_TP = packed_TP if packed_TP.stride(1) == 1 else packed_TP.contiguous()
    for first, table in _tables(blocks, packed_TP.device):
        _launch(dys_TO[first : first + LAYERS], packed_TP, table, size, out, into is not None, plan)
    return out


def plan_for(packed_TP: Tensor, size: Sequence[int]) -> Plan:
    """Return the fastest plan for the dtype, the device and the blocks' size.

    Four stages of 128 x 256 x 64 take 192 KiB, which an H100 has and an A100 has not. On an H200 they reach the dense
    rate on each multiprocessor that has a tile, and are 1.24 to 1.5 times as fast as three stages of 128 x 128; tensor
    descriptors gained 2 %, equal shares of the steps for each multiprocessor lost 30 % (their tiles read different
    tokens, which the cache does not hold): benchmarks/results/block_grad_variants.jsonl.
    """
    m, n = (min(128, max(16, power_of_2(side))) for side in size)
    if packed_TP.element_size() != 2:
        return Plan(m, n, 32, warps=8 if m * n > 32 * 64 else 4, stages=3)
    wide = Plan(128, 256, 64, warps=8, stages=4)
    fits = wide.stages * (wide.m + wide.n) * wide.k * 2 <= shared_bytes(packed_TP.device)
    if fits and m == wide.m and -(-size[1] // wide.n) * wide.n == -(-size[1] // n) * n:  # no more columns for nothing
        return wide
    return Plan(m, n, 64, warps=8 if m * n > 64 * 64 else 4, stages=3)


@lru_cache(maxsize=1024)
def splits_for(tiles: int, steps: int, processors: int) -> int:
    """Return how many programs share the steps of each tile.

    The cost of a split is the steps of the busiest multiprocessor, and writing and adding up the parts, in steps: on an
    H200 a step of 128 x 256 x 64 takes 0.66 us, the second launch 3 us, and a part of 128 x 256, there and back,
    0.06 us. Parts of unequal lengths could keep all multiprocessors busy, but need more parts: at 27 blocks of 256 and
    8,192 tokens (54 tiles, 108 programs of 64 steps) they would save 12 steps and cost 8.
    """

    def cost(splits: int) -> float:
        joined = 0 if splits == 1 else 4 + 0.08 * tiles * splits
        return -(-tiles * splits // processors) * -(-steps // splits) + joined

    return min(range(1, max(1, min(16, steps // 8)) + 1), key=cost)


def _launch(
    dys_TO: Sequence[Tensor],
    packed_TP: Tensor,
    table_N4: Tensor,
    size: Sequence[int],
    out_Nhw: Tensor,
    add: bool,
    plan: Plan,
) -> None:
    (height, width), tokens, device = size, len(packed_TP), packed_TP.device
    dys = [dy if dy.stride(1) == 1 else dy.contiguous() for dy in dys_TO]
    dys += dys[:1] * (LAYERS - len(dys))
    tiles, steps = len(table_N4) * -(-height // plan.m) * -(-width // plan.n), -(-tokens // plan.k)
    splits = splits_for(tiles, steps, multiprocessors(device))
    parts = out_Nhw if splits == 1 else out_Nhw.new_empty(tiles * splits, plan.m, plan.n)
    shared = {"ADD": add, "H": height, "W": width, "M": plan.m, "N": plan.n}
    enqueue(
        _block_grad_kernel,
        (tiles * splits,),
        device,
        *(*dys, packed_TP, table_N4, out_Nhw, parts),
        *(tokens, steps, splits),
        *(dy.shape[1] for dy in (*dys, packed_TP)),
        *(dy.stride(0) for dy in (*dys, packed_TP)),
        K=plan.k,
        PRECISION="ieee" if fp32_is_exact() else "tf32",
        num_warps=plan.warps,
        num_stages=plan.stages,
        **shared,
    )
    if splits > 1:
        rows = min(plan.m, max(1, 4096 // plan.n))
        grid = tiles, plan.m // rows
        enqueue(_join_parts_kernel, grid, device, parts, table_N4, out_Nhw, splits, R=rows, **shared)


def _tables(blocks: Listed, device: torch.device) -> list[tuple[int, Tensor]]:
    """Return for each launch its first layer, and (layer, row, place, slot) of its blocks in an order that reuses X."""
    if device not in blocks.tables:
        slotted = sorted((place, layer, row, slot) for slot, (layer, row, place) in enumerate(blocks.rows))
        made: dict[int, list[tuple[int, ...]]] = {}
        for place, layer, row, slot in slotted:
            made.setdefault(layer // LAYERS, []).append((layer % LAYERS, row, place, slot))
        blocks.tables[device] = [
            (turn * LAYERS, torch.tensor(rows, dtype=torch.int32, device=device)) for turn, rows in sorted(made.items())
        ]
    return blocks.tables[device]


def on_host(
    dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks: Listed, size: Sequence[int], into: Tensor | None = None
) -> Tensor:
    """The same by torch: a product for each run of blocks that stand one below the other, in order."""
    height, width = size
    dtype = torch.promote_types(packed_TP.dtype, torch.float32)
    packed_TP = packed_TP.to(dtype)
    out = packed_TP.new_zeros(len(blocks.rows), height, width) if into is None else into
    dense = {layer: dys_TO[layer].to(dtype).t() @ packed_TP for layer in _nearly_whole(dys_TO, packed_TP, blocks, size)}
    for slot, count, (layer, row, place) in runs(blocks):
        rows, columns = slice(row * height, (row + count) * height), slice(place * width, (place + 1) * width)
        target = out[slot : slot + count].view(-1, width)
        if layer in dense:
            part = dense[layer][rows, columns]
            target[: len(part)].add_(part)
        else:
            dy = dys_TO[layer][:, rows].t().to(dtype)
            torch.addmm(
                target[: len(dy)], dy, packed_TP[:, columns], beta=0 if into is None else 1, out=target[: len(dy)]
            )
    return out


def _nearly_whole(dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks: Listed, size: Sequence[int]) -> Iterator[int]:
    """Yield layers of which three quarters of all blocks are wanted: one product is faster on a CPU, waste included."""
    for layer, wanted in Counter(layer for layer, _, _ in blocks.rows).items():
        if wanted >= 0.75 * -(-dys_TO[layer].shape[1] // size[0]) * (packed_TP.shape[1] // size[1]):
            yield layer


def _block_grad(dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks_N3: Tensor, size: Sequence[int]) -> Tensor:
    run = launch if on_cuda(packed_TP) else on_host
    return run(dys_TO, packed_TP, _checked(dys_TO, packed_TP, blocks_N3, size), size)


_block_grad_op = torch.library.custom_op("lit_sparse::block_grad", _block_grad, mutates_args=())


@_block_grad_op.register_fake
def _(dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks_N3: Tensor, size: Sequence[int]) -> Tensor:
    dtype = torch.promote_types(packed_TP.dtype, torch.float32)
    return packed_TP.new_empty(len(blocks_N3), *size, dtype=dtype)


def _add_block_grad(
    into_Nhw: Tensor, dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks_N3: Tensor, size: Sequence[int]
) -> None:
    blocks = _checked(dys_TO, packed_TP, blocks_N3, size)
    _check_into(into_Nhw, packed_TP, (len(blocks.rows), *size))
    run = launch if on_cuda(packed_TP) else on_host
    run(dys_TO, packed_TP, blocks, size, into_Nhw)


_add_block_grad_op = torch.library.custom_op("lit_sparse::add_block_grad", _add_block_grad, mutates_args=("into_Nhw",))


@register_flop_formula(torch.ops.lit_sparse.block_grad)
def _(dys: Any, packed: Sequence[int], blocks: Sequence[int], size: Sequence[int], **_: Any) -> int:
    # Of the arguments only shapes are given: rows past a ragged end count too.
    return 2 * packed[0] * blocks[0] * size[0] * size[1]


@register_flop_formula(torch.ops.lit_sparse.add_block_grad)
def _(into: Any, dys: Any, packed: Sequence[int], blocks: Sequence[int], size: Sequence[int], **_: Any) -> int:
    return 2 * packed[0] * blocks[0] * size[0] * size[1]


def _check_into(into_Nhw: Tensor, packed_TP: Tensor, shape: tuple[int, ...]) -> None:
    dtype = torch.promote_types(packed_TP.dtype, torch.float32)
    alike = (into_Nhw.dtype, into_Nhw.device) == (dtype, packed_TP.device) and tuple(into_Nhw.shape) == shape
    if not alike or not into_Nhw.is_contiguous():
        raise ValueError(
            f"into_Nhw is {into_Nhw.dtype} of shape {tuple(into_Nhw.shape)} and strides {into_Nhw.stride()} on "
            f"{into_Nhw.device}; expected {dtype} of shape {shape}, contiguous, on {packed_TP.device}."
        )


def _checked(dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks_N3: Tensor, size: Sequence[int]) -> Listed:
    check_matrix("packed_TP", packed_TP, (None, None))
    for number, dy in enumerate(dys_TO):
        check_matrix(f"dys_TO[{number}]", dy, (len(packed_TP), None), like=packed_TP)
    rows = tuple(-(-dy.shape[1] // size[0]) for dy in dys_TO)
    places = packed_TP.shape[1] // size[1]
    return listed(
        "blocks_N3",
        blocks_N3,
        3,
        (rows, places),
        lambda layer, row, place: layer < len(rows) and row < rows[layer] and place < places,
        f"(layer, row, place), with {rows} rows in the layers and {places} places",
    )


def block_grad(
    dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks_N3: Tensor, size: Sequence[int], into_Nhw: Tensor | None = None
) -> Tensor:
    """Gradients of the blocks, accumulated in fp32 (fp64 for fp64 input).

    Args:
        dys_TO: Gradients of the layers' outputs, (T, O) each, any strides; O may differ.
        packed_TP: Packed input columns of the same dtype, (T, P), P a multiple of the block width.
        blocks_N3: (N, 3) integer tensor: layer, block row, place of the block column in `packed_TP`.
        size: Block height and width.
        into_Nhw: Where to add them, in place, instead of in new memory; of the result's form, contiguous.

    Returns:
        (N, h, w); rows past the end of a ragged last block row are zero.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes do not go together, or a block lies outside or comes twice.
    """
    if into_Nhw is None:
        run = _block_grad if runs_directly(*dys_TO, packed_TP, blocks_N3) else _block_grad_op
        return run(dys_TO, packed_TP, blocks_N3, size)
    direct = runs_directly(into_Nhw, *dys_TO, packed_TP, blocks_N3)
    (_add_block_grad if direct else _add_block_grad_op)(into_Nhw, dys_TO, packed_TP, blocks_N3, size)
    if direct and into_Nhw.is_cuda:
        torch.autograd.graph.increment_version(into_Nhw)  # as the dispatcher would
    return into_Nhw
