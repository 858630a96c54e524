"""Blocks added to an output, against the dense matrix that they make."""

import pytest
import torch

from lit_sparse.testing import assert_close
from lit_sparse_kernels import block_delta


def inputs(tokens, out, packed, size, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, packed), (tokens, out)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("tokens", "out", "packed", "size", "blocks", "dtype"), block_delta.CASES)
def test_products_are_those_of_the_dense_matrix(tokens, out, packed, size, blocks, dtype):
    x, dy = inputs(tokens, out, packed, size, dtype)
    places = torch.tensor(blocks, dtype=torch.int32).reshape(-1, 2)
    delta = torch.randn(len(blocks), *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense = block_delta.reference(delta.double(), places, out, packed)
    assert_close(block_delta.block_delta(x, delta, places, out), x.double() @ dense.t(), factor=4)
    assert_close(block_delta.block_delta_input_grad(dy, delta, places, packed), dy.double() @ dense, factor=4)


def test_what_lies_past_a_ragged_end_is_not_read():
    delta = torch.full((1, 4, 2), torch.nan)
    delta[:, :3] = 1
    places = torch.tensor([[0, 0]])
    assert block_delta.block_delta(torch.ones(5, 2), delta, places, 3).eq(2).all()
    assert block_delta.block_delta_input_grad(torch.ones(5, 3), delta, places, 2).eq(3).all()
