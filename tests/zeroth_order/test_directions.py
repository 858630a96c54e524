"""Directions: what is known of their estimates, and that a step goes along what was measured."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lit_sparse.errors import BadInput
from lit_sparse.zeroth_order.directions import Cone, Dense, Direction, LowRank, Part, direction_of
from lit_sparse.zeroth_order.perturbed import Place
from lit_sparse_kernels.add_noise import Term
from lit_sparse_kernels.philox import step_seed

D = 200


def part_of(shape: tuple[int, ...], number: int = 0, **options) -> Part:
    return Part(torch.zeros(shape, **options), Place(number, torch.Size(shape)), 0, {})


def along(direction: Direction, part: Part, seed: int) -> torch.Tensor:
    """The direction itself: what is added to zeros."""
    rows = slice(0, len(part.tensor))
    return direction.perturb(torch.zeros(part.place.shape), part.place, rows, seed, 1.0)


@pytest.mark.parametrize(("kind", "kurtosis"), [("rademacher", 1), ("gaussian", 3)])
def test_the_estimate_is_the_gradient_in_the_mean_and_its_square_is_known(kind, kurtosis):
    """E[c z] is the gradient, and E|c z|^2 = (d + kurtosis - 1) |gradient|^2."""
    queries, direction, part = 20_000, Dense(kind), part_of((100, D))
    gradient = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.cat([along(direction, part, step_seed(0, step)) for step in range(queries // 100)]).double()
    estimates = (z @ gradient)[:, None] * z
    assert (estimates.mean(0) - gradient).norm() / gradient.norm() <= 2 * math.sqrt((D + 1) / queries)
    second = estimates.square().sum(1).mean() / gradient.square().sum()
    assert second == pytest.approx(D + kurtosis - 1, rel=0.05)


@pytest.mark.parametrize("direction", [Dense(), Dense("gaussian"), LowRank(rank=3, period=2)])
@pytest.mark.parametrize("shape", [(7, 5), (9,), (2, 3, 4)])
def test_a_step_goes_along_the_direction_that_was_measured(direction, shape):
    """Also in the step in which LOZO's V is drawn anew, where the authors' code takes another one."""
    part = part_of(shape)
    for step in range(1, 5):
        direction.begin(step, 3, [part])
        seed = step_seed(3, step)
        measured, before = along(direction, part, seed), part.tensor.clone()
        direction.move([part], [Term(seed, 2.0)], 0.1, 0.0)
        scale = direction.rank if isinstance(direction, LowRank) and len(shape) == 2 else 1
        torch.testing.assert_close(part.tensor - before, -0.2 / scale * measured)


def test_low_rank_directions_keep_their_right_factor_for_a_period():
    direction, part = LowRank(rank=2, period=3), part_of((16, 12))
    spans = []
    for step in range(1, 7):
        direction.begin(step, 0, [part])
        z = along(direction, part, step_seed(0, step))
        assert torch.linalg.matrix_rank(z) == 2
        spans.append(torch.linalg.svd(z).Vh[:2])
    overlaps = [torch.linalg.matrix_norm(a @ b.T).square() for a, b in pairwise(spans)]
    kept = [overlap > 1.99 for overlap in overlaps]  # 2 where both span the same plane
    assert kept == [True, True, False, True, True]


def test_a_row_of_a_low_rank_direction_is_that_of_the_whole():
    direction, part = LowRank(rank=2), part_of((16, 12))
    direction.begin(1, 0, [part])
    whole = along(direction, part, 5)
    for rows in (slice(3, 9), torch.tensor([7, 2, 2])):
        found = direction.perturb(torch.zeros_like(whole[rows]), part.place, rows, 5, 1.0)
        torch.testing.assert_close(found, whole[rows])


def test_a_cone_of_a_right_angle_is_mezo():
    part, other = part_of((6, 4)), part_of((6, 4))
    cone, dense = Cone(angle=math.pi / 2), Dense()
    part.state["momentum"] = torch.zeros(6, 4)
    for step in range(1, 4):
        seed = step_seed(0, step)
        cone.begin(step, 0, [part])
        torch.testing.assert_close(along(cone, part, seed), along(dense, other, seed), rtol=0, atol=1e-6)
        cone.move([part], [Term(seed, 0.5)], 0.1, 0.0)
        dense.move([other], [Term(seed, 0.5)], 0.1, 0.0)
    torch.testing.assert_close(part.tensor, other.tensor)


def test_a_cone_is_about_the_mean_of_past_steps():
    """Of directions with the norm sqrt(d), the part along the mean is cos(angle)."""
    angle, parts = 1.2, [part_of((40, 50)), part_of((2000,), 1)]
    cone = Cone(angle=angle, decay=0.9, warmup=0)
    gradient = [torch.randn(part.tensor.shape, generator=torch.Generator().manual_seed(1)) for part in parts]
    for part, value in zip(parts, gradient, strict=True):
        part.state["momentum"] = value.clone()
    cone.begin(1, 0, parts)
    z = torch.cat([along(cone, part, 9).flatten() for part in parts])
    mean = torch.cat([value.flatten() for value in gradient])
    assert z.norm() == pytest.approx(math.sqrt(4000), rel=0.05)
    assert float(z @ mean / (z.norm() * mean.norm())) == pytest.approx(math.cos(angle), abs=0.05)
    cone.move(parts, [Term(9, 3.0)], 0.1, 0.0)
    moved = torch.cat([part.tensor.flatten() for part in parts])
    torch.testing.assert_close(moved, -0.3 * z, rtol=1e-4, atol=1e-5)
    states = torch.cat([part.state["momentum"].flatten() for part in parts])
    torch.testing.assert_close(states, 0.9 * mean + 0.1 * 3.0 * z, rtol=1e-4, atol=1e-5)


def test_a_step_in_bf16_is_exact_in_the_mean():
    """An update of 1e-6 of weights of 0.02 is lost by rounding to nearest."""
    part = Part(torch.full((2**17, 8), 0.02, dtype=torch.bfloat16), Place(0, torch.Size((2**17, 8))), 0, {})
    start = part.tensor.double()
    Dense().move([part], [Term(4, 1.0)], 1e-6, 0.0)
    z = along(Dense(), part, 4).double()
    slope = ((part.tensor.double() - start) * z).sum() / z.square().sum()
    assert float(slope) == pytest.approx(-1e-6, rel=0.05)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LowRank(rank=0), "LowRank: rank is 0; it must be at least 1."),
        (lambda: LowRank(period=0), "LowRank: period is 0; it must be at least 1."),
        (
            lambda: Cone(angle=0),
            "Cone: angle is 0, decay 0.95 and warmup 200; angle must be above 0 and at most pi / 2",
        ),
        (lambda: Cone(decay=1), "decay from 0 to below 1"),
        (lambda: direction_of("sphere"), "give one of rademacher, gaussian, low_rank, cone."),
    ],
)
def test_settings_that_are_none_are_refused(make, sentence):
    with pytest.raises(BadInput) as refused:
        make()
    assert sentence in str(refused.value)


def test_a_model_of_one_number_has_a_direction():
    part = part_of(())
    assert abs(Dense().perturb(torch.zeros(()), part.place, slice(0, 1), 3, 1.0)) == 1
    assert isinstance(nn.Parameter(part.tensor), nn.Parameter)
