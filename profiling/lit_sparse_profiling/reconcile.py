"""Reconciliation of a record's memory figures: the counts, the allocator and the driver, and the gaps between them.

No figure is adjusted: a gap has a line and a name of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lit_sparse_profiling.memory import PER_PHASE
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import CEILINGS, Allocator, Driver, Memory, Phase, is_longer

BEFORE = "there before"
RESIDUE = "residue: counted by neither"
NOT_COUNTED = "not counted: no step was examined"
ELSEWHERE = "reserved outside of the step"
OUTSIDE = "outside of tensors"
KEPT = "resident before the steps"
PROCESS_RESIDUE = "residue of the process"
CONTEXT = "CUDA context"
DRIVER_RESIDUE = "residue of the driver"
CONTEXT_UNKNOWN = "CUDA context and residue of the driver"
ALLOCATOR_UNKNOWN = "all else: the allocator was not read"

LEAK_SHARE, LEAK_FLOOR = 0.001, 4096
"""Bytes that a step may leave behind, as a fraction of its peak and at least."""
BEFORE_SHARE, BEFORE_FLOOR = 0.02, 2**20
"""Bytes of tensors from before the step that are worth a finding, as a fraction of the peak and at least."""
PROCESS_FLOOR = 48 * 2**20
"""Bytes of the process's residue that are never a finding: pages that the C library keeps for later."""
OBSERVED, OBSERVED_FLOOR = 0.005, 2**18
"""Bytes by which counting may shift the peak in silence, as a fraction of it and at least."""
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
    _add_process(lines, record)
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
    if record.memory is not None:
        sentences += _before(record.memory)
        if record.memory.allocator is not None:
            sentences += _left_behind(record.memory, record.memory.allocator)
            sentences += _allocator(record.memory.allocator, limit)
            sentences += observer(record.memory.allocator)
        sentences += _other_steps(record, record.memory, limit)
    if PROCESS_RESIDUE in found:
        sentences += _process_residue(found[PROCESS_RESIDUE], found["resident at most"], limit)
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
        if held.before:
            lines += [Line(BEFORE, held.before, "tensors alive before the step, in no category")]
        note = f"a step's peak, in its {held.phase}{_which(record.memory)}"
    return [*lines, Line("counted", _sum(lines), note, total=True)]


def _which(memory: Memory | None) -> str:
    """Return which step was examined, and how long it was beside the longest one."""
    if memory is None or memory.examined_step is None:
        return ""
    examined, most = memory.examined_positions, memory.most_positions
    length = "" if examined is None else f", of {examined:,} token positions"
    longest = f" (the longest had {max(examined, most):,})" if examined is not None and most is not None else ""
    return f": step {memory.examined_step}{length}{longest}"


def _add_allocator(lines: list[Line], record: RunRecord) -> None:
    if record.memory is None or record.memory.allocator is None:
        return
    allocator = record.memory.allocator
    part = NOT_COUNTED if record.memory.held is None else RESIDUE
    note = allocator.method + _shift(allocator)
    _append_total(lines, part, "allocator requested", allocator.requested, note=note)
    if allocator.allocated is not None:
        _append_total(lines, "rounding", "allocator allocated", allocator.allocated)
    if allocator.reserved is not None:
        split = allocator.inactive_split
        of_which = "" if split is None else f"of which {format_bytes(split)} are free parts of split segments"
        _append_total(lines, "cached or fragmented", "allocator reserved", allocator.reserved, part_note=of_which)


def _shift(allocator: Allocator) -> str:
    """Return by how much counting shifts the peak, if that was measured."""
    if allocator.uncounted is None:
        return ""
    return f"; {format_bytes(allocator.uncounted)} in the step before, which nothing counted"


def _add_process(lines: list[Line], record: RunRecord) -> None:
    """Add what the process held on a CPU, where it is the third witness: not even numpy's memory escapes it.

    It witnesses plain steps only: an examined step that needed more than any of these has none.
    """
    memory, peak = record.memory, _training_peak(record)
    if memory is None or memory.outside is None or memory.allocator is None or peak is None:
        return
    lines.append(Line(OUTSIDE, memory.outside, "interpreter, libraries, arrays of numpy, before the step"))
    if is_longer(memory.examined_positions, memory.plain_positions):
        note = "in the examined step; no step without instruments had as long a batch, so that none is a witness"
        lines.append(Line("resident at most", _sum(lines), note, total=True))
        return
    peak = memory.plain_peak or peak
    if (memory.plain_before or 0) > _sum(lines):
        kept = (memory.plain_before or 0) - _sum(lines)
        lines.append(Line(KEPT, kept, "as these steps began: the C allocator keeps what was freed before"))
    _append_total(lines, PROCESS_RESIDUE, "resident at most", peak, note="in any step that was not instrumented")


