"""What blocks add to the output of a linear layer, and to the gradient of its input.

For blocks D_i (h, w) at block row r_i and packed block column p_i,

    Y[:, r_i h : (r_i + 1) h] += P[:, p_i w : (p_i + 1) w]  D_i^T
    dP[:, p_i w : (p_i + 1) w] += dY[:, r_i h : (r_i + 1) h]  D_i

summed over the blocks of one row, or of one column. P holds the block columns of the input that are needed, packed side
by side (`pack_columns`).

Legend: T tokens, O out, P packed in (kept block columns x w), N blocks, h x w block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

CASES = [
    # tokens, out, packed columns, block size, blocks as (row, packed column), dtype
    (64, 96, 64, (32, 32), [(0, 0), (2, 0), (1, 1)], torch.float32),
    (63, 80, 32, (32, 32), [(2, 0)], torch.float32),  # ragged last row
    (17, 40, 48, (16, 24), [(r, c) for c in range(2) for r in range(3)], torch.float32),  # all blocks, h and w differ
    (64, 64, 64, (32, 32), [(1, 0), (0, 1), (1, 1)], torch.bfloat16),
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


def block_delta(packed_TP: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor, out: int) -> Tensor:
    """The blocks' part of the output, (T, O), zero in rows of W that have no block.

    Args:
        packed_TP: Packed input columns, (T, P), any floating dtype.
        delta_Nhw: The blocks, (N, h, w), of the same dtype; what lies past a ragged end is not read.
        blocks_N2: (N, 2) integer tensor on the CPU: block row, place of the block column in `packed_TP`.
        out: Width O of the output.
    """
    _, height, width = delta_Nhw.shape
    y_TO = packed_TP.new_zeros(len(packed_TP), out)
    for block, (row, place) in zip(delta_Nhw, blocks_N2.tolist(), strict=True):
        target = y_TO[:, row * height : (row + 1) * height]
        target.addmm_(packed_TP[:, place * width : (place + 1) * width], block[: target.shape[1]].t())
    return y_TO


def block_delta_input_grad(dy_TO: Tensor, delta_Nhw: Tensor, blocks_N2: Tensor, packed: int) -> Tensor:
    """The blocks' part of the gradient of the packed input, (T, P).

    Args:
        dy_TO: Gradient of the output, (T, O), any floating dtype.
        delta_Nhw: The blocks, (N, h, w), of the same dtype.
        blocks_N2: As in `block_delta`.
        packed: Width P of the packed input.
    """
    _, height, width = delta_Nhw.shape
    d_TP = dy_TO.new_zeros(len(dy_TO), packed)
    for block, (row, place) in zip(delta_Nhw, blocks_N2.tolist(), strict=True):
        dy = dy_TO[:, row * height : (row + 1) * height]
        d_TP[:, place * width : (place + 1) * width].addmm_(dy, block[: dy.shape[1]])
    return d_TP
