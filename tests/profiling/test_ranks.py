"""Several ranks' records as one: what is summed, what is the highest, and what each rank had."""

from dataclasses import replace
from pathlib import Path

from lit_sparse_profiling.ranks import combined, note_of_one
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Allocator, Device, Driver, Memory, Phase
from lit_sparse_profiling.speed_sections import Rank, Throughput

DRIVER = Driver("a GPU", "GPU-0", "580", False, "v2", "own pid", 9, 8, 1, 2, 5, joules=100.0, watts=50.0)
FIRST = RunRecord(
    name="smt-1",
    device=Device("cuda", "a GPU"),
    phases=[Phase("training", 5.0, 1, peak_rss=10, peak_reserved=70)],
    memory=Memory(10, "VmHWM"),
    throughput=Throughput(100, 120, seconds=4.0, steps=2, median_step=2.0),
    driver=DRIVER,
    notes=[note_of_one(2), "A note."],
)
SECOND = replace(
    FIRST,
    phases=[Phase("training", 5.5, 1, peak_rss=30, peak_reserved=60)],
    memory=Memory(30, "VmHWM"),
    throughput=Throughput(50, 80, seconds=5.0, steps=2, median_step=2.5),
    driver=replace(DRIVER, uuid="GPU-1", joules=200.0, watts=60.0, process=11),
    notes=[note_of_one(2), "A note.", "Another."],
)


def test_sums_and_highest_peaks(tmp_path: Path) -> None:
    found = combined([FIRST, SECOND])
    assert (found.throughput.tokens, found.throughput.padded_tokens, found.throughput.seconds) == (150, 200, 5.0)
    assert (found.driver.joules, found.driver.watts, found.driver.process) == (300.0, 110.0, 11)
    assert (found.memory.peak_resident, found.phases[0].peak_rss, found.phases[0].peak_reserved) == (30, 30, 70)
    assert found.ranks == [
        Rank(0, 100, 120, 4.0, 100.0, "GPU-0", 70),
        Rank(1, 50, 80, 5.0, 200.0, "GPU-1", 60),
    ]
    assert found.notes[:2] == ["A note.", "Another."]
    assert found.notes[2].startswith("Tokens and joules are sums over 2 ranks, memory peaks the highest of any rank")
    found.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == found


def test_the_worst_rank_tells_of_its_examined_step() -> None:
    memory = Memory(10, "VmHWM", allocator=Allocator("an allocator", 70, 0), examined_positions=64, most_positions=512)
    worse = replace(memory, allocator=Allocator("an allocator", 80, 0), examined_positions=256, most_positions=256)
    found = combined([replace(FIRST, memory=memory), replace(SECOND, memory=worse)])
    assert (found.memory.allocator.requested, found.memory.examined_positions) == (80, 256)
    assert found.memory.most_positions == 512
    assert found.notes[-1].endswith("the examined step is that of rank 1.")
    alone = combined([replace(FIRST, memory=None), SECOND])
    assert alone.memory is None, "rank 0 has no memory: nothing is made up for it"


def test_a_device_that_two_ranks_share_counts_once() -> None:
    assert combined([FIRST, replace(SECOND, driver=DRIVER)]).driver.joules == 100.0


def test_what_one_rank_does_not_know_has_no_sum() -> None:
    unknown = replace(SECOND, throughput=replace(SECOND.throughput, tokens=None), driver=None)
    found = combined([FIRST, unknown])
    assert (found.throughput.tokens, found.throughput.padded_tokens, found.driver.joules) == (None, 200, None)
    assert found.ranks[1].joules is None
