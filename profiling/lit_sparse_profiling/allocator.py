"""What torch's allocator gives out while a block of code runs, on a GPU and on a CPU.

A GPU's caching allocator keeps counters. The CPU's keeps none, but tells torch.profiler of every block that it gives
out or takes back; blocks from before are unknown to it, so that it knows levels only as a rise over a beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

CUDA = "CUDA caching allocator, bytes as requested"
CPU = "CPU allocation events of torch.profiler, as a rise over the beginning of the step"
MARK = "lit_sparse: measured from here"


@dataclass
class Measured:
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
def measured(device: torch.device | None = None) -> Iterator[Measured]:
    """Measure what the code in this block allocates on `device` (none is the GPU, if there is one, else the CPU).

    On a GPU its peak counters are set back. On a CPU the code runs under torch.profiler and takes longer; blocks that
    it frees and that were allocated before do not count.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure = _on_cuda if device.type == "cuda" else _on_cpu
    with measure(device) as result:
        yield result


@contextmanager
def _on_cuda(device: torch.device) -> Iterator[Measured]:
    result = Measured(method=CUDA)
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats(device)
    yield result
    after = torch.cuda.memory_stats(device)
    result.requested = after["requested_bytes.all.peak"] - before
    result.left = after["requested_bytes.all.current"] - before


@contextmanager
def _on_cpu(device: torch.device) -> Iterator[Measured]:
    events = CPUEvents()
    events.start()
    events.mark()
    result = Measured(method=CPU)
    try:
        yield result
    finally:
        events.stop()
    result.requested, result.left = events.peak, events.left


class CPUEvents:
    """Records the CPU allocator's events from `start` to `stop`; `peak` and `left` count from `mark` on.

    What happens between `start` and `mark` makes blocks known, so that it counts when they are freed after `mark`.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.left = 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def start(self) -> None:
        """Begin to record."""
        self._profile.start()

    def mark(self) -> None:
        """Count from here on."""
        with record_function(MARK):
            pass

    def stop(self) -> None:
        """End the recording and work out the figures."""
        self._profile.stop()
        results = self._profile.profiler
        assert results is not None
        assert results.kineto_results is not None
        events: list[Any] = results.kineto_results.events()
        begin = next(event.start_ns() for event in events if event.name() == MARK)
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        level = 0
        for _, size in (change for change in changes if change[0] >= begin):
            level += size
            self.peak = max(self.peak, level)
        self.left = level
