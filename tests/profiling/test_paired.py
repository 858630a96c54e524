"""Interleaved processes: rounds, their order, and a process whose partner ends."""

import math
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from lit_sparse_profiling import paired
from lit_sparse_profiling.paired import (
    PairedRun,
    Turns,
    autocorrelation,
    bootstrap_interval,
    compare_rounds,
    dependence,
    interleave,
)
from lit_sparse_profiling.speed_sections import Pair

SOURCES = str(Path(paired.__file__).parents[1])
STEPS = """
import signal
import sys
sys.path.insert(0, {sources!r})
from lit_sparse_profiling.paired import Turns
turns = Turns(sys.argv[-1].removeprefix("--profile.turns="))
for step in range({steps}):
    turns.wait()
    with open({log!r}, "a") as log:
        log.write({name!r} + chr(10))
    turns.report({seconds})
{after}
"""


def paired_run(folder: Path, name: str, steps: int, seconds: float, after: str = "") -> PairedRun:
    values = {"sources": SOURCES, "log": str(folder / "order"), "name": name, "steps": steps, "seconds": seconds}
    return PairedRun([sys.executable, "-c", STEPS.format(**values, after=after)], folder / f"{name}.log")


def played(folder: Path, steps: tuple[int, int], after: str = "") -> tuple[list[tuple[float, float]], int | None]:
    first = paired_run(folder, "a", steps[0], 3.0, after)
    rounds = interleave(first, partial(paired_run, folder, "b", steps[1], 2.0), None, lambda: None)
    return rounds, first.end(None, lambda: None)


def test_steps_alternate_and_so_does_their_order(tmp_path: Path) -> None:
    rounds, code = played(tmp_path, (4, 4))
    assert rounds == [(3.0, 2.0)] * 4
    assert code == 0
    assert (tmp_path / "order").read_text().split() == ["a", "b", "b", "a", "a", "b", "b", "a"]


RESTLESS = """
import os, sys, time
sys.path.insert(0, {sources!r})
from lit_sparse_profiling.paired import Turns
turns = Turns(sys.argv[-1].removeprefix("--profile.turns="))
for step in range(12):
    turns.wait()
    slowed = os.path.exists({others!r})  # by the untimed work of the other, as two processes share a device
    time.sleep(0.002)
    if {untimed}:
        open({mine!r}, "w").close()
    turns.report(2.0 if slowed else 1.0)
    time.sleep({untimed})
    if {untimed}:
        os.remove({mine!r})
"""


@pytest.mark.parametrize("restless", ["a", "b"])
def test_neither_is_timed_while_the_other_works(tmp_path: Path, restless: str) -> None:
    def start(name: str, other: str) -> PairedRun:
        values = {"mine": str(tmp_path / name), "others": str(tmp_path / other), "sources": SOURCES}
        script = RESTLESS.format(**values, untimed=0.05 if name == restless else 0.0)
        return PairedRun([sys.executable, "-c", script], tmp_path / f"{name}.log")

    first = start("a", "b")
    rounds = interleave(first, lambda: start("b", "a"), None, lambda: None)
    assert first.end(None, lambda: None) == 0
    assert rounds == [(1.0, 1.0)] * 12


@pytest.mark.parametrize("steps", [(2, 5), (5, 2)])
def test_rounds_end_with_the_one_that_has_fewer_steps(tmp_path: Path, steps: tuple[int, int]) -> None:
    rounds, _ = played(tmp_path, steps)
    assert len(rounds) == 2


def test_the_first_continues_alone_if_the_second_never_steps(tmp_path: Path) -> None:
    rounds, code = played(tmp_path, (3, 0))
    assert (rounds, code) == ([], 0)
    assert (tmp_path / "order").read_text().split() == ["a"] * 3


def test_the_second_is_not_started_if_the_first_never_steps(tmp_path: Path) -> None:
    first = paired_run(tmp_path, "a", 0, 1.0, "sys.exit(2)")
    assert interleave(first, lambda: pytest.fail("it was started"), None, lambda: None) == []
    assert first.end(None, lambda: None) == 2


def test_a_run_whose_turn_never_comes_fails(tmp_path: Path) -> None:
    first = paired_run(tmp_path, "a", 3, 1.0)
    assert first.ready(None, lambda: None)
    assert first.end(None, lambda: None) == 1
    assert "The bench that interleaves this run has ended" in (tmp_path / "a.log").read_text()


