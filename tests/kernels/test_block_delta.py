"""Blocks added to an output, against the dense matrix that they make."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_sparse_kernels.block_delta import (
    CASES,
    block_delta,
    block_delta_input_grad,
    launch,
    launch_input_grad,
    reference,
)
from lit_sparse_kernels.jit import Listed


def inputs(tokens, out, packed, size, blocks, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, out), (tokens, packed), (len(blocks), *size), (tokens, out)
    base, x, delta, dy = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return base, x, delta, torch.tensor(blocks, dtype=torch.int32).reshape(-1, 2), dy


def assert_is_the_sum(got, base, left, right, roundings):
    """`got` is base + left @ right, summed in fp32 and rounded to its dtype so many times.

    Each of the n additions may be off by 2^-24 of the sum of magnitudes, and each rounding by half the dtype's epsilon.
    """
    exact = base.double() + left.double() @ right.double()
    magnitude = base.double().abs() + left.double().abs() @ right.double().abs()
    allowed = (left.shape[1] + 1) * 2**-24 + roundings * torch.finfo(got.dtype).eps / 2
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= allowed * magnitude).all()


def assert_both_are_right(forward, input_grad, base, x, delta, blocks, dy, roundings):
    got, gradient = forward(base, x, delta, blocks), input_grad(dy, delta, blocks, x.shape[1])
    assert got.dtype == gradient.dtype == x.dtype
    dense = reference(delta, blocks, base.shape[1], x.shape[1])
    assert_is_the_sum(got, base, x, dense.t(), roundings)
    assert_is_the_sum(gradient, torch.zeros_like(x), dy, dense, roundings)
    bare = ~dense.any(dim=1)
    assert torch.equal(got[:, bare], base[:, bare])


def host_roundings(blocks):
    """On a CPU each block's product may be rounded, and its sum with what is there."""
    return 2 * max(1, len(blocks))


def kernel(base, x, delta, blocks):
    return launch(base, x, delta, Listed([tuple(row) for row in blocks.tolist()]))


