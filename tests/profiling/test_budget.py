"""The limit of what measuring may take of a run, on a clock that moves only on request."""

import pytest

from lit_sparse_profiling import phases
from lit_sparse_profiling.budget import Budget, Cost
from lit_sparse_profiling.phases import Phases
from tests.profiling.test_phases import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(phases, "perf_counter", clock)
    return clock


def test_a_tenth_of_the_run_until_now_and_of_its_steps_to_come(clock: Clock) -> None:
    budget = Budget(Phases(), steps=40)
    clock.now = 20.0
    assert budget.allows(Cost(0, 2.0))
    assert not budget.allows(Cost(0, 2.01)), "a step's time is not known"
    budget.step_seconds = 2.0
    assert budget.run_seconds() == 20.0 + 80.0
    assert budget.allows(Cost(4, 2.0))
    assert not budget.allows(Cost(4, 2.01))
    budget.count_step()
    assert budget.run_seconds() == 20.0 + 78.0


def test_what_was_spent_counts_and_samples_twice(clock: Clock) -> None:
    measured = Phases()
    budget = Budget(measured, steps=0)
    for name, seconds in (("training", 90.0), ("examination", 4.0), ("samples", 2.0), ("ceilings", 1.0)):
        with measured(name):
            clock.now += seconds
    clock.now += 3
    assert budget.run_seconds() == 100.0
    assert budget.allows(Cost(0, 1.0))
    assert not budget.allows(Cost(0, 1.01))


@pytest.mark.parametrize(("steps", "seconds", "expected"), [(1e9, 50.0, 50.0), (float("inf"), 50.0, 50.0), (1, 50, 2)])
def test_a_limit_of_time_limits_the_run_too(clock: Clock, steps: float, seconds: float, expected: float) -> None:
    budget = Budget(Phases(), steps, seconds)
    budget.step_seconds = 2.0
    assert budget.run_seconds() == expected


def test_a_run_without_any_limit_affords_everything(clock: Clock) -> None:
    budget = Budget(Phases(), float("inf"))
    assert budget.run_seconds() == 0.0
    budget.step_seconds = 1.0
    assert budget.allows(Cost(1000, 1000.0))