def test_a_run_killed_while_it_waits_has_no_more_steps(tmp_path: Path) -> None:
    first = paired_run(tmp_path, "a", 3, 1.0)
    assert first.ready(None, lambda: None)
    first.process.kill()
    first.process.wait()
    assert first.step(None, lambda: None) is None
    assert first.end(None, lambda: None) == -signal.SIGKILL


def test_a_late_run_is_killed(tmp_path: Path) -> None:
    first = paired_run(tmp_path, "a", 0, 1.0, "import time; time.sleep(600)")
    ticks: list[int] = []
    assert not first.ready(0.0, lambda: ticks.append(1))
    assert first.end(0.0, lambda: None) is None
    assert ticks
    assert first.process.poll() is not None


@pytest.mark.parametrize("text", ["", "5", "a,b", "1,2,3", "-1,2"])
def test_turns_are_two_file_descriptors(text: str) -> None:
    with pytest.raises(ValueError, match="must be two file descriptors"):
        Turns(text)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    played(tmp_path, (1, 1))
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before


def test_the_pair_is_the_ratio_of_the_first_to_the_second() -> None:
    pair = compare_rounds("floor", [(3.0, 2.0), (2.0, 2.0), (5.0, 2.0)])
    assert (pair.against, pair.median, pair.highest, pair.rounds) == ("floor", 1.5, 2.5, 3)
    assert 1.0 <= pair.low <= 1.5 <= pair.high <= 2.5
    assert pair.seconds == [[3.0, 2.0], [2.0, 2.0], [5.0, 2.0]]
    with pytest.raises(ValueError, match="no rounds to compare with floor"):
        compare_rounds("floor", [])


def test_the_interval_holds_the_median_and_narrows() -> None:
    few, many = [1.0, 1.1, 1.2, 1.3], [1.0, 1.1, 1.2, 1.3] * 20
    low, high = bootstrap_interval(few)
    assert 1.0 <= low < 1.15 < high <= 1.3
    assert bootstrap_interval(few) == (low, high)
    narrow = bootstrap_interval(many)
    assert narrow[1] - narrow[0] < high - low


NOISES = {
    "independent": (0.05, 0.0, 0.0, 0.0),
    "a machine that drifts": (0.02, 0.05, 0.9, 0.0),
    "with interruptions": (0.02, 0.05, 0.5, 0.5),
    "a slow drift and long interruptions": (0.02, 0.02, 0.99, 1.0),
}


@pytest.mark.parametrize(("noise", "drift", "kept", "burst"), NOISES.values(), ids=NOISES)
def test_a_against_a_covers_1(noise: float, drift: float, kept: float, burst: float) -> None:
    """Two equal runs of 12 rounds, whose order alternates, on a machine with autocorrelated noise."""
    generator, level, covered, repetitions = random.Random(1), 0.0, 0, 600
    for _ in range(repetitions):
        rounds = []
        for number in range(12):
            step = []
            for _ in range(2):
                level = kept * level + drift * generator.gauss(0, 1)
                interrupted = burst if generator.random() < 0.1 else 0.0
                step.append(math.exp(level + noise * generator.gauss(0, 1)) * (1 + interrupted))
            rounds.append(step if number % 2 else step[::-1])
        low, high = bootstrap_interval([one / two for one, two in rounds], draws=200)
        covered += low <= 1 <= high
    assert covered >= 0.93 * repetitions


def test_rounds_that_depend_on_each_other_are_reported() -> None:
    assert autocorrelation([1.0, 2.0] * 10) == pytest.approx(-0.95)
    assert autocorrelation([1.0, 1.0, 1.0]) == autocorrelation([1.0, 2.0]) == autocorrelation([]) == 0.0
    assert "lag-1 autocorrelation -0.95" in (dependence(compare_rounds("floor", [(1.0, 2.0), (2.0, 2.0)] * 10)) or "")
    assert dependence(compare_rounds("floor", [(2.0, 2.0)] * 4)) is None


def test_independent_rounds_are_rarely_reported() -> None:
    generator = random.Random(0)
    told = 0
    for _ in range(300):
        pair = Pair("floor", 1, 1, 1, 1, 12, [[generator.lognormvariate(0, 0.1), 1.0] for _ in range(12)])
        told += dependence(pair) is not None
    assert told <= 0.1 * 300
