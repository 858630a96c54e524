"""Differences between arms with intervals, paired over seeds and scored rows, and what a table can tell at all.

Two arms are compared on the seeds that both have, which set the order of the data, and on the same scored rows. With
enough seeds the interval is that of a bootstrap: rows are resampled as clusters of their tokens, seeds beside them, and
both arms get the same resamples. Percentiles of few seeds are too narrow, so that they are taken at the expanded level
of Hesterberg (The American Statistician 69, 2015, section 5.3). Of fewer than `BOOTSTRAPPED` seeds no resample lies
beyond the outermost seed, which leaves out more than 5 %: there, and where no rows are kept, the interval is Student's
t's, with the degrees of freedom of Welch and Satterthwaite. Both err on the wide side: the noise of one seed on
one row counts among seeds and among rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from benchmarks.measurements import Line

SCORE = "heldout_loss"
"""The score that chooses learning rates and ranks arms; lower is better."""
LEVEL = 0.95
POWER = 0.8
BOOTSTRAPPED = 6
"""Seeds from which on the outermost ones enclose 95 %: 1 - 2^(1 - 6) is 0.97."""
RESAMPLES = 4000
Array = np.ndarray


@dataclass(frozen=True)
class Scores:
    """What an arm scored on one set of rows.

    Attributes:
        seeds: Seeds, ascending.
        means: Loss of each seed in nats a token, (S,).
        sums: Sum of the losses of each row's tokens, (S, R); None where no rows are kept.
        tokens: Scored tokens of each row, (R,).
        of: Hash of the rows.
    """

    seeds: tuple[int, ...]
    means: Array
    sums: Array | None = None
    tokens: Array | None = None
    of: str = ""

    def on(self, seeds: Sequence[int]) -> Scores:
        """Return the scores of some of the seeds."""
        places = [self.seeds.index(seed) for seed in seeds]
        sums = None if self.sums is None else self.sums[places]
        return Scores(tuple(seeds), self.means[places], sums, self.tokens, self.of)

    @property
    def by_row(self) -> Array:
        """What each row adds to the arm's mean loss beyond its share, times the number of rows, (R,)."""
        assert self.sums is not None
        assert self.tokens is not None
        sums, total = self.sums.mean(0), self.tokens.sum()
        return (sums - sums.sum() / total * self.tokens) * len(self.tokens) / total


