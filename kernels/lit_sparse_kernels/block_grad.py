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
def _block_grad_kernel(
    dy_0,
    dy_1,
    dy_2,
    x,
    table,
    out,
    tokens,
    end_0,
    end_1,
    end_2,
    stride_0,
    stride_1,
    stride_2,
    stride_x,
    part,
    ADD: tl.constexpr,
    SPLIT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program makes an (M, N) tile of one block's gradient over `part` of the tokens.
    tiles_n: tl.constexpr = (W + N - 1) // N
    tiles: tl.constexpr = (H + M - 1) // M * tiles_n
    position = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    split = tl.program_id(1)
    layer, row = tl.load(table + position * 4), tl.load(table + position * 4 + 1)
    place, slot = tl.load(table + position * 4 + 2), tl.load(table + position * 4 + 3)
    dy = tl.where(layer == 0, dy_0, tl.where(layer == 1, dy_1, dy_2))
    end = tl.where(layer == 0, end_0, tl.where(layer == 1, end_1, end_2))
    stride = tl.where(layer == 0, stride_0, tl.where(layer == 1, stride_1, stride_2))

    m = tile // tiles_n * M + tl.arange(0, M)
    n = tile % tiles_n * N + tl.arange(0, N)
    k = tl.arange(0, K)
    keep_m = (m < H) & (row * H + m < end)
    keep_n = n < W
    first = split * part
    last = tl.minimum(first + part, tokens)
    token = (first + k).to(tl.int64)  # tokens x columns may pass 2^31
    dy_MK = dy + token[None, :] * stride + (row * H + m)[:, None]
    x_KN = x + token[:, None] * stride_x + (place * W + n)[None, :]
    sum_MN = tl.full((M, N), 0.0, tl.float32)
    for start in range(first, last, K):
        keep_k = start + k < last
        left = tl.load(dy_MK, mask=keep_m[:, None] & keep_k[None, :], other=0.0)
        right = tl.load(x_KN, mask=keep_k[:, None] & keep_n[None, :], other=0.0)
        sum_MN = tl.dot(left, right, sum_MN, input_precision=PRECISION)
        dy_MK += K * stride
        x_KN += K * stride_x

    inside = (m < H)[:, None] & keep_n[None, :]
    if SPLIT:  # the parts are summed afterwards
        slot = split * (tl.num_programs(0) // tiles) + position
    out_MN = out + slot.to(tl.int64) * (H * W) + m[:, None] * W + n[None, :]
    if ADD:
        sum_MN += tl.load(out_MN, mask=inside, other=0.0)
    tl.store(out_MN, sum_MN, mask=inside)


def launch(
    dys_TO: Sequence[Tensor], packed_TP: Tensor, blocks: Listed, size: Sequence[int], into: Tensor | None = None
) -> Tensor:
    """The kernel's result, (N, h, w) in fp32; added to `into`, in place, if that is given."""
    count, (height, width) = len(blocks.rows), size
    out = packed_TP.new_empty(count, height, width, dtype=torch.float32) if into is None else into
    for first, table in _tables(blocks, packed_TP.device):
        _launch(dys_TO[first : first + LAYERS], packed_TP, table, size, out, into is not None)
    return out


def _launch(
    dys_TO: Sequence[Tensor], packed_TP: Tensor, table_N4: Tensor, size: Sequence[int], out_Nhw: Tensor, add: bool
) -> None:
    (height, width), tokens, device = size, len(packed_TP), packed_TP.device
    dys = [dy if dy.stride(1) == 1 else dy.contiguous() for dy in dys_TO]
    dys += dys[:1] * (LAYERS - len(dys))
    packed_TP = packed_TP if packed_TP.stride(1) == 1 else packed_TP.contiguous()
    m, n = (min(128, max(16, power_of_2(side))) for side in size)
    k = 64 if packed_TP.element_size() == 2 else 32
    tiles = len(table_N4) * -(-height // m) * -(-width // n)
    # A few blocks leave most of the device idle: then the tokens are divided too, and the parts summed in one order.
    splits = max(1, min(multiprocessors(device) // tiles, tokens // (8 * k)))
    part = -(-tokens // (splits * k)) * k
    parts = out_Nhw if splits == 1 else out_Nhw.new_empty(splits, len(table_N4), height, width)
    enqueue(
        _block_grad_kernel,
        (tiles, splits),
        device,
        *dys,
        packed_TP,
        table_N4,
        parts,
        tokens,
        *(dy.shape[1] for dy in dys),
        *(dy.stride(0) for dy in dys),
        packed_TP.stride(0),
        part,
        ADD=add and splits == 1,
        SPLIT=splits > 1,
        H=height,
        W=width,
        M=m,
        N=n,
        K=k,
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        num_warps=8 if m * n > 64 * 64 else 4,
        num_stages=3,
    )
    if splits > 1:
        put = out_Nhw.index_add_ if add else out_Nhw.index_copy_
        put(0, table_N4[:, 3].long(), parts.sum(0))


def _tables(blocks: Listed, device: torch.device) -> list[tuple[int, Tensor]]:
    """For each launch its first layer, and (layer, row, place, slot) of its blocks in an order that reuses X."""
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
    """Layers of which three quarters of all blocks are wanted: one large product is faster with what it wastes."""
    for layer, wanted in Counter(layer for layer, _, _ in blocks.rows).items():
        if 4 * wanted >= 3 * (-(-dys_TO[layer].shape[1] // size[0]) * (packed_TP.shape[1] // size[1])):
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
