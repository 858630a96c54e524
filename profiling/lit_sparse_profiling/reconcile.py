"""Reconciliation of a record's memory figures: the counts, the allocator and the driver, and the gaps between them.

No figure is adjusted: a gap has a line and a name of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import CEILINGS, Allocator, Driver, Phase

RESIDUE = "residue: counted by neither"
NOT_COUNTED = "not counted: no step was examined"
ELSEWHERE = "reserved outside of the step"
CONTEXT = "CUDA context"
DRIVER_RESIDUE = "residue of the driver"
CONTEXT_UNKNOWN = "CUDA context and residue of the driver"
ALLOCATOR_UNKNOWN = "all else: the allocator was not read"

LEAK_SHARE, LEAK_FLOOR = 0.001, 4096
"""Bytes that a step may leave behind, as a fraction of its peak and at least."""
FOREIGN_LIMIT = 64 * 2**20
"""Bytes of other processes that are not worth a finding, such as those of a display server."""
UNITS = ("KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Line:
    """Bytes under a name. A `total` equals the sum of all lines above it that are not totals."""

    name: str
    bytes: int
    note: str = ""
    total: bool = False


def reconcile(record: RunRecord) -> list[Line]:
    """Return the lines from the weights up to the driver's figure: parts, and the totals that they add up to.

    A part between two measured totals is their difference, even if 0 or negative. A figure that was not measured has no
    line. The driver's peak is the whole run's, the allocator's is the examined step's: if another phase reserved more,
    the excess is a part of its own. The last line is the memory of other processes.
    """
    lines = _counted(record)
    _add_allocator(lines, record)
    _add_other_phases(lines, record)
    _add_driver(lines, record)
    return lines


def residue(record: RunRecord) -> float | None:
    """Return the allocator's peak beyond the count, as a fraction of that peak; None if not measured."""
    memory = record.memory
    if memory is None or memory.allocator is None or memory.held is None:
        return None
    return _share(memory.allocator.requested - memory.held.total, memory.allocator.requested)


def findings(record: RunRecord, limit: float = 0.05) -> list[str]:
    """Return one sentence for each memory figure that is not as expected.

    Args:
        limit: Fraction of the total, 0 to 1, above which residues and fragmentation are reported.
    """
    found = {line.name: line.bytes for line in reconcile(record)}
    sentences: list[str] = []
    if RESIDUE in found:
        sentences += _residue(found[RESIDUE], found["allocator requested"], limit)
    if record.memory is not None and record.memory.allocator is not None:
        sentences += _allocator(record.memory.allocator, limit)
    if DRIVER_RESIDUE in found:
        sentences += _driver_residue(found[DRIVER_RESIDUE], found["process"], limit)
    if record.driver is not None:
        sentences += _driver(record.driver)
    return sentences


