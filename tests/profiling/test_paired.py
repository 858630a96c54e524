"""Two processes that take turns: rounds, who begins, and what becomes of one whose partner ends."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest

from lit_sparse_profiling import paired
from lit_sparse_profiling.paired import Player, Turns, autocorrelation, dependence, interval, pair_of, play

SOURCES = str(Path(paired.__file__).parents[1])
STEPS = """
import sys
sys.path.insert(0, {sources!r})
from lit_sparse_profiling.paired import Turns
turns = Turns(sys.argv[-1].removeprefix("--profile.turns="))
for step in range({steps}):
    turns.wait()
    with open({log!r}, "a") as log:
        log.write({name!r} + chr(10))
    turns.done({seconds})
{after}
"""


def player(folder: Path, name: str, steps: int, seconds: float, after: str = "") -> Player:
    values = {"sources": SOURCES, "log": str(folder / "order"), "name": name, "steps": steps, "seconds": seconds}
    return Player([sys.executable, "-c", STEPS.format(**values, after=after)], folder / f"{name}.log")


def played(folder: Path, steps: tuple[int, int], after: str = "") -> tuple[list[tuple[float, float]], int | None]:
    first = player(folder, "a", steps[0], 3.0, after)
    rounds = play(first, partial(player, folder, "b", steps[1], 2.0), None, lambda: None)
    return rounds, first.end(None, lambda: None)


def test_steps_alternate_and_who_begins_too(tmp_path: Path) -> None:
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
    turns.done(2.0 if slowed else 1.0)
    time.sleep({untimed})
    if {untimed}:
        os.remove({mine!r})
"""


@pytest.mark.parametrize("restless", ["a", "b"])
def test_neither_is_timed_while_the_other_works(tmp_path: Path, restless: str) -> None:
    def start(name: str, other: str) -> Player:
        values = {"mine": str(tmp_path / name), "others": str(tmp_path / other), "sources": SOURCES}
        script = RESTLESS.format(**values, untimed=0.05 if name == restless else 0.0)
        return Player([sys.executable, "-c", script], tmp_path / f"{name}.log")

    first = start("a", "b")
    rounds = play(first, lambda: start("b", "a"), None, lambda: None)
    assert first.end(None, lambda: None) == 0
    assert rounds == [(1.0, 1.0)] * 12


@pytest.mark.parametrize("steps", [(2, 5), (5, 2)])
def test_rounds_end_with_the_one_that_has_fewer_steps(tmp_path: Path, steps: tuple[int, int]) -> None:
    rounds, _ = played(tmp_path, steps)
    assert len(rounds) == 2


def test_the_first_goes_on_alone_if_the_second_never_steps(tmp_path: Path) -> None:
    rounds, code = played(tmp_path, (3, 0))
    assert (rounds, code) == ([], 0)
    assert (tmp_path / "order").read_text().split() == ["a"] * 3


def test_the_second_is_not_even_started_if_the_first_never_steps(tmp_path: Path) -> None:
    first = player(tmp_path, "a", 0, 1.0, "sys.exit(2)")
    assert play(first, lambda: pytest.fail("it was started"), None, lambda: None) == []
    assert first.end(None, lambda: None) == 2


def test_one_that_waits_for_a_turn_that_never_comes_ends_with_an_error(tmp_path: Path) -> None:
    first = player(tmp_path, "a", 3, 1.0)
    assert first.ready(None, lambda: None)
    assert first.end(None, lambda: None) == 1
    assert "the bench that gave this run its turns has ended" in (tmp_path / "a.log").read_text()


def test_one_that_is_late_is_ended(tmp_path: Path) -> None:
    first = player(tmp_path, "a", 0, 1.0, "import time; time.sleep(600)")
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
    pair = pair_of("floor", [(3.0, 2.0), (2.0, 2.0), (5.0, 2.0)])
    assert (pair.against, pair.median, pair.highest, pair.rounds) == ("floor", 1.5, 2.5, 3)
    assert 1.0 <= pair.low <= 1.5 <= pair.high <= 2.5
    assert pair.seconds == [[3.0, 2.0], [2.0, 2.0], [5.0, 2.0]]
    with pytest.raises(ValueError, match="no rounds to compare with floor"):
        pair_of("floor", [])


def test_the_interval_holds_the_median_and_narrows() -> None:
    few, many = [1.0, 1.1, 1.2, 1.3], [1.0, 1.1, 1.2, 1.3] * 20
    low, high = interval(few)
    assert 1.0 <= low < 1.15 < high <= 1.3
    assert interval(few) == (low, high)
    narrow = interval(many)
    assert narrow[1] - narrow[0] < high - low


def test_rounds_that_depend_on_each_other_are_reported() -> None:
    assert autocorrelation([1.0, 2.0] * 10) == pytest.approx(-0.95)
    assert autocorrelation([1.0, 1.0, 1.0]) == autocorrelation([1.0, 2.0]) == autocorrelation([]) == 0.0
    assert "lag-1 autocorrelation -0.95" in (dependence(pair_of("floor", [(1.0, 2.0), (2.0, 2.0)] * 10)) or "")
    assert dependence(pair_of("floor", [(2.0, 2.0)] * 4)) is None
