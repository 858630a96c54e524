"""Gradients of selected blocks of a linear layer's weight.

For Y = X W^T with W (O, K) cut into blocks of h x w, the gradient of block (r, c) is

    dS_i = dY[:, r h : (r + 1) h]^T  X[:, c w : (c + 1) w]

and nothing else of dW = dY^T X is formed. X comes with only the block columns that are needed, packed side by side
(`pack_columns`), so a block names its column by its place in there. arXiv 2405.15525, section 3.

Legend: T tokens, O out, K in, P packed in (kept block columns x w), N blocks, h x w block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

CASES = [
    # tokens, out, packed columns, block size, blocks as (row, packed column), dtype
    (64, 96, 64, (32, 32), [(0, 0), (2, 0), (1, 1)], torch.float32),
    (63, 80, 32, (32, 32), [(2, 0)], torch.float32),  # ragged last row
    (17, 40, 48, (16, 24), [(r, c) for c in range(2) for r in range(3)], torch.float32),  # all blocks, h and w differ
    (64, 64, 64, (32, 32), [(1, 0), (0, 1)], torch.bfloat16),
    (5, 64, 64, (64, 64), [], torch.float32),
]
"""Shapes that the test and the benchmark share."""


def reference(dy_TO: Tensor, packed_TP: Tensor, blocks_N2: Tensor, size: tuple[int, int]) -> Tensor:
    """The definition, through the dense dY^T X in fp32 (fp64 for fp64 input). Returns (N, h, w)."""
    height, width = size
    dtype = torch.promote_types(dy_TO.dtype, torch.float32)
    dense_OP = dy_TO.to(dtype).t() @ packed_TP.to(dtype)
    padded = torch.nn.functional.pad(dense_OP, (0, 0, 0, -len(dense_OP) % height))
    tiles = padded.view(len(padded) // height, height, -1, width).transpose(1, 2)
    return tiles[blocks_N2[:, 0].long(), blocks_N2[:, 1].long()]


def block_grad(dy_TO: Tensor, packed_TP: Tensor, blocks_N2: Tensor, size: tuple[int, int]) -> Tensor:
    """Gradients of the blocks, accumulated in fp32 (fp64 for fp64 input).

    Args:
        dy_TO: Gradient of the output, (T, O), any floating dtype and strides.
        packed_TP: Packed input columns of the same dtype, (T, P), P a multiple of the block width.
        blocks_N2: (N, 2) integer tensor on the CPU: block row, place of the block column in `packed_TP`.
        size: Block height and width.

    Returns:
        (N, h, w); rows past the end of a ragged last block row are zero.
    """
    height, width = size
    rows, columns = -(-dy_TO.shape[1] // height), packed_TP.shape[1] // width
    # Past three quarters of all blocks, one large product beats many small ones even with what it wastes.
    if 4 * len(blocks_N2) >= 3 * rows * columns > 0:
        return reference(dy_TO, packed_TP, blocks_N2, size)
    dtype = torch.promote_types(dy_TO.dtype, torch.float32)
    out = torch.zeros(len(blocks_N2), height, width, dtype=dtype, device=dy_TO.device)
    packed_TP = packed_TP.to(dtype)
    for block, (row, place) in zip(out, blocks_N2.tolist(), strict=True):
        dy = dy_TO[:, row * height : (row + 1) * height].t().to(dtype)
        torch.mm(dy, packed_TP[:, place * width : (place + 1) * width], out=block[: len(dy)])
    return out
