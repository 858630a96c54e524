"""Paired differences of arms: a bootstrap that agrees with scipy's, intervals that hold what they should, and power."""

import math
from typing import Any

import numpy as np
import pytest

from benchmarks import pairing
from benchmarks.pairing import Scores, difference

RANDOM = np.random.Generator


def lines(sums: np.ndarray, tokens: np.ndarray, of: str = "a", kept: bool = True) -> list[dict[str, Any]]:
    """Return trainings of an arm from the sums of its rows' losses, (S, R)."""
    out = []
    for seed, row in enumerate(sums):
        line = {"seed": seed, "after": {"heldout_loss": row.sum() / tokens.sum()}}
        rows = {"heldout": {"of": of, "tokens": tokens.tolist(), "nll": row.tolist()}}
        out.append({**line, "rows": rows} if kept else line)
    return out


def planted(random: RANDOM, gap: float, seeds: int, rows: int, arms: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return losses (arms, S, R) of arms `gap` apart, in which seeds and rows differ, and like some arms better."""
    tokens = random.integers(20, 200, rows).astype(float)
    shared = 1.0 + random.normal(0, 0.01, (seeds, 1)) + random.normal(0, 0.2, rows)
    own = random.normal(0, 0.004, (arms, seeds, 1)) + random.normal(0, 0.02, (arms, 1, rows))
    noise = random.normal(0, 0.1, (arms, seeds, rows)) / np.sqrt(tokens)
    return (shared + own + noise + gap * np.arange(arms)[:, None, None]) * tokens, tokens


def test_quantiles_of_t_are_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    for share in (0.6, 0.8, 0.975, 0.995):
        for freedom in (1, 2, 3.7, 14, 200):
            assert pairing.t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 40), (9, 1)], ids=["rows", "seeds"])
def test_of_one_factor_the_bootstrap_is_scipy_s(shape: tuple[int, int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    losses, tokens = planted(np.random.default_rng(3), 0.01, *shape)
    sums = losses[1] - losses[0]
    units = np.broadcast_to(tokens, shape).ravel()

    def a_token(of: np.ndarray, many: np.ndarray, axis: int) -> np.ndarray:
        return of.sum(axis) / many.sum(axis)

    theirs = stats.bootstrap(
        (sums.ravel(), units),
        a_token,
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    drawn = pairing.resampled(sums, tokens, 20_000)
    ours, spread = pairing.percentiles(drawn, 0.95), theirs.standard_error
    assert drawn.std(ddof=1) == pytest.approx(spread, rel=0.03)
    assert ours == pytest.approx([theirs.confidence_interval.low, theirs.confidence_interval.high], abs=0.08 * spread)


def test_without_rows_the_interval_is_the_paired_t_test_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [1.01, 1.03, 1.02, 1.07], [1.0, 1.01, 1.03, 1.04]
    means = [[{"seed": n, "after": {"heldout_loss": loss}} for n, loss in enumerate(arm)] for arm in (ours, theirs)]
    found = difference(*means)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-5)
    assert (found.seeds, found.rows) == (4, 0)
    assert found.tie
    assert str(found) == f"+0.0125 [{expected.low:+.4f}, {expected.high:+.4f}]"


@pytest.mark.parametrize("seeds", [8, 3])
def test_intervals_hold_the_true_difference(seeds: int) -> None:
    """Over other seeds and rows of the same kind, 95 of 100; the tolerance is for the 100."""
    random, held = np.random.default_rng(11), 0
    for _ in range(100):
        losses, tokens = planted(random, 0.01, seeds, 40)
        found = difference(lines(losses[1], tokens), lines(losses[0], tokens))
        assert found is not None
        assert found.rows == 40
        held += found.low <= 0.01 <= found.high
    assert held >= 93


def test_rows_that_are_left_out_make_an_interval_too_narrow() -> None:
    """What means over the same rows cannot show: that other rows would rank the arms differently."""
    random, held = np.random.default_rng(11), 0
    for _ in range(100):
        losses, tokens = planted(random, 0.01, 8, 12)
        found = difference(lines(losses[1], tokens, kept=False), lines(losses[0], tokens, kept=False))
        assert found is not None
        held += found.low <= 0.01 <= found.high
    assert held < 85


def test_the_smallest_difference_is_told_four_times_of_five() -> None:
    random, told, sizes = np.random.default_rng(5), 0, []
    for _ in range(60):
        losses, tokens = planted(random, 0.0, 8, 40, arms=4)
        found = pairing.smallest([pairing.scores_of(lines(arm, tokens)) for arm in losses])  # pyright: ignore
        assert found is not None
        sizes.append(found)
    for _ in range(100):
        losses, tokens = planted(random, float(np.mean(sizes)), 8, 40)
        gap = difference(lines(losses[1], tokens), lines(losses[0], tokens))
        told += gap is not None and not gap.tie
    assert 70 <= told <= 92


def test_only_what_is_shared_is_compared() -> None:
    losses, tokens = planted(np.random.default_rng(2), 0.01, 8, 10)
    ours, theirs = (lines(arm, tokens) for arm in losses)
    found = difference(ours[:3], theirs[1:])
    assert found is not None
    assert (found.seeds, found.rows) == (2, 10)
    assert found.difference == pytest.approx(
        np.mean([ours[n]["after"]["heldout_loss"] - theirs[n]["after"]["heldout_loss"] for n in (1, 2)])
    )
    assert difference(ours[:3], theirs[2:]) is None
    other = difference(ours, lines(losses[0], tokens, of="b"))  # of other rows, only the means can be paired
    assert other is not None
    assert other.rows == 0
    mixed = difference(ours, [*theirs[:4], *lines(losses[0], tokens, kept=False)[4:]])
    assert mixed is not None
    assert mixed.rows == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_what_diverged_is_in_no_interval(loss: float | None) -> None:
    ours = [{"seed": n, "after": {"heldout_loss": 1.0 + n}} for n in range(3)]
    theirs = [{"seed": n, "after": {} if loss is None else {"heldout_loss": loss}} for n in range(3)]
    assert difference(ours, theirs) is None
    assert pairing.smallest([Scores((0, 1), np.array([1.0, 2.0]))]) is None
