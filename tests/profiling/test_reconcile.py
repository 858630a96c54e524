"""Reconciliation: lines add up to the byte, and planted defects are found, and nothing else."""

import re
from dataclasses import replace
from typing import Any

import pytest

from lit_sparse_profiling.reconcile import (
    ALLOCATOR_UNKNOWN,
    CONTEXT,
    CONTEXT_UNKNOWN,
    DRIVER_RESIDUE,
    ELSEWHERE,
    NOT_COUNTED,
    RESIDUE,
    Line,
    findings,
    format_bytes,
    reconcile,
    residue,
)
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Allocator, Driver, Held, Ledger, Memory, Phase

MIB = 2**20
LEDGER = Ledger(
    trainable=6 * MIB, frozen=400 * MIB, buffers=257, gradients=6 * MIB, optimizer=12 * MIB + 8, strategy=1001
)
HELD = Held(LEDGER, batch=4096, saved=500 * MIB + 3, temporaries=70 * MIB, phase="backward")
COUNTED = 994 * MIB + 257 + 8 + 1001 + 4096 + 3
REQUESTED = COUNTED + 5 * MIB + 1
RESERVED = 1100 * MIB
ALLOCATOR = Allocator(
    "an allocator",
    requested=REQUESTED,
    left_behind=0,
    allocated=REQUESTED + 513,
    reserved=RESERVED,
    inactive_split=20 * MIB,
)
DRIVER = Driver(
    device="a GPU",
    uuid="GPU-1",
    driver="570",
    mig=False,
    memory="v2",
    attribution="own pid",
    used=RESERVED + 460 * MIB,
    process=RESERVED + 450 * MIB + 7,
    context=430 * MIB,
    foreign=0,
    samples=9,
)
GPU = RunRecord(
    name="smt-1",
    phases=[Phase("selection", 1.0, 1, peak_reserved=RESERVED - 1), Phase("training", 9.0, 1, peak_reserved=RESERVED)],
    ledger=LEDGER,
    memory=Memory(2**30, "VmHWM", HELD.saved, HELD, ALLOCATOR),
    driver=DRIVER,
)


def with_memory(**changes: Any) -> RunRecord:
    return replace(GPU, memory=replace(GPU.memory, **changes))


def with_allocator(**changes: Any) -> RunRecord:
    return with_memory(allocator=replace(ALLOCATOR, **changes))


def with_driver(**changes: Any) -> RunRecord:
    return replace(GPU, driver=replace(DRIVER, **changes))


def by_name(record: RunRecord) -> dict[str, int]:
    return {line.name: line.bytes for line in reconcile(record)}


def test_every_line_by_hand() -> None:
    assert [(line.name, line.bytes) for line in reconcile(GPU)] == [
        ("frozen weights", 400 * MIB),
        ("trainable weights", 6 * MIB),
        ("buffers", 257),
        ("gradients", 6 * MIB),
        ("optimizer state", 12 * MIB + 8),
        ("strategy state", 1001),
        ("batch", 4096),
        ("saved for backward", 500 * MIB + 3),
        ("temporaries", 70 * MIB),
        ("counted", COUNTED),
        (RESIDUE, 5 * MIB + 1),
        ("allocator requested", REQUESTED),
        ("rounding", 513),
        ("allocator allocated", REQUESTED + 513),
        ("cached or fragmented", RESERVED - REQUESTED - 513),
        ("allocator reserved", RESERVED),
        (CONTEXT, 430 * MIB),
        (DRIVER_RESIDUE, 20 * MIB + 7),
        ("process", RESERVED + 450 * MIB + 7),
        ("foreign", 0),
    ]


