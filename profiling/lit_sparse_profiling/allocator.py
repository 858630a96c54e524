"""What torch's allocator gives out while a block of code runs, on a GPU and on a CPU.

A GPU's caching allocator keeps counters. The CPU's keeps none, but tells torch.profiler of every block that it gives
out or takes back; blocks from before are unknown to it, so that it knows levels only as a rise over a beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

CUDA = "CUDA caching allocator, bytes as requested"
CPU = "CPU allocation events of torch.profiler, as a rise over the beginning of the step"
MARK = "lit_sparse: measured from here"


@dataclass
class Allocations:
    """What was allocated in a block of code, in bytes, once it has ended.

    Attributes:
        requested: The most that was held at one time above what was held at the beginning.
        left: What was still held at the end above what was held at the beginning.
        method: Which allocator it was, and how it was read.
    """

    requested: int = 0
    left: int = 0
    method: str = ""


@contextmanager
def measure_allocations(device: torch.device | None = None) -> Iterator[Allocations]:
    """Measure what the code in this block allocates on `device` (none is the GPU, if there is one, else the CPU).

    On a GPU its peak counters are set back. On a CPU the code runs under torch.profiler and takes longer; blocks that
    it frees and that were allocated before do not count.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure = _on_cuda if device.type == "cuda" else _on_cpu
    with measure(device) as result:
        yield result


@contextmanager
def _on_cuda(device: torch.device) -> Iterator[Allocations]:
    result = Allocations(method=CUDA)
    before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)  # empty before CUDA has begun
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
    """Records the CPU allocator's events from `start` to `stop`.

    What happens between `start` and `mark` makes blocks known, so that it counts when they are freed after `mark`.

    Attributes:
        peak: Most bytes that were held at one time after `mark` above what was held there.
        left: Bytes still held at the end above that.
        others: Bytes given out after `start` that were held at `mark` at other addresses than those named there.
    """

    def __init__(self) -> None:
        self.peak = self.left = self.unnamed = 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._named: frozenset[int] = frozenset()

    def start(self) -> None:
        """Begin to record.

        Raises:
            RuntimeError: if another torch.profiler runs.
        """
        if _profiler_enabled():  # torch would end that one without a word
            raise RuntimeError("Allocations are to be recorded, but another torch.profiler runs; stop that one first.")
        self._profile.start()

    def mark(self, named: Iterable[int] = ()) -> None:
        """Count from here on; `named` are the addresses of blocks that the caller knows to be held here."""
        self._named = frozenset(named)
        with record_function(MARK):
            pass

    def close(self) -> None:
        """End the recording without figures: what was to be measured failed, or did not come."""
        self._profile.stop()

    def stop(self) -> None:
        """End the recording and work out the figures.

        Raises:
            RuntimeError: if `mark` was never called.
        """
        self._profile.stop()
        results = self._profile.profiler
        assert results is not None
        assert results.kineto_results is not None
        events = list(_walk(results.kineto_results.experimental_event_tree()))
        begin = next((event.start_time_ns for event in events if event.name == MARK), None)
        if begin is None:
            raise RuntimeError("Allocations were recorded, but from no mark on; call mark between start and stop.")
        changes, held = _size_changes(events), dict[int, int]()
        _levels([change for change in changes if change.when < begin], held)
        self.unnamed = sum(size for address, size in held.items() if address not in self._named)
        levels = _levels([change for change in changes if change.when >= begin], held)
        self.peak, self.left = max(levels), levels[-1]


class _Change(NamedTuple):
    """Bytes given out (above 0) or taken back at an address, and when, in nanoseconds."""

    when: int
    size: int
    address: int


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    """The events of a tree, parents first."""
    ahead = list(events)
    while ahead:
        event = ahead.pop()
        ahead.extend(event.children)
        yield event


def _size_changes(events: Iterable[Any]) -> list[_Change]:
    """What the CPU's allocator did, in the course of time."""
    fields = [(event.start_time_ns, event.extra_fields) for event in events if event.tag == _EventType.Allocation]
    return sorted(_Change(when, it.alloc_size, it.ptr) for when, it in fields if it.device.type == "cpu")


def _levels(changes: Iterable[_Change], held: dict[int, int]) -> list[int]:
    """Bytes above the beginning, there and after each change; `held`, the known blocks' bytes by address, follows.

    A block from before the recording is not known when it is taken back. Torch may tell of it all the same, with the
    size of another one that was at its address in an earlier recording.
    """
    levels = [0]
    for change in changes:
        if change.size > 0:
            held[change.address] = change.size
            levels.append(levels[-1] + change.size)
        else:
            levels.append(levels[-1] - held.pop(change.address, 0))
    return levels
