"""A run in two parts: which of them says what of the memory."""

from dataclasses import replace

import pytest

from lit_sparse_profiling.continued import continued, joined_memory
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Allocator, Held, Ledger, Memory

MEMORY = Memory(
    10,
    "VmHWM",
    held=Held(Ledger(), 0, 0, 0, "forward"),
    allocator=Allocator("an allocator", 7, 0),
    growth=0.0,
    examined_step=4,
    examined_positions=512,
    most_positions=512,
    plain_positions=500,
)
UNEXAMINED = Memory(30, "VmHWM", growth=5.0, most_positions=600, plain_positions=600)


def test_a_part_without_an_examined_step_leaves_that_of_the_other() -> None:
    expected = replace(MEMORY, peak_resident=30, most_positions=600, plain_positions=600)
    assert joined_memory(MEMORY, UNEXAMINED) == replace(expected, growth=5.0)
    assert joined_memory(UNEXAMINED, MEMORY) == expected
    one = RunRecord(name="a", memory=MEMORY)
    assert continued(one, RunRecord(name="a", memory=UNEXAMINED)).memory.held == MEMORY.held
    assert continued(one, RunRecord(name="a")).memory == continued(RunRecord(name="a"), one).memory == MEMORY


@pytest.mark.parametrize(("later", "expected"), [(256, 512), (512, 512), (1024, 1024), (None, 512)])
def test_the_longer_examined_batch_stays(later: int | None, expected: int) -> None:
    found = joined_memory(MEMORY, replace(MEMORY, examined_step=9, examined_positions=later))
    assert found is not None
    assert found.examined_positions == expected
    assert found.examined_step == (9 if later in (512, 1024) else 4), "of equal ones the later"


def test_a_note_with_other_numbers_replaces_the_earlier_one():
    earlier = RunRecord(name="a", notes=["Memory was not counted: that takes about 7.0 s", "x"])
    later = RunRecord(name="a", notes=["Memory was not counted: that takes about 11.9 s", "y: 1", "x"])
    assert continued(earlier, later).notes == ["Memory was not counted: that takes about 11.9 s", "x", "y: 1"]
