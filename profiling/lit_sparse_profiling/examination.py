"""The examined step: its memory is counted storage by storage, and read from the allocator at the same time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lit_sparse_profiling.allocator import CPU, CUDA, CPUEvents
from lit_sparse_profiling.counted import UNNAMED_PHASE, Counter
from lit_sparse_profiling.ledger import categories, ledger, storages
from lit_sparse_profiling.memory import free_heap
from lit_sparse_profiling.opcounts import OpCounts
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.sections import EXAMINED, LEAD_IN, Allocator, Large, Phase
from lit_sparse_profiling.witness import alive_bytes

Subject = Callable[[], tuple[nn.Module, Optimizer | None, Any]]
"""Returns the model, its optimizer and the strategies' state, as they are now."""


class Examination:
    """Instruments of the examined step: call `lead_in` one step earlier, then `begin`, run the step, then `end`.

    Two steps are needed because the CPU's allocator keeps no counters. torch.profiler reports its events, but not the
    free of a block that was allocated before the recording. The counter tells of those in tensors, and a lead-in of
    a whole step makes all known that are allocated in one step and freed in the next. It also shows what counting
    changes.

    Args:
        subject: Gives what is counted.
        device: Device of the model, with its index.
        phases: Stop-watch in which the examined step and its parts are phases.

    Attributes:
        counter: The count by category; None before the step.
        ops: FLOPs and bytes of the step's ops; None before the step.
        allocator: The allocator's figures; None until the step has ended.
        ran_eagerly: True if the model is compiled, which nothing that counts ops can see into: it ran uncompiled.
        left: The largest storages that the step left behind; empty until it has ended.
        outside: Resident bytes that were in no tensor before the lead-in; None on a GPU.
    """

    def __init__(self, subject: Subject, device: torch.device, phases: Phases) -> None:
        self.counter: Counter | None = None
        self.ops: OpCounts | None = None
        self.allocator: Allocator | None = None
        self.left: list[Large] = []
        self.outside: int | None = None
        self.ran_eagerly = False
        self._frames = compiled_frames()
        self._subject, self._device, self._phases = subject, device, phases
        self._events: CPUEvents | None = None
        self._parts: list[str] = []
        self._instruments = ExitStack()
        self._before = (0, 0)
        self._plain_peak: int | None = None

    @property
    def under_way(self) -> bool:
        """True from `lead_in`, on a GPU without the time between the two steps, until `end` or `drop`."""
        return (
            self._events is not None
            or self._phases.is_open(LEAD_IN)
            or (self.counter is not None and self.allocator is None)
        )

    def lead_in(self) -> None:
        """Start to record the CPU allocator's events, in the step before the examined one.

        Raises:
            RuntimeError: if another torch.profiler is running.
        """
        if self._device.type == "cuda":
            self._phases.begin(LEAD_IN)
            return
        free_heap()
        known = alive_bytes(self._device) | self._known()
        resident = self._phases.memory.current()
        self.outside = None if resident is None else resident - sum(known.values())
        events = CPUEvents(known)
        events.start()
        self._events = events

    def _known(self) -> dict[int, int]:
        # `gc.freeze` hides objects from the collector: what a category has is asked of it.
        members = categories(*self._subject()).values()
        found = (key for part in members for tensor in part for key in storages(tensor))
        return {address: size for (device, address), size in found if device == str(self._device)}

    def end_lead_in(self) -> None:
        """End the step before the examined one."""
        if self._device.type == "cuda":
            self._plain_peak = self._phases.end(LEAD_IN).peak_requested

    def begin(self, batch: Any) -> None:
        """Begin the examined step, with its batch.

        Raises:
            RuntimeError: if `lead_in` was not called, on a CPU.
        """
        if self._device.type != "cuda" and self._events is None:
            raise RuntimeError("An examined step is to begin without its lead-in; call `lead_in` one step earlier.")
        # Here and at the end: a reference cycle is not a leak, and one from an earlier step is not this step's memory.
        gc.collect()
        self._phases.begin(EXAMINED)
        counter = Counter(*self._subject(), batch, self._device)
        counter.add_others()
        self.ran_eagerly = is_compiled(self._subject()[0]) or compiled_frames() > self._frames
        self.counter, self.ops, self._before = counter, OpCounts(), self._allocated_and_held()
        if self._events is not None:
            self._events.mark(counter.addresses())
            counter.on_free = self._events.tell_freed
        self._instruments.enter_context(counter)
        self._instruments.enter_context(self.ops)

    def begin_part(self, name: str) -> None:
        """Begin a part of the examined step, such as "forward"."""
        assert self.counter is not None
        self._parts.append(name)
        self.counter.phase = name
        self._phases.begin(name)

    def end_part(self, name: str) -> None:
        """End a part; do nothing if it is not open, since the examination may have been dropped within it."""
        if name in self._parts and self.counter is not None:
            self._parts.remove(name)
            self.counter.phase = self._parts[-1] if self._parts else UNNAMED_PHASE
            self._phases.end(name)

    def end(self) -> None:
        """End the examined step and work out the allocator's figures."""
        assert self.counter is not None
        gc.collect()
        self._instruments.close()
        events, self._events = self._events, None
        if events is not None:
            events.stop()
        call = self._phases.end(EXAMINED)
        self.left = self.counter.left()
        allocated, held = self._allocated_and_held()
        # State that the step created (gradients, moments) is in the ledger, so that its growth is not left behind.
        growth = held - self._before[1]
        if events is not None:
            # Events know levels only as a rise. The level at the begin is what the counter knew then, plus blocks from
            # the lead-in that it does not know.
            begun = self.counter.start + events.unnamed
            left, plain = events.left - growth, begun + events.peak_before
            self.allocator = Allocator(CPU, begun + events.peak, left, uncounted=plain)
        else:
            self.allocator = self._read_cuda(call, allocated - self._before[0] - growth)

    def drop(self) -> None:
        """Remove the instruments without a result: the step failed, was interrupted, or did not come."""
        for name in reversed(self._parts.copy()):
            self.end_part(name)
        if self.counter is not None:
            self._instruments.close()
            self._phases.end(EXAMINED)
            self.counter = self.ops = None
        if self._phases.is_open(LEAD_IN):
            self._phases.end(LEAD_IN)
        if self._events is not None:
            self._events.close()
            self._events = None

    def _allocated_and_held(self) -> tuple[int, int]:
        """Return the bytes requested from the CUDA allocator and not freed (0 on a CPU), and the ledger's total."""
        held = ledger(*self._subject()).total
        if self._device.type != "cuda":
            return 0, held
        return torch.cuda.memory_stats(self._device)["requested_bytes.all.current"], held

    def _read_cuda(self, call: Phase, left_behind: int) -> Allocator:
        # The peaks are the call's: `Phases` resets the device's counters at every boundary, and each of the step's
        # parts has two. Read here, they would be those since the last one.
        stats = torch.cuda.memory_stats(self._device)
        assert call.peak_requested is not None
        return Allocator(
            CUDA,
            call.peak_requested,
            left_behind,
            allocated=call.peak_allocated,
            reserved=call.peak_reserved,
            inactive_split=stats["inactive_split_bytes.all.current"],
            retries=stats["num_alloc_retries"],
            uncounted=self._plain_peak,
        )


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile compiles the model or a part of it."""
    dynamo = sys.modules.get("torch._dynamo")  # without it nothing is compiled, and importing it takes seconds
    if dynamo is None:
        return False
    return any(isinstance(module, dynamo.OptimizedModule) or module._compiled_call_impl for module in model.modules())


def compiled_frames() -> int:
    """Return how many frames, such as a compiled function that calls the model, torch has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["frames"]["ok"]
