"""Time and memory peaks of the phases of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch

from lit_sparse_profiling.memory import ResidentMemory
from lit_sparse_profiling.sections import Phase

STAT = Path("/proc/self/stat")


@dataclass(frozen=True)
class _Peaks:
    peak_rss: int | None
    peak_requested: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None


class Phases:
    """Stop-watch and peak meter of phases: `with phases("selection"): ...`.

    A phase may be entered many times: seconds and calls add up, and peaks are the highest of any call. Phases may nest
    or overlap. Each includes everything between its begin and its end, so that seconds of nested phases must not be
    added up; their `own` seconds may be, in which each moment belongs to the open phase that began last. A phase cannot
    be entered while it is open.

    Every begin and end reads and resets the peaks of the whole process: use one `Phases` at a time, and do not reset
    CUDA's peaks elsewhere. On CUDA, every begin and end synchronises the device.

    Args:
        device: Device whose allocator is read, if it is a CUDA device.
        since: Time of `perf_counter` from which `elapsed` counts; now by default.
    """

    def __init__(self, device: torch.device | None = None, since: float | None = None) -> None:
        self.memory = ResidentMemory()
        self._cuda: torch.device | None = None
        self._since = self._boundary_at = perf_counter() if since is None else since
        self._begun: dict[str, float] = {}
        self._calls: dict[str, Phase] = {}
        self._phases: dict[str, Phase] = {}
        if device is not None:
            self.read(device)

    @classmethod
    def of_process(cls) -> Phases:
        """Return phases whose time began with this process: all until now is the phase `imports`."""
        now = perf_counter()
        age = process_age()
        phases = cls(since=now - age)
        phases._phases["imports"] = Phase("imports", age, 1, own=age)
        return phases

    def read(self, device: torch.device) -> None:
        """Read the allocator of `device` from now on, if it is a CUDA device."""
        self._cuda = device if device.type == "cuda" else None

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return perf_counter() - self._since

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block as the phase `name`, even if it ends by an exception."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def begin(self, name: str) -> None:
        """Open the phase `name`.

        Raises:
            ValueError: if the phase is open already, since its time would count twice.
        """
        if name in self._begun:
            raise ValueError(
                f"Phase {name!r} is to begin, but it is open already; end it first, or name the inner one otherwise."
            )
        self._boundary()
        self._phases.setdefault(name, Phase(name, 0.0, 0, own=0.0))
        self._calls[name] = Phase(name, 0.0, 1)
        self._begun[name] = perf_counter()

    def end(self, name: str) -> Phase:
        """Close the phase `name`, and return the call that ends: its seconds, and its own peaks.

        Raises:
            ValueError: if the phase is not open.
        """
        if name not in self._begun:
            raise ValueError(f"Phase {name!r} is to end, but it is not open; begin it first.")
        now = self._boundary()
        phase, seconds = self._phases[name], now - self._begun.pop(name)
        self._phases[name] = replace(phase, seconds=phase.seconds + seconds, calls=phase.calls + 1)
        return replace(self._calls.pop(name), seconds=seconds)

    def sample(self) -> int | None:
        """Return the memory peak since the last boundary or sample: reserved on a GPU, resident on a CPU.

        It counts in the peaks of the open phases, and does not wait for the device.
        """
        peaks = self._read()
        return peaks.peak_rss if self._cuda is None else peaks.peak_reserved

    def is_open(self, name: str) -> bool:
        """Return whether the phase has begun and not ended."""
        return name in self._begun

    def own(self, *names: str) -> float:
        """Return the own seconds of these phases until now."""
        running = [*self._begun][-1:]
        inside = perf_counter() - self._boundary_at if running and running[0] in names else 0.0
        return inside + sum(self._phases[name].own or 0.0 for name in names if name in self._phases)

    def to_list(self) -> list[Phase]:
        """Return the phases that have ended at least once, in the order of their first begin."""
        return [phase for phase in self._phases.values() if phase.calls]

    def _boundary(self) -> float:
        """Add the peaks since the last boundary to all open phases, reset them, and return the time before that.

        Boundaries split the run into intervals. A phase's peak is the highest over its intervals: resetting a peak at
        an inner phase's begin does not lose the outer one's.
        """
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        now = perf_counter()
        self._read()
        for name in [*self._begun][-1:]:  # the innermost
            own = (self._phases[name].own or 0.0) + now - self._boundary_at
            self._phases[name] = replace(self._phases[name], own=own)
        self._boundary_at = now
        return now

    def _read(self) -> _Peaks:
        peaks = self._lap()
        for name in self._begun:
            self._phases[name] = _raise_peaks(self._phases[name], peaks)
            self._calls[name] = _raise_peaks(self._calls[name], peaks)
        return peaks

    def _lap(self) -> _Peaks:
        resident = self.memory.lap()
        if self._cuda is None:
            return _Peaks(resident)
        stats = torch.cuda.memory_stats(self._cuda)  # empty before CUDA is initialised
        torch.cuda.reset_peak_memory_stats(self._cuda)
        names = ("requested_bytes", "allocated_bytes", "reserved_bytes")
        return _Peaks(resident, *(stats.get(f"{name}.all.peak", 0) for name in names))


def _raise_peaks(phase: Phase, peaks: _Peaks) -> Phase:
    return replace(
        phase,
        peak_rss=_highest(phase.peak_rss, peaks.peak_rss),
        peak_requested=_highest(phase.peak_requested, peaks.peak_requested),
        peak_allocated=_highest(phase.peak_allocated, peaks.peak_allocated),
        peak_reserved=_highest(phase.peak_reserved, peaks.peak_reserved),
    )


def _highest(a: int | None, b: int | None) -> int | None:
    return max((x for x in (a, b) if x is not None), default=None)


def process_age() -> float:
    """Return the seconds since this process began, to 10 ms; on systems that do not tell, its CPU time, which is less.

    Linux has its beginning in clock ticks since boot.
    """
    if not STAT.exists():
        return sum(os.times()[:2])
    ticks = int(STAT.read_text().rpartition(")")[2].split()[19])  # the name before may hold blanks
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
