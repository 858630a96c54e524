"""Weights and seeded noise in one pass, against the definition."""

import re

import pytest
import torch

from lit_sparse_kernels import philox
from lit_sparse_kernels.add_noise import CASES, Piece, Term, add_noise, launch, on_host, reference
from lit_sparse_kernels.philox import range_on_host
from tests.kernels.test_master_adamw import guarded, is_guarded

TERMS = [Term(42, 1e-3), Term(2**63 + 5, -0.25), Term(7, 3.0)]


def pieces(ranges, dtype, in_place=False, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, (first, count) in enumerate(ranges):
        weight = guarded(torch.randn(count, generator=generator).to(dtype))
        out = weight if in_place else guarded(torch.zeros(count, dtype=dtype))
        made.append(Piece(out, weight, number, first))
    return made


def assert_is_noise(update, case, keep=1.0, in_place=False):
    ranges, dtype, terms, kind = case
    given = pieces(ranges, dtype, in_place)
    wanted = [reference(piece, TERMS[:terms], keep, kind) for piece in given]
    update(given, TERMS[:terms], keep, kind)
    # Three roundings to fp32 of numbers of at most 8, and one to the dtype: in the interpreter bf16 is cut off.
    eps = {torch.float32: 2**-21, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for piece, right in zip(given, wanted, strict=True):
        assert is_guarded(piece.out)
        assert is_guarded(piece.weight)
        torch.testing.assert_close(piece.out.double(), right, rtol=eps, atol=2e-6)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition(case, in_place):
    assert_is_noise(add_noise, case, 0.9, in_place)


@pytest.mark.interpreted
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_definition(case, in_place, poisoned):
    assert_is_noise(launch, case, 0.9, in_place)


@pytest.mark.interpreted
@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_the_kernel_gives_torch_s_bits_with_rademacher_noise(keep, poisoned):
    for stochastic, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        ours, theirs = (pieces([(77, 3000), (0, 64)], dtype) for _ in range(2))
        launch(ours, TERMS, keep, stochastic=stochastic)
        on_host(theirs, TERMS, keep, stochastic=stochastic)
        assert all(torch.equal(one.out, other.out) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_gives_a_cpu_s_bits_with_rademacher_noise(case):
    ranges, dtype, terms, kind = case
    host = pieces(ranges, dtype)
    device = [Piece(piece.out.cuda(), piece.weight.cuda(), *piece[2:]) for piece in host]
    for given in (host, device):
        add_noise(given, TERMS[:terms], 0.9, kind, stochastic=True)
    for one, other in zip(host, device, strict=True):
        got = other.out.cpu()
        if kind == "rademacher":
            assert torch.equal(got, one.out)
        else:
            torch.testing.assert_close(got, one.out, rtol=2**-10, atol=2e-5)


@pytest.mark.interpreted
def test_the_kernel_takes_all_pieces_in_a_launch_and_counts_as_a_change(poisoned, monkeypatch):
    from lit_sparse_kernels import add_noise as op

    launched, enqueue = [], op.enqueue
    monkeypatch.setattr(op, "enqueue", lambda *given, **named: (launched.append(1), enqueue(*given, **named)))
    given = pieces([(0, 5000), (3, 40), (9, 1)], torch.float32)
    before = [piece.out._version for piece in given]
    launch(given, TERMS[:1])
    assert len(launched) == 1
    assert all(piece.out._version > old for piece, old in zip(given, before, strict=True))


def test_one_pass_is_what_several_are():
    """Restore, update and the next perturbation: x + eps z, then - eps z - lr c z + eps y."""
    (piece,) = pieces([(5, 10_000)], torch.float64, in_place=True)
    start, eps, update = piece.weight.clone(), 1e-3, 2e-4
    add_noise([piece], [Term(1, eps)])
    add_noise([piece], [Term(1, -eps - update), Term(2, eps)])
    z, y = (range_on_host(5, 10_000, seed, 0, 0, "rademacher").double() for seed in (1, 2))
    torch.testing.assert_close(piece.weight, start - update * z + eps * y, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("chunk", "part"), [(2**20, 1024), (1024, 512), (1000, 200)])
def test_parts_are_the_whole(chunk, part, kind, monkeypatch):
    whole, parts = (pieces([(77, 5000), (3, 1), (128, 4096)], torch.bfloat16) for _ in range(2))
    add_noise(whole, TERMS, 0.9, kind, stochastic=True)
    monkeypatch.setattr(philox, "CHUNK", chunk)
    monkeypatch.setattr(philox, "PART", part)
    add_noise(parts, TERMS, 0.9, kind, stochastic=True)
    assert all(torch.equal(one.out, other.out) for one, other in zip(whole, parts, strict=True))


def test_stochastic_rounding_keeps_the_mean():
    """Where rounding to nearest loses all: 1e-6 on weights of 0.02, whose spacing in bf16 is 1.2e-4."""
    weight = torch.full((2**22,), 0.02).bfloat16()
    moved = {}
    for stochastic in (False, True):
        piece = Piece(weight.clone(), weight, 0)
        add_noise([piece], [Term(3, 1e-6)], stochastic=stochastic)
        z = range_on_host(0, len(weight), 3, 0, 0, "rademacher")
        moved[stochastic] = float(((piece.out.float() - weight.float()) * z).mean()) / 1e-6
    assert moved[False] == 0
    assert moved[True] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"weight": torch.zeros(4, dtype=torch.int32)}, "weight 0 is torch.int32; expected torch.float32 or"),
        ({"out": torch.zeros(5)}, "out 0 is torch.float32 of shape (5,) on cpu; expected torch.float32 of shape (4,)"),
        ({"out": torch.zeros(4).half()}, "out 0 is torch.float16 of shape (4,) on cpu; expected torch.float32"),
        ({"out": torch.zeros(8)[::2]}, "piece 0 has gaps or another order in memory"),
        ({"first": -1}, "piece 0 begins at element -1; expected 0 or more"),
    ],
)
def test_refuses_in_a_sentence(changed, expected):
    given = Piece(torch.zeros(4), torch.zeros(4), 0)._replace(**changed)
    with pytest.raises(ValueError, match=re.escape(expected)):
        add_noise([given], TERMS)
    with pytest.raises(ValueError, match="there are 0 terms"):
        add_noise([], [])
