"""Activations with their density, and the gradients of both, against the definition in fp64 under autograd."""

import re

import pytest
import torch

from lit_sparse_kernels.glu_density import CASES, glu_density, glu_density_grad, launch, launch_grad, reference


def inputs(tokens, width, gated, act, proxy, where, sharpness, dtype):
    generator = torch.Generator().manual_seed(0)
    gate, up, dh = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(3))
    drows = torch.randn(tokens, generator=generator)
    drows[::3] = 0  # tokens that do not count
    return gate, up if gated else None, torch.tensor(sharpness), (act, proxy, where), dh, drows


def exact(gate, up, sharpness, names, dh, drows):
    """h, rows, dgate and dup in fp64, and what of the gradients is due to each of their two terms."""
    gate = gate.double().requires_grad_()
    leaves = [gate] if up is None else [gate, up := up.double().requires_grad_()]
    h, rows = reference(gate, up, sharpness.double(), *names)
    both = torch.autograd.grad([h, rows], leaves, [dh.double(), drows.double()], retain_graph=True)
    parts = zip(
        torch.autograd.grad(h, leaves, dh.double(), retain_graph=True),
        torch.autograd.grad(rows, leaves, drows.double(), allow_unused=True),
        strict=True,
    )
    return h.detach(), rows.detach(), both, [a.abs() + (0 if b is None else b.abs()) for a, b in parts]


def assert_is_right(forward, backward, gate, up, sharpness, names, dh, drows):
    """Within rounding: once to the dtype, and 2^-19 (32 fp32 roundings) of each term for what came before.

    Sums of n proxies, each at most 1, may be off by n times that. Where the activation cancels (near its zero) its
    slope's own terms are of size 1, so that the same is allowed of the incoming gradient's largest element.
    """
    h, rows, grads, sizes = exact(gate, up, sharpness, names, dh, drows)
    fp32, rounding = 2**-19, torch.finfo(gate.dtype).eps / 2
    got_h, got_rows = forward(gate, up, sharpness, *names)
    assert got_h.dtype == gate.dtype
    assert ((got_h.double() - h).abs() <= (rounding + fp32) * h.abs() + fp32 * h.abs().max() + 6e-8).all()
    assert ((got_rows.double() - rows).abs() <= fp32 * gate.shape[1]).all()
    got = backward(dh, drows, gate, up, sharpness, *names)
    for mine, theirs, size in zip(got, grads, sizes, strict=False):
        assert mine.dtype == gate.dtype
        allowed = rounding * theirs.abs() + fp32 * (size + size.max()) + 6e-8  # the last: fp16's smallest number
        assert ((mine.double() - theirs).abs() <= allowed).all()
    if up is None:
        assert got[1].numel() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition(case, poisoned):
    assert_is_right(glu_density, glu_density_grad, *inputs(*case))


