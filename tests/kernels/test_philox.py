"""Seeded noise: known answers of Philox, the contract of places and streams, and the kernel against the definition."""

import math

import pytest
import torch

from lit_sparse_kernels import philox as op
from lit_sparse_kernels.philox import CASES, launch, philox, range_on_host, reference, row_noise, step_seed

ONES = 2**32 - 1
ANSWERS = {  # the first three are Random123's published ones (kat_vectors, philox4x32)
    "zeros": ((0, 0, 0, 0), (0, 0), 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ((ONES,) * 4, (ONES, ONES), 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        10,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
    "seven rounds": ((0, 0, 0, 0), (0, 0), 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    "seed 42": ((0, 0, 0, 0), (42, 0), 10, "9ceaf053 77f5493b 12bf50ad 5742b3d7"),
    "a call past 32 bits": ((0, 1, 0, 0), (42, 0), 10, "42e0b8b3 7dbf5de8 2fe739d4 6aaf03eb"),
    "another parameter": ((0, 0, 7, 0), (42, 0), 10, "67ee6f2c e55410cc 6c7eca35 557398d3"),
    "another stream": ((0, 0, 7, 3), (42, 0), 10, "083a76c7 d43b842c 9fa00ace c239517a"),
    "a seed of 64 bits": ((0, 0, 1, 0), (0x9ABCDEF0, 0x12345678), 10, "392fd6b2 26fc076c 74ce119e 54e7cb63"),
}
GAUSSIANS = [-0.9701897, 0.1940190, -1.2356201, 1.9239270, -0.0731815, 0.1391375, -1.1066650, 0.3266829]
ERROR = 2e-6
"""Largest difference of Gaussian noise in fp32 from float64."""


@pytest.mark.parametrize("name", ANSWERS)
def test_known_answers(name):
    counter, key, rounds, wanted = ANSWERS[name]
    words = [int(word, 16) for word in wanted.split()]
    assert list(philox(counter, key, rounds)) == words
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert [int(word) for word in philox(tensors, key, rounds)] == words  # pyright: ignore[reportArgumentType]


def test_known_noise():
    signs = "--++-+-+++++----"
    assert range_on_host(0, 16, 42, 0, 0, "rademacher").tolist() == [1.0 if sign == "+" else -1.0 for sign in signs]
    torch.testing.assert_close(range_on_host(0, 8, 42, 0, 0, "gaussian"), torch.tensor(GAUSSIANS), rtol=0, atol=ERROR)


def test_known_seeds():
    seeds = {(0, 0, 0): 0xA706DD2F4D197E6F, (42, 0, 0): 0x57E1FABA65107204, (42, 1, 0): 0x93F5D20A95DF2E56}
    seeds |= {(42, 1, 3): 0x9AF1127FBAC90FEF, (42, 19999, 0): 0xEED0B69DD7FED1A4}
    assert {given: step_seed(*given) for given in seeds} == seeds


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition(case, kind):
    got, wanted = range_on_host(*case, 0, kind), reference(*case, 0, kind)
    assert got.dtype == torch.float32
    assert got.shape == (case[1],)
    assert float((got - wanted).abs().max()) <= (ERROR if kind == "gaussian" else 0)


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_definition(case, kind, poisoned):
    first, count, seed, param = case
    got = launch(torch.tensor([first]), count, seed, param, 2, kind)[0]
    assert float((got - reference(*case, 2, kind)).abs().max()) <= (ERROR if kind == "gaussian" else 0)


@pytest.mark.interpreted
def test_the_kernel_makes_rows_in_any_order(poisoned):
    rows = torch.tensor([5, 0, 5, 1000])
    for width in (96, 128, 300):
        whole = op.on_host(rows * width, width, 42, 3, 1, "rademacher")
        assert torch.equal(launch(rows * width, width, 42, 3, 1, "rademacher"), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_makes_the_same_noise(case, kind):
    first, count, seed, param = case
    got = launch(torch.tensor([first], device="cuda"), count, seed, param, 0, kind)[0].cpu()
    assert float((got - range_on_host(*case, 0, kind)).abs().max()) <= (2 * ERROR if kind == "gaussian" else 0)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("width", [1, 7, 96, 128, 576])
def test_parts_have_the_noise_of_the_whole(width, kind):
    whole = range_on_host(0, 40 * width, 9, 4, 0, kind).view(40, width)
    rows = torch.tensor([3, 39, 0, 3])
    assert torch.equal(row_noise(rows, width, 9, 4, kind=kind), whole[rows])
    assert torch.equal(range_on_host(13 * width, 5 * width, 9, 4, 0, kind).view(5, width), whole[13:18])


def test_a_scale_is_exact():
    z = range_on_host(0, 300, 1, 2, 0, "rademacher")
    for scale in (1e-3, -0.7, 0.0):
        got = range_on_host(0, 300, 1, 2, 0, "rademacher", scale)
        assert torch.equal(got, z * torch.tensor(scale, dtype=torch.float32))


def test_moments():
    for kind, fourth in (("rademacher", 1.0), ("gaussian", 3.0)):
        z = range_on_host(0, 2**22, 42, 0, 0, kind).double()
        assert abs(float(z.mean())) < 2e-3
        assert abs(float(z.var()) - 1) < 2e-3
        assert abs(float((z**4).mean()) - fourth) < 0.02
    draws = z[:4096].sort().values  # Kolmogorov-Smirnov against the normal distribution, at 1 %
    expected = 0.5 * (1 + torch.erf(draws / math.sqrt(2)))
    steps = torch.arange(1, 4097) / 4096
    assert float((expected - steps).abs().max()) < 1.63 / math.sqrt(4096)


def test_seeds_parameters_and_streams_do_not_correlate():
    z = [range_on_host(0, 2**16, *other, "rademacher") for other in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    products = [float((z[0] * other).mean()) for other in z[1:]]
    assert max(map(abs, products)) < 5 / 2**8


def test_no_row_has_no_noise():
    assert row_noise(torch.empty(0, dtype=torch.int64), 5, 1, 2).shape == (0, 5)
