"""One record of a run on several ranks: sums and highest peaks of all, and what each rank measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import device_kind, peak_memory
from lit_sparse_profiling.sections import Driver, Memory, Phase
from lit_sparse_profiling.speed_sections import Rank, Throughput


def note_of_one(ranks: int) -> str:
    """Return the note of a record that has the figures of the first rank only."""
    return f"Tokens, joules and memory are those of the first of {ranks} ranks; the others did not report theirs."


def combined(records: Sequence[RunRecord]) -> RunRecord:
    """Return the first rank's record with the sums of all ranks' tokens and joules, and their highest memory peaks.

    Ranks that share a device count its energy once. The time of a step is that of the slowest rank. The examined step
    is that of the rank where it took most. What is not summed up, such as the ledger, the FLOPs of a step and its
    kernels, stays the first rank's.

    Args:
        records: Records of all ranks, in their order.
    """
    first, count = records[0], len(records)
    throughputs = [record.throughput for record in records]
    drivers = [record.driver for record in records]
    worst = max(range(count), key=lambda rank: _requested(records[rank].memory))
    of_one = note_of_one(count)
    notes = [note for record in records for note in record.notes if note != of_one]
    label = (
        f"Tokens and joules are sums over {count} ranks, memory peaks the highest of any rank, and `ranks` has each "
        f"rank's; the ledger and the kernels are the first rank's, the examined step is that of rank {worst}."
    )
    return replace(
        first,
        throughput=None if first.throughput is None else _throughput(first.throughput, throughputs),
        memory=_memory([record.memory for record in records], worst),
        phases=[_phase(phase, [record.phases for record in records]) for phase in first.phases],
        driver=None if first.driver is None else _driver(first.driver, drivers),
        ranks=[_rank(number, record) for number, record in enumerate(records)],
        notes=[*dict.fromkeys(notes), label],
    )


def _throughput(first: Throughput, all_: Sequence[Throughput | None]) -> Throughput:
    known = [one for one in all_ if one is not None]
    whole = len(known) == len(all_)
    return replace(
        first,
        tokens=_sum(one.tokens for one in known) if whole else None,
        padded_tokens=_sum(one.padded_tokens for one in known) if whole else None,
        seconds=max(one.seconds for one in known),
    )


def _requested(memory: Memory | None) -> int:
    return 0 if memory is None or memory.allocator is None else memory.allocator.requested


def _memory(all_: Sequence[Memory | None], worst: int) -> Memory | None:
    """Return the memory of the rank whose examined step took most, with the highest peaks of all."""
    own, known = all_[worst], [one for one in all_ if one is not None]
    peaks = ("peak_resident", "growth", "most_positions", "plain_positions")
    highest = {name: _highest(getattr(one, name) for one in known) for name in peaks}
    keeper = max(known, key=lambda one: one.growth or 0, default=Memory(None, "")).keeper
    return own and replace(own, keeper=keeper, **highest)


def _driver(first: Driver, all_: Sequence[Driver | None]) -> Driver:
    devices = {one.uuid: one for one in all_ if one is not None}
    known = [one for one in all_ if one is not None]
    return replace(
        first,
        used=max(one.used for one in known),
        process=max(one.process for one in known),
        foreign=max(one.foreign for one in known),
        joules=_sum(one.joules for one in devices.values()) if len(known) == len(all_) else None,
        watts=_sum(one.watts for one in devices.values()) if len(known) == len(all_) else None,
    )


def _phase(first: Phase, all_: Sequence[Sequence[Phase]]) -> Phase:
    same = [phase for phases in all_ for phase in phases if phase.name == first.name]
    peaks = ("peak_rss", "peak_requested", "peak_allocated", "peak_reserved")
    return replace(first, **{name: _highest(getattr(phase, name) for phase in same) for name in peaks})


def _rank(number: int, record: RunRecord) -> Rank:
    throughput, driver = record.throughput, record.driver
    return Rank(
        rank=number,
        tokens=None if throughput is None else throughput.tokens,
        padded_tokens=None if throughput is None else throughput.padded_tokens,
        seconds=None if throughput is None else throughput.seconds,
        joules=None if driver is None else driver.joules,
        device=None if driver is None else driver.uuid,
        peak_memory=peak_memory(record, device_kind(record)),
    )


def _sum(values: Iterable[Any]) -> Any:
    known = list(values)
    return None if None in known else sum(known)


def _highest(values: Iterable[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)