@dataclass(frozen=True)
class Interval:
    """A difference of mean losses, in nats a token, and its interval of 95 %.

    Attributes:
        seeds: Seeds that both arms have.
        rows: Rows of the pairs; 0 where only means were kept, so that other rows could give another result.
    """

    difference: float
    low: float
    high: float
    seeds: int
    rows: int = 0

    @property
    def tie(self) -> bool:
        """True if it contains 0."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


# ---- the scores of lines


def scores_of(lines: Sequence[Line], name: str = SCORE) -> Scores | None:
    """Return the scores of trainings, one a seed; None without any, or if one is not finite or has no such score.

    Args:
        lines: Lines of results, of one arm at one learning rate.
        name: A loss among their outcomes.
    """
    by_seed = {line["seed"]: line for line in lines}
    seeds = tuple(sorted(by_seed))
    means = np.array([float(by_seed[seed]["after"].get(name, math.nan)) for seed in seeds])
    if not seeds or not np.isfinite(means).all():
        return None
    kept = [by_seed[seed].get("rows", {}).get(name.removesuffix("_loss")) for seed in seeds]
    if not all(kept) or len({one["of"] for one in kept}) > 1:
        return Scores(seeds, means)
    sums, tokens = np.array([one["nll"] for one in kept], dtype=float), np.array(kept[0]["tokens"], dtype=float)
    return Scores(seeds, sums.sum(1) / tokens.sum(), sums, tokens, kept[0]["of"])


def aligned(arms: Sequence[Scores]) -> list[Scores]:
    """Return arms on the seeds that all have; without rows, if these are not the same."""
    shared = sorted(set(arms[0].seeds).intersection(*(arm.seeds for arm in arms[1:])))
    out = [arm.on(shared) for arm in arms]
    if len({arm.of for arm in out}) > 1 or out[0].sums is None:
        return [Scores(arm.seeds, arm.means) for arm in out]
    return out


def difference(ours: Sequence[Line], theirs: Sequence[Line], name: str = SCORE) -> Interval | None:
    """Return how much higher a loss is than another arm's, paired; None with fewer than two shared seeds.

    Args:
        ours: Trainings of one arm, one a seed.
        theirs: Those of the other.
        name: A loss among their outcomes.
    """
    found = [scores_of(lines, name) for lines in (ours, theirs)]
    arms = [arm for arm in found if arm is not None]
    if len(arms) < 2 or len((pair := aligned(arms))[0].seeds) < 2:
        return None
    return interval(*pair)


# ---- intervals


def interval(ours: Scores, theirs: Scores) -> Interval:
    """Return the interval of the difference of two aligned arms."""
    middle, seeds = float((ours.means - theirs.means).mean()), len(ours.seeds)
    if ours.sums is not None and theirs.sums is not None and ours.tokens is not None and seeds >= BOOTSTRAPPED:
        drawn = resampled(ours.sums - theirs.sums, ours.tokens)
        low, high = percentiles(drawn, expanded(LEVEL, seeds))
    else:
        error, freedom = standard_error([ours, theirs])
        half = t_quantile((1 + LEVEL) / 2, freedom) * error
        low, high = middle - half, middle + half
    return Interval(middle, low, high, seeds, 0 if ours.tokens is None else len(ours.tokens))


def resampled(sums: Array, tokens: Array, count: int = RESAMPLES) -> Array:
    """Return the difference a token of each resample of rows and seeds, (count,).

    Args:
        sums: Difference of the sums of each row's losses, (S, R).
        tokens: Scored tokens of each row, (R,).
        count: Resamples.
    """
    of_seeds, of_rows = draws(*sums.shape, count)
    return ((of_seeds @ sums) * of_rows).sum(1) / (len(sums) * (of_rows @ tokens))


@functools.lru_cache(maxsize=8)
def draws(seeds: int, rows: int, count: int) -> tuple[Array, Array]:
    """Return how often each resample has each seed, (count, S), and each row, (count, R); always the same."""
    random = np.random.default_rng([seeds, rows, count])
    parts = [random.multinomial(many, np.full(many, 1 / many), count).astype(float) for many in (seeds, rows)]
    return parts[0], parts[1]


def percentiles(drawn: Array, level: float) -> tuple[float, float]:
    """Return the percentile interval of a level."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def expanded(level: float, count: int) -> float:
    """Return the level at which percentiles of a mean of `count` values are as wide as Student's interval."""
    return 1 - 2 * NormalDist().cdf(-reach(level, count))


def reach(level: float, count: int) -> float:
    """Return the half width of that interval, in standard errors that a bootstrap of `count` values finds."""
    return math.sqrt(count / (count - 1)) * t_quantile((1 + level) / 2, count - 1)


def standard_error(arms: Sequence[Scores]) -> tuple[float, float]:
    """Return the standard error of the difference of two of these aligned arms, and its degrees of freedom.

    It is pooled over the arms: what is left of a loss without the arm's mean and the seed's, and without the row's.
    """
    parts = [pooled(np.stack([arm.means for arm in arms]))]
    if all(arm.sums is not None and len(arm.by_row) > 1 for arm in arms):
        parts.append(pooled(np.stack([arm.by_row for arm in arms])))
    total = sum(variance for variance, _ in parts)
    spread = sum(variance**2 / freedom for variance, freedom in parts)
    return math.sqrt(total), total**2 / spread if spread else parts[0][1]


def pooled(values: Array) -> tuple[float, float]:
    """Return the variance of a difference of two rows' means of `values` (arms, n), and its degrees of freedom."""
    arms, count = values.shape
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    freedom = (arms - 1) * (count - 1)
    return 2 * float((rest**2).sum()) / freedom / count, freedom


def smallest(arms: Sequence[Scores]) -> float | None:
    """Return the smallest difference of two of these arms that about 80 of 100 tables tell (two-sided 95 %).

    None with fewer than two arms or two shared seeds.
    """
    if len(arms) < 2 or len((shared := aligned(arms))[0].seeds) < 2:
        return None
    error, freedom = standard_error(shared)
    seeds = len(shared[0].seeds)
    by_bootstrap = shared[0].sums is not None and seeds >= BOOTSTRAPPED
    half = t_quantile((1 + LEVEL) / 2, seeds - 1 if by_bootstrap else freedom / (len(arms) - 1))
    return (half + t_quantile(POWER, freedom)) * error


@functools.lru_cache(maxsize=1024)
def t_quantile(share: float, freedom: float) -> float:
    """Return the quantile of Student's t, for a share of 0.5 to 1 (numpy has none; t = sqrt(freedom) tan(angle))."""
    freedom = min(freedom, 1e4)
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(2 * share - 1, area / area[-1], angles)))