@pytest.mark.interpreted
@pytest.mark.parametrize("case", [case for case in CASES if case[-1] != torch.bfloat16], ids=str)
def test_the_kernel_is_the_definition(case, poisoned):
    assert_is_right(launch, launch_grad, *inputs(*case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_makes_the_definition(case):
    gate, up, sharpness, names, dh, drows = inputs(*case)
    h, rows = glu_density(gate.cuda(), None if up is None else up.cuda(), sharpness.cuda(), *names)

    def forward(*_):
        return h.cpu(), rows.cpu()

    def backward(dh, drows, gate, up, sharpness, *names):
        moved = (None if tensor is None else tensor.cuda() for tensor in (dh, drows, gate, up, sharpness))
        return [tensor.cpu() for tensor in glu_density_grad(*moved, *names)]

    assert_is_right(forward, backward, gate, up, sharpness, names, dh, drows)


@pytest.mark.interpreted
def test_the_kernel_reads_any_strides(poisoned):
    assert_reads_any_strides(launch, launch_grad)


def test_reads_any_strides(poisoned):
    assert_reads_any_strides(glu_density, glu_density_grad)


def assert_reads_any_strides(forward, backward):
    gate, up, sharpness, names, dh, drows = inputs(*CASES[2])
    both = torch.cat([gate, up], dim=1)  # as one matrix for both makes them
    gate, up = both.chunk(2, dim=1)
    assert_is_right(forward, backward, gate, up, sharpness, names, dh.t().contiguous().t(), drows)
    one = torch.ones(1, 1).expand(dh.shape)  # as `sum` gives
    assert_is_right(forward, backward, gate.t().contiguous().t(), up, sharpness, names, one, drows)


def test_the_torch_path_goes_by_parts(monkeypatch):
    monkeypatch.setattr("lit_sparse_kernels.glu_density.CHUNK", 200)
    assert_is_right(glu_density, glu_density_grad, *inputs(*CASES[0]))


def test_double_is_exact_to_rounding():
    for case in CASES[1:4]:
        gate, up, sharpness, names, dh, drows = inputs(*case[:-1], torch.float64)
        h, rows, grads, _ = exact(gate, up, sharpness, names, dh, drows)
        torch.testing.assert_close(glu_density(gate, up, sharpness, *names), (h, rows), rtol=1e-12, atol=1e-12)
        got = glu_density_grad(dh, drows.double(), gate, up, sharpness, *names)
        torch.testing.assert_close(got, grads, rtol=1e-12, atol=1e-12)


# The oracle: as eps goes to zero, the rational proxy counts what is not zero.
def test_the_rational_proxy_becomes_the_exact_density():
    gate, up, *_ = inputs(*CASES[0])
    count = torch.relu(gate).count_nonzero(1).float()
    errors = [
        (glu_density(gate, up, torch.tensor(eps), "relu", "rational", "gate_act")[1] - count).abs().max()
        for eps in (1e-1, 1e-3, 1e-6, 1e-12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids=str)
def test_compilers_see_the_ops(case):
    gate, up, sharpness, names, dh, drows = inputs(*case)
    torch.library.opcheck(torch.ops.lit_sparse.glu_density.default, (gate, up, sharpness, *names))
    torch.library.opcheck(torch.ops.lit_sparse.glu_density_grad.default, (dh, drows, gate, up, sharpness, *names))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"gate_TI": torch.zeros(5)}, "gate_TI has shape (5,); expected (any, any)"),
        ({"up_TI": torch.zeros(5, 4)}, "up_TI has shape (5, 4); expected (5, 8)"),
        ({"up_TI": torch.zeros(5, 8).half()}, "up_TI is torch.float16 on cpu; expected torch.float32 on cpu"),
        ({"sharpness": torch.zeros(1)}, "sharpness is torch.float32 of shape (1,) on cpu; expected one float32 on cpu"),
        ({"act": "selu"}, "act is 'selu'; expected one of silu, gelu, gelu_tanh, relu"),
        ({"proxy": "sigmoid"}, "proxy is 'sigmoid'; expected one of rational, tanh"),
        ({"where": "up"}, "where is 'up'; expected one of gate_act, product"),
        ({"dh_TI": torch.zeros(4, 8)}, "dh_TI has shape (4, 8); expected (5, 8)"),
        ({"drows_T": torch.zeros(4)}, "drows_T is torch.float32 of shape (4,); expected torch.float32 of shape (5,)"),
    ],
)
def test_refuses_in_a_sentence(changed, expected):
    given = {"gate_TI": torch.zeros(5, 8), "up_TI": torch.zeros(5, 8), "sharpness": torch.tensor(1.0)}
    given |= {"act": "silu", "proxy": "tanh", "where": "product"}
    grads = {"dh_TI": torch.zeros(5, 8), "drows_T": torch.zeros(5)}
    with pytest.raises(ValueError, match=re.escape(expected)):
        glu_density_grad(**grads | given | changed)
    if not changed.keys() & grads.keys():
        with pytest.raises(ValueError, match=re.escape(expected)):
            glu_density(**given | changed)
