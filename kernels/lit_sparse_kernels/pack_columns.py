"""Kept block columns of a layer's input, packed side by side.

    packed[:, j w : (j + 1) w] = X[:, c_j w : (c_j + 1) w]

A real copy, so that the rest of X can be freed between forward and backward: a view would keep all of it alive.

Legend: T tokens, K in, C kept block columns, w block width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CASES = [
    # tokens, in, block width, kept block columns, dtype
    (64, 96, 32, [0, 2], torch.float32),
    (63, 80, 32, [1, 2], torch.float32),  # the last block column is ragged
    (17, 48, 16, [0, 1, 2], torch.bfloat16),  # all of them
    (5, 64, 64, [], torch.float32),
]
"""Shapes that the test and the benchmark share."""


def reference(x_TK: Tensor, columns_C: Tensor, width: int) -> Tensor:
    """The definition, a column at a time. Returns (T, C w)."""
    padded = pad(x_TK, (0, -x_TK.shape[1] % width))
    parts = [padded[:, c * width : (c + 1) * width] for c in columns_C.tolist()]
    return torch.cat(parts, dim=1) if parts else x_TK.new_empty(len(x_TK), 0)


def pack_columns(x_TK: Tensor, columns_C: Tensor, width: int) -> Tensor:
    """The kept block columns of `x_TK`, side by side.

    Args:
        x_TK: (T, K), any dtype.
        columns_C: Sorted indices of block columns, integer tensor on the device of `x_TK`.
        width: Block width; a ragged last block column is filled with zeros.

    Returns:
        (T, C w). Where every column is kept and `x_TK` is contiguous without anything around it, `x_TK` itself: it is
        as small as its copy.
    """
    tokens, inputs = x_TK.shape
    whole = len(columns_C) * width == inputs
    if (
        not torch.compiler.is_compiling()
        and whole
        and x_TK.is_contiguous()
        and x_TK.untyped_storage().nbytes() == x_TK.nbytes
    ):
        return x_TK
    padded = pad(x_TK, (0, -inputs % width)) if inputs % width else x_TK
    return padded.reshape(tokens, -1, width).index_select(1, columns_C).view(tokens, -1)


def unpack_columns(packed_TP: Tensor, columns_C: Tensor, width: int, inputs: int) -> Tensor:
    """Packed block columns back in their places of a (T, K) tensor, zeros elsewhere.

    Args:
        packed_TP: (T, C w), any dtype.
        columns_C: As in `pack_columns`.
        width: Block width.
        inputs: K; of a ragged last block column only what lies within is taken.
    """
    tokens = len(packed_TP)
    whole = packed_TP.new_zeros(tokens, -(-inputs // width), width)
    whole.index_copy_(1, columns_C.long(), packed_TP.view(tokens, -1, width))
    return whole.view(tokens, -1)[:, :inputs]
