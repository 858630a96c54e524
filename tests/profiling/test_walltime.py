"""The parts of a run's wall time: they add up, whatever the phases are called."""

import pytest

from lit_sparse_profiling import walltime
from lit_sparse_profiling.continued import continued
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Phase


def record(seconds: float | None = 100.0, **own: float) -> RunRecord:
    phases = [Phase(name.replace("_", " "), 2 * value, 1, own=value) for name, value in own.items()]
    return RunRecord(name="mine", seconds=seconds, phases=phases)


def test_parts_add_up_to_the_wall_time() -> None:
    found = walltime.parts(record(training=40.0, imports=5.0, evaluation=10.0, of_the_users=1.0))
    assert found == {"imports": 5.0, "evaluation": 10.0, "training": 40.0, "of the users": 1.0, "other": 44.0}
    assert sum(found.values()) == 100.0


def test_the_profilers_own_phases_are_one_part() -> None:
    own = {"examination": 1.0, "lead-in step": 2.0, "examined step": 4.0, "forward": 8.0, "backward": 16.0}
    found = walltime.parts(record(**own, **{"optimizer step": 32.0, "ceilings": 0.5, "loading": 3.0}))
    assert found == {"model": 3.0, "examination": 63.5, "other": 33.5}
    told = walltime.parts(record(prediction=2.0, training=50.0, examination=1.0))
    assert told == {"prediction": 2.0, "examination": 1.0, "training": 50.0, "other": 47.0}


def test_the_line_has_all_parts() -> None:
    assert walltime.describe(record(training=75.04, imports=5.0)) == (
        "Wall time 100.0 s: imports 5.0 (5%), training 75.0 (75%), other 20.0 (20%)."
    )


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_a_record_of_before_wall_time_was_kept_has_none(seconds: float | None) -> None:
    assert walltime.describe(record(seconds, training=1.0)) is None
    old = RunRecord(name="mine", phases=[Phase("training", 3.0, 1)])
    assert (walltime.parts(old), continued(old, record(training=1.0)).seconds) == ({}, None)


def test_a_run_that_goes_on_has_the_wall_time_of_both_parts() -> None:
    both = continued(record(training=40.0, imports=5.0), record(50.0, training=20.0, imports=6.0))
    assert walltime.parts(both) == {"imports": 11.0, "training": 60.0, "other": 79.0}
