"""The gradients of chosen blocks, against the dense product."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_sparse_kernels.block_grad import CASES, Plan, block_grad, launch, plan_for, reference, splits_for
from lit_sparse_kernels.jit import Listed


def inputs(tokens, outs, packed, size, blocks, dtype):
    generator = torch.Generator().manual_seed(0)
    dys = [torch.randn(tokens, out, generator=generator, dtype=torch.float64).to(dtype) for out in outs]
    x = torch.randn(tokens, packed, generator=generator, dtype=torch.float64).to(dtype)
    return dys, x, torch.tensor(blocks, dtype=torch.int32).reshape(-1, 3), size


def exact(dys, x, blocks, size):
    return reference([dy.double() for dy in dys], x.double(), blocks, size)


def assert_is_the_sum(got, dys, x, blocks, size):
    """fp32 sums of exact products: off by no more than the roundings of a sum over the tokens, whatever the dtype."""
    magnitude = reference([dy.double().abs() for dy in dys], x.double().abs(), blocks, size)
    assert got.dtype == torch.float32
    assert ((got.double() - exact(dys, x, blocks, size)).abs() <= 2**-23 * len(x) ** 0.5 * magnitude + 1e-30).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_dense_gradient_of_the_blocks(case, poisoned):
    given = inputs(*case)
    assert_is_the_sum(block_grad(*given), *given)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", [case for case in CASES if case[-1] != torch.bfloat16], ids=str)
def test_the_kernel_makes_the_dense_gradient_of_the_blocks(case, poisoned):
    given = inputs(*case)
    assert_is_the_sum(launch(given[0], given[1], Listed(case[4]), given[3]), *given)


@pytest.mark.interpreted
@pytest.mark.parametrize("plan", [Plan(32, 16, 16, 4, 2), Plan(16, 32, 16, 4, 2), Plan(32, 32, 16, 4, 2)], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[5], CASES[6]], ids=str)
def test_every_split_makes_and_adds_the_dense_gradient(case, plan, poisoned, monkeypatch):
    for splits in (1, 2, 3):
        monkeypatch.setattr("lit_sparse_kernels.block_grad.splits_for", lambda *_, splits=splits: splits)
        dys, x, blocks, size = inputs(*case)
        assert_is_the_sum(launch(dys, x, Listed(case[4]), size, plan=plan), dys, x, blocks, size)
        into = torch.full((len(case[4]), *size), 2.0)
        launch(dys, x, Listed(case[4]), size, into, plan)
        torch.testing.assert_close(into.double() - 2, exact(dys, x, blocks, size), rtol=1e-5, atol=1e-4)


def test_work_is_divided_so_that_the_busiest_processor_has_least():
    assert splits_for(tiles=132, steps=128, processors=132) == 1
    assert splits_for(tiles=54, steps=128, processors=132) == 2  # 27 blocks of 256
    assert splits_for(tiles=96, steps=128, processors=132) == 1  # 48 of them
    assert splits_for(tiles=4, steps=128, processors=132) >= 10


def test_the_larger_tile_is_for_chips_that_hold_it_and_blocks_that_fill_it(monkeypatch):
    x = torch.empty(64, 256, dtype=torch.bfloat16)
    assert plan_for(x, (256, 256))[:2] == (128, 256)
    assert plan_for(x, (208, 208))[:2] == (128, 256)
    assert plan_for(x, (256, 320))[:2] == plan_for(x.float(), (256, 256))[:2] == (128, 128)
    monkeypatch.setattr("lit_sparse_kernels.block_grad.shared_bytes", lambda device: 163 * 1024)
    assert plan_for(x, (256, 256))[:2] == (128, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_makes_the_dense_gradient_of_the_blocks(case):
    dys, x, blocks, size = inputs(*case)
    got = block_grad([dy.cuda() for dy in dys], x.cuda(), blocks.cuda(), size)
    assert_is_the_sum(got.cpu(), dys, x, blocks, size)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", [CASES[4], CASES[5]], ids=str)
def test_the_kernel_adds_to_what_is_there(case, poisoned):
    given = inputs(*case)
    into = torch.full((len(case[4]), *case[3]), 2.0)
    assert launch(given[0], given[1], Listed(case[4]), case[3], into) is into
    torch.testing.assert_close(into.double() - 2, exact(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreted
def test_the_kernel_reads_any_strides(poisoned):
    assert_reads_any_strides(lambda dys, x, blocks, size: launch(dys, x, Listed(blocks.tolist()), size))


def test_reads_any_strides(poisoned):
    assert_reads_any_strides(block_grad)


def assert_reads_any_strides(compute):
    dys, x, blocks, size = inputs(*CASES[4])
    wide = torch.cat([x, x], dim=1).t().contiguous().t()  # column-major, twice as wide
    strided = [torch.stack([dy, dy], dim=2)[:, :, 0] for dy in dys]
    assert_is_the_sum(compute(strided, wide[:, : x.shape[1]], blocks, size), dys, x, blocks, size)


def test_adds_to_what_is_there():
    given = inputs(*CASES[0])
    into = torch.full((3, 32, 32), 2.0)
    assert block_grad(*given, into) is into
    torch.testing.assert_close(into.double() - 2, exact(*given), rtol=1e-5, atol=1e-5)


def test_double_is_exact_to_rounding():
    dys, x, blocks, size = inputs(63, (80,), 64, (32, 32), [(0, 2, 0), (0, 0, 1)], torch.float64)
    dense = dys[0].t() @ x
    got = block_grad(dys, x, blocks, size)
    torch.testing.assert_close(got[0, :16], dense[64:80, :32], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], dense[:32, 32:], rtol=1e-12, atol=1e-12)
    assert not got[0, 16:].any()


def test_compilers_see_the_op():
    given = inputs(*CASES[4])
    torch.library.opcheck(torch.ops.lit_sparse.block_grad.default, given)
    into = torch.zeros(len(CASES[4][4]), 32, 32)
    torch.library.opcheck(torch.ops.lit_sparse.add_block_grad.default, (into, *given))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"dys_TO": [torch.zeros(4, 8, dtype=torch.int32)]}, "dys_TO[0] is torch.int32; expected torch.float32"),
        ({"dys_TO": [torch.zeros(5, 8)]}, "dys_TO[0] has shape (5, 8); expected (4, any)"),
        ({"dys_TO": [torch.zeros(4, 8).half()]}, "dys_TO[0] is torch.float16 on cpu; expected torch.float32 on cpu"),
        ({"packed_TP": torch.zeros(4)}, "packed_TP has shape (4,); expected (any, any)"),
        ({"blocks_N3": torch.tensor([[0, 2, 0]])}, "blocks_N3 has (0, 2, 0), which lies outside"),
        ({"blocks_N3": torch.tensor([[1, 0, 0]])}, "blocks_N3 has (1, 0, 0), which lies outside"),
        ({"blocks_N3": torch.tensor([[0, 0, -1]])}, "blocks_N3 has (0, 0, -1), which lies outside"),
        ({"blocks_N3": torch.tensor([[0, 1, 1], [0, 1, 1]])}, "blocks_N3 has (0, 1, 1) twice; blocks may not overlap"),
        ({"blocks_N3": torch.tensor([[0, 1]])}, "blocks_N3 is torch.int64 of shape (1, 2); expected integers of shape"),
        ({"blocks_N3": torch.zeros(1, 3)}, "blocks_N3 is torch.float32 of shape (1, 3); expected integers"),
    ],
)
def test_refuses_in_a_sentence(changed, expected):
    given = {"dys_TO": [torch.zeros(4, 8)], "packed_TP": torch.zeros(4, 8), "blocks_N3": torch.tensor([[0, 0, 0]])}
    with pytest.raises(ValueError, match=re.escape(expected)):
        block_grad(**given | changed, size=(4, 4))


@pytest.mark.parametrize(
    "into", [torch.zeros(2, 4, 4), torch.zeros(1, 4, 4).half(), torch.zeros(1, 4, 8)[..., ::2], torch.zeros(1, 16)]
)
def test_refuses_to_add_to_what_has_another_form(into):
    with pytest.raises(ValueError, match=r"into_Nhw is .*; expected torch.float32 of shape \(1, 4, 4\), contiguous"):
        block_grad([torch.zeros(4, 8)], torch.zeros(4, 8), torch.tensor([[0, 0, 0]]), (4, 4), into)


def test_flops_by_torchs_counter() -> None:
    blocks = torch.tensor([[0, 0, 0], [0, 2, 0], [0, 1, 1]])
    dys, packed = [torch.randn(64, 96)], torch.randn(64, 64)
    with FlopCounterMode(display=False) as counter:
        found = block_grad(dys, packed, blocks, (32, 32))
        block_grad(dys, packed, blocks, (32, 32), into_Nhw=found)
    assert counter.get_total_flops() == 2 * (2 * 64 * 3 * 32 * 32)
