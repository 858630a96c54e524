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
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_sparse_kernels.jit import (
    Listed,
    check_matrix,
    enqueue,
    jit,
    listed,
    multiprocessors,
    on_cuda,
    power_of_2,
    runs,
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
"""Of one launch: q, k and v."""
DENSE_FROM = 0.6
"""Share of a layer's blocks from which its whole product, with what it wastes, is faster on a GPU."""


class Plan(NamedTuple):
    """How a launch divides the work; `plan_for` chooses.

    Attributes:
        m, n, k: Sides of a tile, and tokens of one step of its sum.
        tma: Whether tiles are read by tensor descriptors.
        split: `none`: a program a tile. `even`: as many programs for each tile as shorten the longest one. `stream`: a
            program a multiprocessor, each with an equal run of steps, wherever tiles begin and end in it.
        dense_from: Share of a layer's blocks from which its whole product is made.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool = False
    split: Literal["none", "even", "stream"] = "even"
    dense_from: float = DENSE_FROM


PLANS = {
    "128x128, 8 warps": Plan(128, 128, 64, 8, 3),
    "128x128, 4 warps": Plan(128, 128, 64, 4, 3),
    "128x256": Plan(128, 256, 64, 8, 3),
    "128x256, 4 stages": Plan(128, 256, 64, 8, 4),
    "256x128": Plan(256, 128, 64, 8, 3),
    "128x256, 128 tokens": Plan(128, 256, 128, 8, 2),
    "tma 128x128, 4 warps": Plan(128, 128, 64, 4, 3, tma=True),
    "tma 128x256": Plan(128, 256, 64, 8, 3, tma=True),
    "tma 128x256, 4 stages": Plan(128, 256, 64, 8, 4, tma=True),
    "tma 256x128": Plan(256, 128, 64, 8, 4, tma=True),
}
"""Of bf16 blocks of 256, what `python -m benchmarks.block_grad_variants` compares."""


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


@jit
def _sum_by_pointers(
    dy,
    x,
    stride,
    stride_x,
    end_m,
    end_n,
    row,
    column,
    begin,
    stop,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dY[begin : stop, row : row + M]^T X[begin : stop, column : column + N]; zero from the ends on.
    m, n, k = row + tl.arange(0, M), column + tl.arange(0, N), tl.arange(0, K)
    keep_m, keep_n = m < end_m, n < end_n
    token = (begin + k).to(tl.int64)  # tokens x columns may pass 2^31
    dy_MK = dy + token[None, :] * stride + m[:, None]
    x_KN = x + token[:, None] * stride_x + n[None, :]
    sum_MN = tl.full((M, N), 0.0, tl.float32)
    for start in range(begin, stop, K):
        keep_k = start + k < stop
        left = tl.load(dy_MK, mask=keep_m[:, None] & keep_k[None, :], other=0.0)
        right = tl.load(x_KN, mask=keep_k[:, None] & keep_n[None, :], other=0.0)
        sum_MN = tl.dot(left, right, sum_MN, input_precision=PRECISION)
        dy_MK += K * stride
        x_KN += K * stride_x
    return sum_MN


@jit
def _sum_by_descriptors(
    dy, x, row, column, begin, stop, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr
):
    # The same; what lies outside of the tensors is zero, and what lies outside of the block is not stored.
    sum_MN = tl.full((M, N), 0.0, tl.float32)
    for start in range(begin, stop, K):
        left, right = dy.load([start, row]), x.load([start, column])
        sum_MN = tl.dot(left.T, right, sum_MN, input_precision=PRECISION)
    return sum_MN


@jit(do_not_specialize=("tokens", "steps", "total"))  # or each new length of a batch would be compiled anew
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
    total,
    end_0,
    end_1,
    end_2,
    end_x,
    stride_0,
    stride_1,
    stride_2,
    stride_x,
    ADD: tl.constexpr,
    TMA: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # An (M, N) tile of a block's gradient takes `steps` steps over the tokens. A program makes an equal share of the
    # `total` steps of all tiles: tiles that lie in it whole go to `out`, the others' sums to `parts`.
    tiles_n: tl.constexpr = (W + N - 1) // N
    tiles: tl.constexpr = (H + M - 1) // M * tiles_n
    program = tl.program_id(0).to(tl.int64)
    at = (program * total // tl.num_programs(0)).to(tl.int32)
    end = ((program + 1) * total // tl.num_programs(0)).to(tl.int32)
    while at < end:
        begin = at % steps
        stop = tl.minimum(steps, begin + end - at)
        whole = (begin == 0) & (stop == steps)
        entry = table + at // steps // tiles * 4
        tile = at // steps % tiles
        at += stop - begin
        layer, row, place, slot = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        row_m, column_n = tile // tiles_n * M, tile % tiles_n * N
        first, last = begin * K, tl.minimum(stop * K, tokens)
        if TMA:
            down, along = row * H + row_m, place * W + column_n
            dy = dy_0  # chosen before the loop: a loop for each would have its own buffers
            if layer == 1:
                dy = dy_1
            elif layer == 2:
                dy = dy_2
            sum_MN = _sum_by_descriptors(dy, x, down, along, first, last, K, M, N, PRECISION)
        else:
            dy = tl.where(layer == 0, dy_0, tl.where(layer == 1, dy_1, dy_2))
            end_m = tl.where(layer == 0, end_0, tl.where(layer == 1, end_1, end_2))
            stride = tl.where(layer == 0, stride_0, tl.where(layer == 1, stride_1, stride_2))
            sum_MN = _sum_by_pointers(
                dy,
                x,
                stride,
                stride_x,
                tl.minimum(end_m, row * H + H),
                tl.minimum(end_x, place * W + W),
                row * H + row_m,
                place * W + column_n,
                first,
                last,
                K,
                M,
                N,
                PRECISION,
            )
        m, n = tl.arange(0, M), tl.arange(0, N)
        inside = (row_m + m < H)[:, None] & (column_n + n < W)[None, :]
        if whole:
            out_MN = out + slot.to(tl.int64) * (H * W) + (row_m + m)[:, None] * W + (column_n + n)[None, :]
            if ADD:
                sum_MN += tl.load(out_MN, mask=inside, other=0.0)
            tl.store(out_MN, sum_MN, mask=inside)
        else:  # a program's first tile may have begun before it, its last one may go on after it
            part_MN = parts + (2 * program + (begin == 0).to(tl.int64)) * (M * N) + m[:, None] * N + n[None, :]
            tl.store(part_MN, sum_MN)


@jit(do_not_specialize=("steps", "total", "programs"))
def _join_parts_kernel(
    parts,
    table,
    out,
    steps,
    total,
    programs,
    ADD: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    # Adds up, in the order of the tokens, R rows of a tile that several programs of `_block_grad_kernel` have made.
    tiles_n: tl.constexpr = (W + N - 1) // N
    tiles: tl.constexpr = (H + M - 1) // M * tiles_n
    number = tl.program_id(0)
    begin = number.to(tl.int64) * steps
    one = ((begin + 1) * programs - 1) // total  # the program of the tile's first step
    last = ((begin + steps) * programs - 1) // total
    if one < last:
        m, n = tl.program_id(1) * R + tl.arange(0, R), tl.arange(0, N)
        part_RN = parts + m[:, None] * N + n[None, :]
        sum_RN = tl.load(part_RN + (2 * one + 1) * (M * N))
        for other in range(one + 1, last + 1):
            sum_RN += tl.load(part_RN + 2 * other * (M * N))
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
    """The kernel's result, (N, h, w) in fp32; added to `into`, in place, if that is given."""
    count, (height, width) = len(blocks.rows), size
    plan = plan or plan_for(packed_TP, size)
    out = packed_TP.new_empty(count, height, width, dtype=torch.float32) if into is None else into
    packed_TP = packed_TP if packed_TP.stride(1) == 1 else packed_TP.contiguous()
    dense = tuple(_nearly_whole(dys_TO, packed_TP, blocks, size, plan.dense_from))
    for layer in dense:
        _whole_product(dys_TO[layer], packed_TP, layer, blocks, out, into is not None)
    for first, table in _tables(blocks, packed_TP.device, dense):
        _launch(dys_TO[first : first + LAYERS], packed_TP, table, size, out, into is not None, plan)
    return out


def plan_for(packed_TP: Tensor, size: Sequence[int]) -> Plan:
    """What is fastest for the dtype and the blocks' size."""
    m, n = (min(128, max(16, power_of_2(side))) for side in size)
    k = 64 if packed_TP.element_size() == 2 else 32
    return Plan(m, n, k, warps=8 if m * n * packed_TP.element_size() > 64 * 64 * 2 else 4, stages=3)


def programs_for(plan: Plan, tiles: int, steps: int, processors: int) -> int:
    """How many programs share the steps of all tiles.

    The cost of a division is the steps of the busiest multiprocessor, and its share of writing and adding up parts, in
    steps: a step of 128 x 256 x 64 takes 0.8 us on an H100, and a part of 128 x 256, there and back, 0.06 us.
    """
    if plan.split == "none":
        return tiles
    if plan.split == "stream":
        return min(processors, tiles * steps)

    def cost(splits: int) -> float:
        joined = 0 if splits == 1 else 4 + 0.08 * tiles * splits
        return -(-tiles * splits // processors) * -(-steps // splits) + joined

    return tiles * min(range(1, max(1, min(16, steps // 8)) + 1), key=cost)


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
    tma = plan.tma and all(map(_described, (*dys, packed_TP)))
    tiles, steps = len(table_N4) * -(-height // plan.m) * -(-width // plan.n), -(-tokens // plan.k)
    programs = programs_for(plan, tiles, steps, multiprocessors(device))
    whole = programs == tiles
    parts = out_Nhw if whole else out_Nhw.new_empty(2 * programs, plan.m, plan.n)
    shared = {"ADD": add, "H": height, "W": width, "M": plan.m, "N": plan.n}
    enqueue(
        _block_grad_kernel,
        (programs,),
        device,
        *(_descriptor(dy, plan.k, plan.m) if tma else dy for dy in dys),
        _descriptor(packed_TP, plan.k, plan.n) if tma else packed_TP,
        table_N4,
        out_Nhw,
        parts,
        tokens,
        steps,
        tiles * steps,
        *(dy.shape[1] for dy in (*dys, packed_TP)),
        *(dy.stride(0) for dy in (*dys, packed_TP)),
        TMA=tma,
        K=plan.k,
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        num_warps=plan.warps,
        num_stages=plan.stages,
        **shared,
    )
    if not whole:
        rows = min(plan.m, max(1, 4096 // plan.n))
        grid = tiles, plan.m // rows
        enqueue(
            _join_parts_kernel, grid, device, parts, table_N4, out_Nhw, steps, tiles * steps, programs, R=rows, **shared
        )


def _described(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can read it: addresses and strides are multiples of 16 bytes."""
    return matrix.element_size() == 2 and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * 2 % 16 == 0


def _descriptor(matrix: Tensor, rows: int, columns: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _whole_product(dy_TO: Tensor, packed_TP: Tensor, layer: int, blocks: Listed, out_Nhw: Tensor, add: bool) -> None:
    """All of one layer's dW by torch, of which the blocks are taken."""
    height, width = out_Nhw.shape[1:]
    dw_OP = _product(dy_TO.t(), packed_TP)
    rows = -(-len(dw_OP) // height)
    dw_OP = torch.nn.functional.pad(dw_OP, (0, 0, 0, rows * height - len(dw_OP)))
    slots, at = _slots(blocks, layer, rows, packed_TP.shape[1] // width, out_Nhw.device)
    found = dw_OP.view(rows, height, -1, width).permute(2, 0, 1, 3)
    found = found.reshape(-1, height, width) if at is None else found[at[1], at[0]]
    if isinstance(slots, slice):
        target = out_Nhw[slots]
        target.add_(found) if add else target.copy_(found)
    else:
        (out_Nhw.index_add_ if add else out_Nhw.index_copy_)(0, slots, found)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Their product in fp32; on a host, where interpretation runs, torch has none of half precision."""
    if left.device.type == "cpu":
        return left.float() @ right.float()
    return left @ right if left.dtype == torch.float32 else torch.mm(left, right, out_dtype=torch.float32)


def _slots(
    blocks: Listed, layer: int, rows: int, places: int, device: torch.device
) -> tuple[slice | Tensor, tuple[Tensor, Tensor] | None]:
    """The slots of a layer's blocks, and their (rows, places); None where these are all, in order."""
    key = device, layer
    if key not in blocks.tables:
        mine = [(slot, row, place) for slot, (of, row, place) in enumerate(blocks.rows) if of == layer]
        slots, row, place = torch.tensor(mine).t().contiguous()
        first, count = int(slots[0]), len(mine)
        in_order = [(row, place) for place in range(places) for row in range(rows)] == [one[1:] for one in mine]
        following = int(slots[-1]) - first + 1 == count
        blocks.tables[key] = (
            slice(first, first + count) if following else slots.to(device),
            None if in_order else (row.to(device), place.to(device)),
        )
    return blocks.tables[key]


def _tables(blocks: Listed, device: torch.device, without: tuple[int, ...] = ()) -> list[tuple[int, Tensor]]:
    """For each launch its first layer, and (layer, row, place, slot) of its blocks in an order that reuses X."""
    key = device, without
    if key not in blocks.tables:
        slotted = sorted((place, layer, row, slot) for slot, (layer, row, place) in enumerate(blocks.rows))
        made: dict[int, list[tuple[int, ...]]] = {}
        for place, layer, row, slot in slotted:
            if layer not in without:
                made.setdefault(layer // LAYERS, []).append((layer % LAYERS, row, place, slot))
        blocks.tables[key] = [
            (turn * LAYERS, torch.tensor(rows, dtype=torch.int32, device=device)) for turn, rows in sorted(made.items())
        ]
    return blocks.tables[key]


def on_host(
    dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks: Listed, size: Sequence[int], into: Tensor | None = None
) -> Tensor:
    """The same by torch: a product for each run of blocks that stand one below the other, in order."""
    height, width = size
    dtype = torch.promote_types(packed_TP.dtype, torch.float32)
    packed_TP = packed_TP.to(dtype)
    out = packed_TP.new_zeros(len(blocks.rows), height, width) if into is None else into
    dense = {
        layer: dys_TO[layer].to(dtype).t() @ packed_TP for layer in _nearly_whole(dys_TO, packed_TP, blocks, size, 0.75)
    }
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


def _nearly_whole(
    dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks: Listed, size: Sequence[int], share: float
) -> Iterator[int]:
    """Layers of which such a share of all blocks is wanted: one large product is faster with what it wastes."""
    for layer, wanted in Counter(layer for layer, _, _ in blocks.rows).items():
        if wanted >= share * -(-dys_TO[layer].shape[1] // size[0]) * (packed_TP.shape[1] // size[1]):
            yield layer


@torch.library.custom_op("lit_sparse::block_grad", mutates_args=())
def _block_grad(dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks_N3: Tensor, size: Sequence[int]) -> Tensor:
    run = launch if on_cuda(packed_TP) else on_host
    return run(dys_TO, packed_TP, _checked(dys_TO, packed_TP, blocks_N3, size), size)


@_block_grad.register_fake
def _(dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks_N3: Tensor, size: Sequence[int]) -> Tensor:
    dtype = torch.promote_types(packed_TP.dtype, torch.float32)
    return packed_TP.new_empty(len(blocks_N3), *size, dtype=dtype)


@torch.library.custom_op("lit_sparse::add_block_grad", mutates_args=("into_Nhw",))
def _add_block_grad(
    into_Nhw: Tensor, dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks_N3: Tensor, size: Sequence[int]
) -> None:
    blocks = _checked(dys_TO, packed_TP, blocks_N3, size)
    _check_into(into_Nhw, packed_TP, (len(blocks.rows), *size))
    run = launch if on_cuda(packed_TP) else on_host
    run(dys_TO, packed_TP, blocks, size, into_Nhw)


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
    dys_TO: Sequence[Tensor],
    packed_TP: Tensor,
    blocks_N3: Tensor,
    size: Sequence[int],
    into_Nhw: Tensor | None = None,
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
        return _block_grad(dys_TO, packed_TP, blocks_N3, size)
    _add_block_grad(into_Nhw, dys_TO, packed_TP, blocks_N3, size)
    return into_Nhw
