"""Measurement of what torch's allocator allocates in a block of code, on a GPU and on a CPU.

The GPU's caching allocator keeps counters. The CPU's keeps none, but reports each allocation and each free to
torch.profiler. The size of a block that was allocated before the recording is unknown when it is freed, so that on a
CPU only the rise over the beginning is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _EventType, _RecordFunctionFast
from torch.profiler import ProfilerActivity, record_function

from lit_sparse_profiling.open_profilers import make_profile

CUDA = "CUDA caching allocator, bytes as requested"
CPU = "CPU allocation events of torch.profiler, as a rise over the beginning of the step"
MARK = "lit_sparse: measured from here"
FREED = "lit_sparse: freed "
"""Begin of the name of an event that tells of a free which torch.profiler does not: see `CPUEvents.tell_freed`."""


@dataclass
class Allocations:
    """Bytes allocated in a block of code. The figures are set when the block ends.

    Attributes:
        requested: Peak above the level at the beginning.
        left: Level at the end above that at the beginning; negative if the block freed more than it allocated.
        method: Which allocator was read, and how.
    """

    requested: int = 0
    left: int = 0
    method: str = ""


@contextmanager
def measure_allocations(device: torch.device | None = None) -> Iterator[Allocations]:
    """Measure what the code in this block allocates on `device`; by default the GPU if there is one, else the CPU.

    On a GPU, the peak counters are reset. On a CPU, the code runs under torch.profiler and is slower, and freeing a
    block that was allocated before is not seen.

    Raises:
        RuntimeError: on a CPU, if another torch.profiler is running.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure = _on_cuda if device.type == "cuda" else _on_cpu
    with measure(device) as result:
        yield result


@contextmanager
def _on_cuda(device: torch.device) -> Iterator[Allocations]:
    result = Allocations(method=CUDA)
    torch.cuda.init()  # else torch refuses an indexed device
    before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)  # empty before CUDA is initialised
    torch.cuda.reset_peak_memory_stats(device)
    yield result
    after = torch.cuda.memory_stats(device)
    result.requested = after["requested_bytes.all.peak"] - before
    result.left = after["requested_bytes.all.current"] - before


@contextmanager
def _on_cpu(device: torch.device) -> Iterator[Allocations]:
    events = CPUEvents()
    events.start()
    events.mark()
    result = Allocations(method=CPU)
    try:
        yield result
    finally:
        events.stop()
    result.requested, result.left = events.peak, events.left


class CPUEvents:
    """Recording of the CPU allocator's events from `start` to `stop`. The figures are those from `mark` on.

    Blocks that are allocated between `start` and `mark` become known, so that freeing them after `mark` is seen. Of
    those from before `start`, torch.profiler does not report it: `tell_freed` does.

    Attributes:
        peak: Peak bytes after `mark`, above the level at `mark`.
        left: Bytes at the end, above the level at `mark`.
        unnamed: Bytes of known blocks alive at `mark` whose addresses were not named there.
        peak_before: Peak bytes from `start` to `mark`, above the level at `mark`.

    Args:
        known: Bytes by address of blocks that are alive before `start`.
    """

    def __init__(self, known: Mapping[int, int] | None = None) -> None:
        self.peak = self.left = self.unnamed = self.peak_before = 0
        self._known = dict(known or {})
        self._profile = make_profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._named: frozenset[int] = frozenset()

    def start(self) -> None:
        """Start to record.

        Raises:
            RuntimeError: if another torch.profiler is running.
        """
        if _profiler_enabled():  # torch would stop that one silently, and its owner would get an empty trace
            raise RuntimeError("Allocations are to be recorded, but another torch.profiler runs; stop that one first.")
        self._profile.start()

    def mark(self, named: Iterable[int] = ()) -> None:
        """Start to count. `named` are addresses of blocks that are alive and that the caller counts itself."""
        self._named = frozenset(named)
        with record_function(MARK):
            pass

    def tell_freed(self, address: int) -> None:
        """Record that the known block at this address is freed now. Call it before that, or at once after."""
        with _RecordFunctionFast(f"{FREED}{address}"):
            pass

    def close(self) -> None:
        """Stop the recording without figures, after a failure."""
        self._profile.stop()

    def stop(self) -> None:
        """Stop the recording and compute the figures.

        Raises:
            RuntimeError: if `mark` was never called.
        """
        self._profile.stop()
        results = self._profile.profiler
        assert results is not None
        assert results.kineto_results is not None
        events = list(walk_events(results.kineto_results.experimental_event_tree()))
        begin = next((event.start_time_ns for event in events if event.name == MARK), None)
        if begin is None:
            raise RuntimeError("Allocations were recorded without a mark; call mark between start and stop.")
        changes, held = size_changes(events), dict(self._known)
        before = _levels([change for change in changes if change.when < begin], held)
        self.peak_before = max(before) - before[-1]
        fresh = {change.address for change in changes if change.when < begin and change.size > 0}
        for address in self._known.keys() - self._named - fresh:
            held.pop(address, None)  # alive before, and what is not named at the mark is not counted there either
        self.unnamed = sum(size for address, size in held.items() if address not in self._named)
        levels = _levels([change for change in changes if change.when >= begin], held)
        self.peak, self.left = max(levels), levels[-1]


class Change(NamedTuple):
    """An allocation (size above 0) or a free (below 0) of bytes at an address, and its time in nanoseconds."""

    when: int
    size: int
    address: int


def walk_events(events: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the events of a tree, parents first."""
    ahead = list(events)
    while ahead:
        event = ahead.pop()
        ahead.extend(event.children)
        yield event


def size_changes(events: Iterable[Any]) -> list[Change]:
    """Return the CPU allocator's allocations and frees, ordered by time, with those that `tell_freed` recorded."""
    changes: list[Change] = []
    for event in events:
        when, found = event.start_time_ns, event.extra_fields
        if event.tag == _EventType.Allocation and found.device.type == "cpu":
            changes.append(Change(when, found.alloc_size, found.ptr))
        elif event.name.startswith(FREED):
            changes.append(Change(when, -1, int(event.name.removeprefix(FREED))))
    return sorted(changes)


def _levels(changes: Iterable[Change], held: dict[int, int]) -> list[int]:
    """Return the level above the beginning, first 0 and then after each change.

    `held` maps the addresses of known blocks to their bytes, and is updated in place.
    """
    levels = [0]
    for change in changes:
        if change.size > 0:
            held[change.address] = change.size
            levels.append(levels[-1] + change.size)
        else:
            # Not `change.size`: for a block from before this recording, torch may report the size of another block that
            # an earlier recording saw at the same address.
            levels.append(levels[-1] - held.pop(change.address, 0))
    return levels