RECORDS = {
    "all": GPU,
    "counted more than given out": with_allocator(requested=COUNTED - 17, allocated=COUNTED - 5),
    "counted to the byte": with_allocator(requested=COUNTED, allocated=COUNTED),
    "driver saw less": with_driver(process=RESERVED - MIB),
    "no context": with_driver(context=None),
    "reserved more elsewhere": replace(GPU, phases=[Phase("evaluation", 1.0, 1, peak_reserved=RESERVED + 11)]),
    "no driver": replace(GPU, driver=None),
    "no phases": replace(GPU, phases=[]),
    "no step examined": with_memory(held=None, allocator=None),
    "no count": with_memory(held=None),
    "nothing but the driver": replace(GPU, phases=[], ledger=None, memory=None),
    "a CPU": replace(with_allocator(allocated=None, reserved=None), driver=None, phases=[]),
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_every_total_is_the_sum_of_the_parts_above_it(record: RunRecord) -> None:
    above, totals = 0, 0
    for line in reconcile(record):
        if line.total:
            assert line.bytes == above, line.name
            totals += 1
        elif line.name != "foreign":
            above += line.bytes
    assert totals


@pytest.mark.parametrize("name", ["all", "counted more than given out", "counted to the byte", "driver saw less"])
def test_parts_make_up_the_process_to_the_byte(name: str) -> None:
    found = by_name(RECORDS[name])
    parts = ("counted", RESIDUE, "rounding", "cached or fragmented", CONTEXT, DRIVER_RESIDUE)
    assert sum(found[part] for part in parts) == RECORDS[name].driver.process


def test_a_residue_of_nothing_is_printed_and_may_be_negative() -> None:
    assert by_name(RECORDS["counted to the byte"])[RESIDUE] == 0
    assert by_name(RECORDS["counted more than given out"])[RESIDUE] == -17
    assert by_name(RECORDS["driver saw less"])[DRIVER_RESIDUE] == -431 * MIB


def test_what_another_phase_reserved_is_not_the_drivers_residue() -> None:
    record = replace(GPU, phases=[Phase("evaluation", 1.0, 1, peak_reserved=RESERVED + 15 * MIB)])
    found = by_name(record)
    assert (found[ELSEWHERE], found["reserved at most"], found[DRIVER_RESIDUE]) == (
        15 * MIB,
        RESERVED + 15 * MIB,
        5 * MIB + 7,
    )
    assert Line("reserved at most", RESERVED + 15 * MIB, "in evaluation", total=True) in reconcile(record)
    assert ELSEWHERE not in by_name(GPU)


def test_what_was_not_measured_has_no_line() -> None:
    cpu = by_name(RECORDS["a CPU"])
    assert list(cpu)[-2:] == [RESIDUE, "allocator requested"]
    assert by_name(RunRecord(name="x")) == {}
    unexamined = by_name(replace(RECORDS["no step examined"], driver=None, phases=[]))
    assert list(unexamined.items())[-2:] == [("strategy state", 1001), ("counted", LEDGER.total)]


def test_unknown_parts_are_not_named_as_if_they_were_known() -> None:
    no_context = by_name(RECORDS["no context"])
    assert no_context[CONTEXT_UNKNOWN] == 450 * MIB + 7
    assert DRIVER_RESIDUE not in no_context
    assert CONTEXT not in no_context
    assert NOT_COUNTED in by_name(RECORDS["no count"])
    assert RESIDUE not in by_name(RECORDS["no count"])
    assert by_name(RECORDS["nothing but the driver"])[ALLOCATOR_UNKNOWN] == DRIVER.process - 430 * MIB
    assert DRIVER_RESIDUE not in by_name(RECORDS["nothing but the driver"])


def test_notes_say_when_and_by_what() -> None:
    notes = {line.name: line.note for line in reconcile(GPU)}
    assert notes["counted"] == "a step's peak, in its backward"
    assert notes["allocator requested"] == "an allocator"
    assert notes["cached or fragmented"] == "of which 20.00 MiB are free parts of split segments"
    assert notes["process"] == "reported by the driver, by own pid"


def test_residue_as_a_share() -> None:
    assert residue(with_allocator(requested=2 * COUNTED)) == 0.5
    assert residue(with_allocator(requested=COUNTED)) == 0
    assert residue(with_memory(held=None)) is None
    assert residue(RunRecord(name="x")) is None


def test_all_well_is_no_finding() -> None:
    assert findings(GPU) == []
    assert findings(RunRecord(name="x")) == []
    assert [findings(RECORDS[name]) for name in ("no driver", "no context", "no step examined", "a CPU")] == [[]] * 4


LEAK = int(0.001 * REQUESTED) + 1
PLANTED = {
    "workspaces": (
        replace(with_allocator(requested=2 * COUNTED, allocated=None, reserved=None), driver=None),
        r"The allocator\'s peak is 994\.01 MiB \(50\.0%\) above the count: .*workspaces.*extension",
    ),
    "counted twice": (
        with_allocator(requested=COUNTED // 2),
        r"The count is 497\.0\d MiB \(100\.0%\) above the allocator's peak",
    ),
    "leak": (with_allocator(left_behind=LEAK), rf"Each step leaves {LEAK:,} bytes allocated that are in no category"),
    "fragmentation": (
        with_allocator(inactive_split=RESERVED // 10),
        r"110\.00 MiB \(10\.0% of the reserved memory\) are free parts of split segments, .*fragmentation",
    ),
    "retries": (with_allocator(retries=3), "flushed its cache 3 times"),
    "libraries' buffers": (
        with_driver(process=2 * RESERVED + 430 * MIB),
        r"The driver reports 1\.07 GiB \(41\.8% of the process\) more than reserved memory",
    ),
    "missed peak": (
        with_driver(process=RESERVED),
        r"The driver reports 430\.00 MiB \(39\.1% of the process\) less than reserved memory",
    ),
    "foreign process": (
        with_driver(foreign=2**31),
        "Other processes held up to 2.00 GiB on a GPU: this run had neither",
    ),
    "device delta": (with_driver(attribution="device delta"), "did not report this process's memory"),
    "lost": (with_driver(lost="GPU is lost."), r"figures end before the run: GPU is lost\."),
}


@pytest.mark.parametrize(("record", "sentence"), PLANTED.values(), ids=PLANTED)
def test_what_is_planted_is_found_and_nothing_else(record: RunRecord, sentence: str) -> None:
    (found,) = findings(record)
    assert re.search(sentence, found), found


def test_several_are_all_named() -> None:
    record = replace(with_allocator(left_behind=LEAK, inactive_split=RESERVED // 2), driver=PLANTED["lost"][0].driver)
    assert [sentence.split()[0] for sentence in findings(record)] == ["Each", "550.00", "The"]


@pytest.mark.parametrize(
    "record",
    [
        with_allocator(left_behind=LEAK - 1),
        with_allocator(left_behind=-LEAK),
        with_allocator(inactive_split=RESERVED // 20),
        with_driver(foreign=64 * MIB),
        with_driver(process=RESERVED + 430 * MIB + 80 * MIB),
        with_driver(process=RESERVED + 430 * MIB - 70 * MIB),
        with_allocator(requested=COUNTED + COUNTED // 20),
    ],
)
def test_limits_are_not_crossed_by_what_is_just_below(record: RunRecord) -> None:
    assert findings(record) == []


def test_a_small_step_may_leave_a_page_behind() -> None:
    held = Held(Ledger(frozen=10_000), batch=0, saved=0, temporaries=0, phase="forward")
    small = Memory(None, "none", held=held, allocator=Allocator("a", requested=10_000, left_behind=4096))
    assert findings(RunRecord(name="x", memory=small)) == []
    leaking = replace(small, allocator=replace(small.allocator, left_behind=4097))
    assert "Each step leaves 4,097 bytes" in findings(RunRecord(name="x", memory=leaking))[0]


def test_the_limit_can_be_moved() -> None:
    assert len(findings(GPU, limit=0.001)) == 3
    assert findings(PLANTED["fragmentation"][0], limit=0.2) == []


def test_an_allocator_that_gave_nothing_out_is_a_finding() -> None:
    (found,) = findings(replace(with_allocator(requested=0, allocated=None, reserved=None), driver=None, phases=[]))
    assert "above the allocator's peak" in found


@pytest.mark.parametrize(
    ("size", "spelled"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (-3 * MIB, "-3.00 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**40, "5.00 TiB"),
        (2**53, "8192.00 TiB"),
    ],
)
def test_amounts_are_spelled_in_the_largest_unit(size: int, spelled: str) -> None:
    assert format_bytes(size) == spelled
