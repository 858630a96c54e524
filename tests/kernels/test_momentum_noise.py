"""A step of momentum over seeded noise, against the definition."""

import re

import pytest
import torch

from lit_sparse_kernels.add_noise import Term
from lit_sparse_kernels.momentum_noise import CASES, Piece, Rule, launch, momentum_noise, on_host, reference
from tests.kernels.test_master_adamw import guarded, is_guarded

TERMS = [Term(42, 0.5), Term(2**63 + 5, -0.25)]
RULE = Rule(step=0.1, decay=0.9, keep=0.99, gamma=2.0, eps=1e-3, rest=0.7, refresh=(0.3, 0.1))


def pieces(ranges, dtype, curved):
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(count, generator=generator)  # noqa: E731
    made = []
    for number, (first, count) in enumerate(ranges):
        weight, momentum = guarded(draw(count).to(dtype)), guarded(draw(count))
        curvature = guarded(draw(count).square()) if curved else None
        made.append(Piece(weight, momentum, curvature, 0.2 + number, number, first))
    return made


def assert_is_step(update, case, rule=RULE):
    ranges, dtype, terms, kind, curved = case
    rule = rule._replace(refresh=None if rule.refresh is None else rule.refresh[:terms])
    given = pieces(ranges, dtype, curved)
    wanted = [reference(piece, TERMS[:terms], rule, kind) for piece in given]
    update(given, TERMS[:terms], rule, kind)
    eps = {torch.float32: 2**-20, torch.bfloat16: 2**-7}[dtype]
    for piece, (weight, momentum, curvature) in zip(given, wanted, strict=True):
        assert all(is_guarded(tensor) for tensor in piece[:3] if tensor is not None)
        torch.testing.assert_close(piece.weight.double(), weight, rtol=eps, atol=4e-6)
        torch.testing.assert_close(piece.momentum.double(), momentum, rtol=2**-20, atol=2e-6)
        if curvature is not None:
            assert piece.curvature is not None
            torch.testing.assert_close(piece.curvature.double(), curvature, rtol=2**-20, atol=2e-6)


@pytest.mark.parametrize("rule", [RULE, RULE._replace(refresh=None)], ids=["refresh", "keep"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition(case, rule):
    assert_is_step(momentum_noise, case, rule)


@pytest.mark.interpreted
@pytest.mark.parametrize("rule", [RULE, RULE._replace(refresh=None)], ids=["refresh", "keep"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_definition(case, rule, poisoned):
    assert_is_step(launch, case, rule)


@pytest.mark.interpreted
@pytest.mark.parametrize("curved", [False, True])
def test_the_kernel_gives_torch_s_bits_with_rademacher_noise(curved, poisoned):
    for stochastic, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        ours, theirs = (pieces([(77, 3000), (0, 64)], dtype, curved) for _ in range(2))
        launch(ours, TERMS, RULE, stochastic=stochastic)
        on_host(theirs, TERMS, RULE, stochastic=stochastic)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.weight, other.weight)
            assert torch.equal(one.momentum, other.momentum)
            assert one.curvature is None or torch.equal(one.curvature, other.curvature)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_takes_the_same_step(case):
    ranges, dtype, terms, kind, curved = case
    rule = RULE._replace(refresh=RULE.refresh[:terms] if RULE.refresh else None)
    host = pieces(ranges, dtype, curved)
    device = [Piece(*(None if t is None else t.cuda() for t in piece[:3]), *piece[3:]) for piece in host]  # pyright: ignore
    for given in (host, device):
        momentum_noise(given, TERMS[:terms], rule, kind, stochastic=True)
    for one, other in zip(host, device, strict=True):
        torch.testing.assert_close(other.weight.cpu(), one.weight, rtol=2**-6, atol=1e-5)
        torch.testing.assert_close(other.momentum.cpu(), one.momentum, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"weight": torch.zeros(4, dtype=torch.int32)}, "weight 0 is torch.int32; expected torch.float32 or"),
        (
            {"momentum": torch.zeros(4).half()},
            "momentum 0 is torch.float16 of shape (4,) on cpu; expected torch.float32",
        ),
        ({"curvature": torch.zeros(5)}, "curvature 0 is torch.float32 of shape (5,) on cpu; expected torch.float32"),
        ({"momentum": torch.zeros(8)[::2]}, "piece 0 has gaps or another order in memory"),
    ],
)
def test_refuses_in_a_sentence(changed, expected):
    given = Piece(torch.zeros(4), torch.zeros(4), None, 1.0, 0)._replace(**changed)
    with pytest.raises(ValueError, match=re.escape(expected)):
        momentum_noise([given], TERMS, RULE)
    with pytest.raises(ValueError, match="there are 1 terms and 2 refreshes"):
        momentum_noise([], TERMS[:1], RULE)