def format_bytes(size: int) -> str:
    """Format bytes in the largest unit of which there is at least one: 1536 is "1.50 KiB"."""
    if abs(size) < 1024:
        return f"{size} bytes"
    power = min((abs(size).bit_length() - 1) // 10, len(UNITS))
    return f"{size / 1024**power:.2f} {UNITS[power - 1]}"


# ---- lines


def _counted(record: RunRecord) -> list[Line]:
    held = None if record.memory is None else record.memory.held
    ledger = record.ledger if held is None else held.ledger
    if ledger is None:
        return []
    lines = [
        Line("frozen weights", ledger.frozen),
        Line("trainable weights", ledger.trainable),
        Line("buffers", ledger.buffers),
        Line("gradients", ledger.gradients),
        Line("optimizer state", ledger.optimizer),
        Line("strategy state", ledger.strategy),
    ]
    note = "at the end of the run"
    if held is not None:
        lines += [Line("batch", held.batch), Line("saved for backward", held.saved)]
        lines += [Line("temporaries", held.temporaries)]
        note = f"a step's peak, in its {held.phase}"
    return [*lines, Line("counted", _sum(lines), note, total=True)]


def _add_allocator(lines: list[Line], record: RunRecord) -> None:
    if record.memory is None or record.memory.allocator is None:
        return
    allocator = record.memory.allocator
    part = NOT_COUNTED if record.memory.held is None else RESIDUE
    _append_total(lines, part, "allocator requested", allocator.requested, note=allocator.method)
    if allocator.allocated is not None:
        _append_total(lines, "rounding", "allocator allocated", allocator.allocated)
    if allocator.reserved is not None:
        split = allocator.inactive_split
        of_which = "" if split is None else f"of which {format_bytes(split)} are free parts of split segments"
        _append_total(lines, "cached or fragmented", "allocator reserved", allocator.reserved, part_note=of_which)


def _add_other_phases(lines: list[Line], record: RunRecord) -> None:
    highest = _highest_reserved(record)
    # Evaluation or selection may reserve more than a step does, and the driver sees it.
    if highest is not None and (highest.peak_reserved or 0) > _sum(lines):
        _append_total(lines, ELSEWHERE, "reserved at most", highest.peak_reserved or 0, note=f"in {highest.name}")


def _add_driver(lines: list[Line], record: RunRecord) -> None:
    driver = record.driver
    if driver is None:
        return
    if driver.context is not None:
        lines.append(Line(CONTEXT, driver.context))
    part = DRIVER_RESIDUE if driver.context is not None else CONTEXT_UNKNOWN
    _append_total(
        lines,
        part if _reserved_known(record) else ALLOCATOR_UNKNOWN,
        "process",
        driver.process,
        note=f"reported by the driver, by {driver.attribution}",
    )
    lines.append(Line("foreign", driver.foreign, "peak of other processes on the device; not part of the process"))


def _append_total(lines: list[Line], part: str, total: str, size: int, note: str = "", part_note: str = "") -> None:
    """Append a total, and before it a part: the excess of the total over all parts so far."""
    lines.append(Line(part, size - _sum(lines), part_note))
    lines.append(Line(total, size, note, total=True))


def _sum(lines: list[Line]) -> int:
    return sum(line.bytes for line in lines if not line.total)


def _highest_reserved(record: RunRecord) -> Phase | None:
    known = [phase for phase in record.phases if phase.peak_reserved is not None and phase.name != CEILINGS]
    return max(known, key=lambda phase: phase.peak_reserved or 0, default=None)


def _reserved_known(record: RunRecord) -> bool:
    allocator = None if record.memory is None else record.memory.allocator
    return (allocator is not None and allocator.reserved is not None) or _highest_reserved(record) is not None


# ---- findings


def _share(part: int, whole: int) -> float:
    return part / max(whole, 1)  # a count against a request of 0 bytes must be reported, not divide by zero


def _residue(size: int, requested: int, limit: float) -> Iterator[str]:
    share = _share(size, requested)
    if share > limit:
        yield (
            f"The allocator's peak is {format_bytes(size)} ({share:.1%}) above the count: usually workspaces inside "
            "operations, or tensors that an extension holds."
        )
    elif share < -limit:
        yield (
            f"The count is {format_bytes(-size)} ({-share:.1%}) above the allocator's peak: usually tensors outside "
            "its memory, such as mapped weight files and arrays of other libraries."
        )


def _allocator(allocator: Allocator, limit: float) -> Iterator[str]:
    if allocator.left_behind > max(LEAK_SHARE * allocator.requested, LEAK_FLOOR):
        yield (
            f"Each step leaves {allocator.left_behind:,} bytes allocated that are in no category: a leak, such as a "
            "list of losses with their graphs; append loss.detach() instead."
        )
    split, reserved = allocator.inactive_split, allocator.reserved
    if split is not None and reserved is not None and split > limit * reserved:
        yield (
            f"{format_bytes(split)} ({_share(split, reserved):.1%} of the reserved memory) are free parts of split "
            "segments, which is fragmentation; PYTORCH_ALLOC_CONF=expandable_segments:True usually reduces it."
        )
    if allocator.retries:
        yield (
            f"The allocator flushed its cache {allocator.retries} times to satisfy a request, which is slow; lower the "
            "batch size or max_length."
        )


def _driver_residue(size: int, process: int, limit: float) -> Iterator[str]:
    share = _share(size, process)
    if share > limit:
        yield (
            f"The driver reports {format_bytes(size)} ({share:.1%} of the process) more than reserved memory and CUDA "
            "context together: usually buffers of libraries (cuBLAS, NCCL), and kernels loaded late."
        )
    elif share < -limit:
        yield (
            f"The driver reports {format_bytes(-size)} ({-share:.1%} of the process) less than reserved memory and "
            "CUDA context together: its samples missed the peak, or it attributed a part to other processes."
        )


def _driver(driver: Driver) -> Iterator[str]:
    if driver.foreign > FOREIGN_LIMIT:
        yield (
            f"Other processes held up to {format_bytes(driver.foreign)} on {driver.device}: this run had neither its "
            "full memory nor its full speed."
        )
    if driver.attribution == "device delta":
        yield (
            "The driver did not report this process's memory: its figure is the rise of the device's use, by any "
            "process."
        )
    if driver.lost is not None:
        yield f"The driver's figures end before the run: {driver.lost}"
