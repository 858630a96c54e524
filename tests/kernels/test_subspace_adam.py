"""Adam in a subspace, against the definition."""

import re

import pytest
import torch

from lit_sparse_kernels.adamw_arguments import Rule
from lit_sparse_kernels.subspace_adam import (
    CASES,
    launch,
    launch_back,
    reference,
    reference_back,
    subspace_back,
    subspace_moments,
)

RULE = Rule(lr=0.1, betas=(0.8, 0.9), eps=1e-3)
STEP = 3


def moments(case):
    """Return the projection and its moments, with values."""
    matrices, rows, _, rank, *_ = case
    generator = torch.Generator().manual_seed(0)
    shape = (*([matrices] if matrices else []), rows, rank)
    projected, m, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return projected, m, v.square()


def matrices(case):
    """Return a matrix with its update: W, C, B, f, G."""
    count, rows, columns, rank, dtype, transposed = case
    generator, stack = torch.Generator().manual_seed(1), [count] if count else []
    draw = lambda *shape: torch.randn(*stack, *shape, generator=generator)  # noqa: E731
    weight, grad = (draw(columns, rows).mT if transposed else draw(rows, columns) for _ in range(2))
    return weight, draw(rows, rank), draw(columns, rank), draw(rows), grad.to(dtype)


def assert_is_step(update, case):
    projected, m, v = moments(case)
    wanted = reference(projected.double(), m.double(), v.double(), STEP, RULE)
    moved = update(projected, m, v)
    for got, exact in zip((moved, m, v), wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2**-20, atol=1e-6)


def assert_is_back(update, case, residual=True):
    weight, moved, basis, factor, grad = matrices(case)
    given = (factor, grad) if residual else (None, None)
    exact = [None if tensor is None else tensor.double() for tensor in given]
    wanted = reference_back(weight.double(), moved.double(), basis.double(), 0.1, 0.9, *exact)
    update(weight, moved, basis, 0.1, 0.9, *given)
    torch.testing.assert_close(weight.double(), wanted, rtol=2**-18, atol=4e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition(case):
    assert_is_step(lambda *given: subspace_moments(*given, STEP, RULE), case)
    assert_is_back(subspace_back, case)
    assert_is_back(subspace_back, case, residual=False)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", [case for case in CASES if case[4] == torch.float32], ids=str)
def test_the_kernel_is_the_definition(case, poisoned):
    def launched(projected, m, v):
        moved = torch.empty_like(projected)
        launch(projected, m, v, moved, STEP, RULE, block=64)
        return moved

    assert_is_step(launched, case)
    assert_is_back(launch_back, case)


@pytest.mark.interpreted
def test_the_kernel_reads_bf16_gradients(poisoned):
    (case,) = (case for case in CASES if case[4] == torch.bfloat16)
    assert_is_back(launch_back, case)  # which enter no product


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_takes_the_same_step(case):
    projected, m, v = (tensor.cuda() for tensor in moments(case))
    host = moments(case)
    moved = subspace_moments(projected, m, v, STEP, RULE)
    torch.testing.assert_close(moved.cpu(), subspace_moments(*host, STEP, RULE), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m.cpu(), host[1], rtol=1e-5, atol=1e-6)
    given, there = matrices(case), [tensor.cuda() for tensor in matrices(case)]
    for weight, c, basis, factor, grad in (given, there):
        subspace_back(weight, c, basis, 0.1, 0.9, factor, grad)
    torch.testing.assert_close(there[0].cpu(), given[0], rtol=1e-5, atol=1e-5)


def test_refuses_in_a_sentence():
    weight, moved, basis, factor, grad = matrices(CASES[0])
    with pytest.raises(ValueError, match=re.escape("moved has shape (64, 8); expected (64, 7)")):
        subspace_back(weight, moved, basis[:, :7].contiguous(), 0.1)
    with pytest.raises(ValueError, match=re.escape("one of factor and grad is given; expected both")):
        subspace_back(weight, moved, basis, 0.1, factor=factor)
    with pytest.raises(ValueError, match=re.escape("basis is torch.float64 on cpu; expected torch.float32 on cpu")):
        subspace_back(weight, moved, basis.double(), 0.1)
    with pytest.raises(ValueError, match=re.escape("grad has shape (48, 64) on cpu; expected (64, 48) on cpu")):
        subspace_back(weight, moved, basis, 0.1, 1.0, factor, grad.t())
    with pytest.raises(ValueError, match="step is 0; expected 1 or more"):
        subspace_moments(*moments(CASES[0]), 0, RULE)
    projected, m, v = moments(CASES[0])
    with pytest.raises(ValueError, match=re.escape("exp_avg has strides (1, 64); expected a contiguous")):
        subspace_moments(projected, m.t().contiguous().t(), v, STEP, RULE)