def kernel_input_grad(dy, delta, blocks, packed):
    return launch_input_grad(dy, delta, Listed([tuple(row) for row in blocks.tolist()]), packed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_of_the_dense_matrix(case, poisoned):
    assert_both_are_right(block_delta, block_delta_input_grad, *inputs(*case), host_roundings(case[4]))


@pytest.mark.interpreted
@pytest.mark.parametrize("case", [case for case in CASES if case[-1] != torch.bfloat16], ids=str)
def test_the_kernel_makes_the_products_of_the_dense_matrix(case, poisoned):
    assert_both_are_right(kernel, kernel_input_grad, *inputs(*case), roundings=1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_makes_the_products_of_the_dense_matrix(case):
    given = [tensor.cuda() for tensor in inputs(*case)]
    assert_both_are_right(block_delta, block_delta_input_grad, *given, roundings=1)


@pytest.mark.interpreted
def test_the_kernel_reads_any_strides(poisoned):
    assert_reads_any_strides(kernel, kernel_input_grad, roundings=1)


def test_reads_any_strides(poisoned):
    assert_reads_any_strides(block_delta, block_delta_input_grad, host_roundings(CASES[2][4]))


def assert_reads_any_strides(forward, input_grad, roundings):
    base, x, delta, blocks, dy = inputs(*CASES[2])
    wide = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    turned = delta.transpose(1, 2).contiguous().transpose(1, 2)
    given = base.t().contiguous().t(), wide, turned, blocks, torch.stack([dy, dy], dim=2)[:, :, 0]
    assert_both_are_right(forward, input_grad, *given, roundings)
    base, dy = base[:1].expand(len(x), -1), torch.ones(1, 1).expand(dy.shape)  # as `sum` gives
    assert_both_are_right(forward, input_grad, base, x.t().contiguous().t(), delta, blocks, dy, roundings)


@pytest.mark.interpreted
def test_the_kernel_does_not_read_what_lies_past_a_ragged_end():
    assert_does_not_read_past_the_end(kernel, kernel_input_grad)


def test_what_lies_past_a_ragged_end_is_not_read():
    assert_does_not_read_past_the_end(block_delta, block_delta_input_grad)


def assert_does_not_read_past_the_end(forward, input_grad):
    delta = torch.full((1, 4, 2), torch.nan)
    delta[:, :3] = 1
    places = torch.tensor([[0, 0]])
    assert forward(torch.ones(5, 3), torch.ones(5, 2), delta, places).eq(3).all()
    assert input_grad(torch.ones(5, 3), delta, places, 2).eq(3).all()


def test_the_base_is_not_changed():
    base, x, delta, blocks, _ = inputs(*CASES[0])
    before = base.clone()
    block_delta(base, x, delta, blocks)
    assert torch.equal(base, before)


def test_double_is_exact_to_rounding():
    base, x, delta, blocks, dy = inputs(*CASES[2][:-1], torch.float64)
    dense = reference(delta, blocks, base.shape[1], x.shape[1])
    torch.testing.assert_close(block_delta(base, x, delta, blocks), base + x @ dense.t(), rtol=1e-12, atol=1e-12)
    got = block_delta_input_grad(dy, delta, blocks, x.shape[1])
    torch.testing.assert_close(got, dy @ dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[-1]], ids=str)
def test_compilers_see_the_ops(case):
    base, x, delta, blocks, dy = inputs(*case)
    torch.library.opcheck(torch.ops.lit_sparse.block_delta.default, (base, x, delta, blocks))
    given = dy, delta, blocks, x.shape[1]
    torch.library.opcheck(torch.ops.lit_sparse.block_delta_input_grad.default, given)


DELTA_AND_BLOCKS = [
    ({"delta_Nhw": torch.zeros(1, 4, 4).half()}, "delta_Nhw is torch.float16 on cpu; expected torch.float32 on cpu"),
    ({"delta_Nhw": torch.zeros(1, 4, 4, device="meta")}, "delta_Nhw is torch.float32 on meta; expected torch.float32"),
    ({"delta_Nhw": torch.zeros(2, 4, 4)}, "delta_Nhw has shape (2, 4, 4); expected (1, any, any)"),
    ({"delta_Nhw": torch.zeros(1, 4)}, "delta_Nhw has shape (1, 4); expected (1, any, any)"),
    ({"blocks_N2": torch.tensor([[3, 0]])}, "blocks_N2 has (3, 0), which lies outside"),
    ({"blocks_N2": torch.tensor([[0, 2]])}, "blocks_N2 has (0, 2), which lies outside"),
    ({"blocks_N2": torch.tensor([[-1, 0]])}, "blocks_N2 has (-1, 0), which lies outside"),
    ({"blocks_N2": torch.tensor([[0, 1, 1]])}, "blocks_N2 is torch.int64 of shape (1, 3); expected integers of shape"),
    ({"blocks_N2": torch.zeros(1, 2)}, "blocks_N2 is torch.float32 of shape (1, 2); expected integers"),
    (
        {"blocks_N2": torch.tensor([[0, 1], [0, 1]]), "delta_Nhw": torch.zeros(2, 4, 4)},
        "blocks_N2 has (0, 1) twice; blocks may not overlap",
    ),
]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        *DELTA_AND_BLOCKS,
        ({"packed_TP": torch.zeros(5)}, "packed_TP has shape (5,); expected (any, any)"),
        ({"packed_TP": torch.zeros(5, 8, dtype=torch.int32)}, "packed_TP is torch.int32; expected torch.float32"),
        ({"packed_TP": torch.zeros(5, 10)}, "packed_TP has 10 columns; expected a multiple of the blocks' width 4"),
        ({"base_TO": torch.zeros(6, 10)}, "base_TO has shape (6, 10); expected (5, any)"),
        ({"base_TO": torch.zeros(5, 10).half()}, "base_TO is torch.float16 on cpu; expected torch.float32 on cpu"),
    ],
)
def test_refuses_in_a_sentence(changed, expected):
    given = {"base_TO": torch.zeros(5, 10), "packed_TP": torch.zeros(5, 8), "delta_Nhw": torch.zeros(1, 4, 4)}
    with pytest.raises(ValueError, match=re.escape(expected)):
        block_delta(**given | {"blocks_N2": torch.tensor([[0, 0]])} | changed)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        *DELTA_AND_BLOCKS,
        ({"dy_TO": torch.zeros(10)}, "dy_TO has shape (10,); expected (any, any)"),
        ({"packed": 10}, "packed is 10; expected a multiple of the blocks' width 4"),
    ],
)
def test_the_input_gradient_refuses_in_a_sentence(changed, expected):
    given = {"dy_TO": torch.zeros(5, 10), "delta_Nhw": torch.zeros(1, 4, 4), "blocks_N2": torch.tensor([[0, 0]])}
    with pytest.raises(ValueError, match=re.escape(expected)):
        block_delta_input_grad(**given | {"packed": 8} | changed)


def test_flops_by_torchs_counter() -> None:
    blocks, delta = torch.tensor([[0, 0], [2, 0], [1, 1]]), torch.randn(3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        block_delta(torch.randn(64, 96), torch.randn(64, 64), delta, blocks)
        block_delta_input_grad(torch.randn(64, 96), delta, blocks, 64)
    assert counter.get_total_flops() == 2 * (2 * 64 * 3 * 32 * 32)
