"""The gradients of chosen blocks, against the dense product."""

import pytest
import torch

from lit_sparse_kernels.block_grad import CASES, block_grad, reference


def inputs(tokens, out, packed, size, blocks, dtype):
    generator = torch.Generator().manual_seed(0)
    dy = torch.randn(tokens, out, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(tokens, packed, generator=generator, dtype=torch.float64).to(dtype)
    return dy, x, torch.tensor(blocks, dtype=torch.int32).reshape(-1, 2), size


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_dense_gradient_of_the_blocks(case):
    dy, x, blocks, size = inputs(*case)
    got = block_grad(dy, x, blocks, size)
    exact = reference(dy.double(), x.double(), blocks, size)
    assert got.dtype == torch.float32
    # fp32 accumulation of exact products: the error of a sum over the tokens, whatever the dtype of the input.
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_double_is_exact_to_rounding():
    dy, x, blocks, size = inputs(63, 80, 64, (32, 32), [(2, 0), (0, 1)], torch.float64)
    dense = dy.t() @ x
    got = block_grad(dy, x, blocks, size)
    torch.testing.assert_close(got[0, :16], dense[64:80, :32], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], dense[:32, 32:], rtol=1e-12, atol=1e-12)
    assert not got[0, 16:].any()


def test_strided_input():
    dy, x, blocks, size = inputs(64, 96, 64, (32, 32), [(2, 0), (0, 1)], torch.float32)
    wide = torch.cat([x, x], dim=1).t().contiguous().t()  # column-major, twice as wide
    torch.testing.assert_close(
        block_grad(dy.flip(0).flip(0), wide[:, :64], blocks, size), block_grad(dy, x, blocks, size)
    )


def test_no_blocks_give_no_gradients():
    dy, x, blocks, size = inputs(5, 64, 64, (64, 64), [], torch.float32)
    assert block_grad(dy, x, blocks, size).shape == (0, 64, 64)