def _training_peak(record: RunRecord) -> int | None:
    """Return the resident peak of the plain steps; None if the system gives only the process's peak so far."""
    if record.memory is None or record.memory.method != PER_PHASE:
        return None
    return next((phase.peak_rss for phase in record.phases if phase.name == "training"), None)


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


def _before(memory: Memory) -> Iterator[str]:
    before = 0 if memory.held is None else memory.held.before
    peak = before if memory.allocator is None else memory.allocator.requested
    if before > max(BEFORE_SHARE * peak, BEFORE_FLOOR):
        held = [f"{format_bytes(size)} {by}" for by, size in memory.held_by.items() if size > BEFORE_FLOOR]
        by = f": {', '.join(held)}" if held else ""
        yield f"{format_bytes(before)} of tensors were there before the step and are in no category{by}."


def observer(allocator: Allocator) -> Iterator[str]:
    """Yield a sentence if counting shifted the peak by more than `OBSERVED`."""
    if allocator.uncounted is None:
        return
    shift = allocator.requested - allocator.uncounted
    if abs(shift) > max(OBSERVED * allocator.requested, OBSERVED_FLOOR):
        yield (
            f"Counting shifts the peak by {format_bytes(shift)} ({_share(shift, allocator.requested):+.1%}): in the "
            f"step before, of as many tokens and not counted, it was {format_bytes(allocator.uncounted)}."
        )


def _other_steps(record: RunRecord, memory: Memory, limit: float) -> Iterator[str]:
    """Yield findings on the steps that were not examined: longer batches, higher peaks, growth."""
    examined, most = memory.examined_positions, memory.most_positions
    if is_longer(most, examined):
        yield (
            f"The examined step had {examined:,} token positions, the longest {most:,}: its parts are not those of the "
            "highest peak. A longer batch is examined if it comes after that step, and if the limit of what measuring "
            "takes allows it, which --profile.examine=true lifts."
        )
    plain = next((phase.peak_requested for phase in record.phases if phase.name == "training"), None)
    if memory.allocator is not None and plain is not None and plain > (1 + limit) * memory.allocator.requested:
        yield (
            f"Other steps peaked at {format_bytes(plain)}, the examined one at "
            f"{format_bytes(memory.allocator.requested)}: a longer batch, or memory that only some steps take."
        )
    whole = _training_peak(record) or plain or 0
    # Infinity is what a damaged record has, and no number of bytes.
    if memory.growth is not None and math.inf > memory.growth > max(LEAK_SHARE * whole / 100, LEAK_FLOOR):
        cause = "state that keeps growing, or a leak: no list, dict or set of Python holds as much."
        if memory.keeper:
            cause = f"a leak, or state that keeps growing: {memory.keeper}."
        each = format_bytes(round(memory.growth))
        yield f"Memory in use grows by {each} with each step, all along the timed ones: {cause}"


def _process_residue(size: int, peak: int, limit: float) -> Iterator[str]:
    if size > max(limit * peak, PROCESS_FLOOR):
        yield (
            f"The process held {format_bytes(size)} ({_share(size, peak):.1%}) more than torch's allocator and what "
            "was there before: memory of other libraries, of a step that was not examined, or of what runs between "
            "steps."
        )


def _left_behind(memory: Memory, allocator: Allocator) -> Iterator[str]:
    if allocator.left_behind <= max(LEAK_SHARE * allocator.requested, LEAK_FLOOR):
        return
    cause = ", such as a list of losses with their graphs; append loss.detach() instead."  # nothing was seen of it
    if memory.left:
        found = (f"{format_bytes(one.bytes)} of {one.module or 'the loop'} at {one.line}" for one in memory.left[:3])
        cause = f": {'; '.join(found)}."
        if "a graph of autograd" in cause:
            cause += " A loss that is kept keeps its graph: keep loss.detach() instead."
    yield f"Each step leaves {allocator.left_behind:,} bytes allocated that are in no category: a leak{cause}"


def _allocator(allocator: Allocator, limit: float) -> Iterator[str]:
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
