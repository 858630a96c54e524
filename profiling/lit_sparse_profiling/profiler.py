"""Measures a training loop, whoever runs it: a few steps are looked into, the others are timed and left in peace."""

from __future__ import annotations

import gc
import platform
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse_profiling.allocator import CPU, CUDA, CPUEvents
from lit_sparse_profiling.counted import Counter
from lit_sparse_profiling.kernels import KernelProfile, OpCounts, ceilings
from lit_sparse_profiling.ledger import ledger
from lit_sparse_profiling.nvml import NVML, NVMLMissing
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.record import Allocator, Device, Kernels, Memory, RunRecord, Throughput

Stage = str
"""warm-up, lead-in, examined, kernels, or timed."""
TRAINING, EXAMINATION, EXAMINED = "training", "examination", "examined step"
LOOKED_INTO = (EXAMINATION, EXAMINED, "forward", "backward", "optimizer step")
"""Phases in which the profiler's own tools take memory of the process too."""
STEPS_HELD = 512
"""Time stamps kept before they are read: reading them waits for the device, once."""


@dataclass(frozen=True)
class Plan:
    """Which steps of a loop are for what; those that follow are timed.

    Args:
        warmup: Steps that do not count: optimizer states are made in them, kernels are compiled and chosen.
        examine: Whether two steps follow in which memory is counted, by category and beside the allocator.
        profiled: Steps after these in which each kernel (on a CPU, each op) is timed.
        trace: A file for the Chrome trace of these; null writes none.
        timed: After how many timed steps to stop; null goes on to the end of training.

    Raises:
        ValueError: if a number is negative.
    """

    warmup: int = 2
    examine: bool = True
    profiled: int = 2
    trace: str | None = None
    timed: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "profiled", "timed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"profile.{name} is {getattr(self, name)}; it must be 0 or more.")

    def stages(self) -> deque[Stage]:
        """The stages of the steps that are not timed."""
        memory = ["lead-in", "examined"] if self.examine else []
        return deque(["warm-up"] * self.warmup + memory + ["kernels"] * self.profiled)


class Stopwatch:
    """Seconds of each step of the timed windows. On a GPU by events; the device is waited for once a window."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._cuda = device.type == "cuda"
        self._stamps: list[Any] = []

    @property
    def running(self) -> bool:
        """Whether a window is open."""
        return bool(self._stamps)

    def stamp(self) -> None:
        """Open a window, or end a step in it."""
        self._stamps.append(self._now())
        if len(self._stamps) > STEPS_HELD:
            last = self._stamps[-1]
            self.close()
            self._stamps = [last]

    def close(self) -> None:
        """End the window with the step that ended last."""
        if self._cuda and self._stamps:
            self._stamps[-1].synchronize()
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        self.seconds += [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairs]
        self._stamps = []

    def _now(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Tokens:
    """Tokens without and with padding; those on a device are added up there, and read when all is over."""

    real: Tensor | int = 0
    padded: int = 0
    known: bool = True

    def add(self, counts: tuple[Tensor | int, int] | None) -> None:
        """Add those of a batch; None if it does not tell."""
        if counts is None:
            self.known = False
        else:
            self.real, self.padded = self.real + counts[0], self.padded + counts[1]

    @property
    def counts(self) -> tuple[Tensor | int, int] | None:
        """Both sums; None if some batch did not tell."""
        return (self.real, self.padded) if self.known else None


@dataclass
class _Examined:
    """What the examined step gave."""

    counter: Counter
    ops: OpCounts
    allocator: Allocator | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    events: CPUEvents | None = None
    before: tuple[int, int] = (0, 0)


class Profiler:
    """Measures a training loop::

        with Profiler(model, optimizer) as profiler:
            for batch in batches:
                with profiler.step(batch):
                    with profiler.phase("forward"):
                        loss = model(**batch).loss
                    with profiler.phase("backward"):
                        loss.backward()
                    with profiler.phase("optimizer step"):
                        optimizer.step()
                        optimizer.zero_grad()
        profiler.record("mine").write("record.json")

    Args:
        model: What is trained.
        optimizer: Its optimizer, for the ledger.
        plan: Which steps are for what.
        device: Where the model is; taken from its first parameter.
        dtype: Of the computation, for the ceiling that FLOP/s are compared with; taken from the first parameter.
        phases: A stop-watch to go on with; none makes a new one.
        nvml: The sampler of the device, if it is open already; opened before the first tensor, it knows the context.
        state: Gives the tensors that an update strategy keeps, for the ledger.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        plan: Plan = Plan(),
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        phases: Phases | None = None,
        nvml: NVML | None = None,
        state: Callable[[], Any] = lambda: None,
    ) -> None:
        first = next(model.parameters())
        self.model, self.optimizer, self.plan, self.state = model, optimizer, plan, state
        self.device, self.dtype = device or first.device, dtype or first.dtype
        self.phases = phases or Phases(self.device)
        self.notes: list[str] = []
        self.timed = 0
        self.nvml = nvml or opened(self.device, self.notes)
        self._stages = plan.stages()
        self._stage: Stage | None = None
        self._phase: str | None = None
        self._watch = Stopwatch(self.device)
        self._tokens = Tokens()
        self._kernels: KernelProfile | None = None
        self._kernel_steps = 0
        self._lead: CPUEvents | None = None
        self._examined: _Examined | None = None
        self._profiled = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.close()

    # ---- the loop

    @contextmanager
    def step(self, batch: Any = None, tokens: tuple[Tensor | int, int] | None = None) -> Iterator[None]:
        """One optimizer step. `tokens`: without and with padding; none counts the batch's `input_ids`."""
        self.begin_step(batch)
        try:
            yield
        except BaseException:
            self.abort()
            raise
        self.end_step(tokens if tokens is not None else count_tokens(batch))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a step: forward, backward, optimizer step. Measured in the examined step only."""
        self.begin_phase(name)
        try:
            yield
        finally:
            self.end_phase(name)

    def begin_phase(self, name: str) -> None:
        """The same without a `with`."""
        if self._stage == "examined" and self._examined is not None:
            self._examined.counter.phase = name
            self.phases.begin(name)

    def end_phase(self, name: str) -> None:
        """The same without a `with`."""
        if self._stage == "examined":
            self.phases.end(name)

    @property
    def done(self) -> bool:
        """Whether as many steps were timed as the plan asks for."""
        return self.plan.timed is not None and self.timed >= self.plan.timed

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._stage is not None

    def begin_step(self, batch: Any = None) -> None:
        """The next optimizer step begins, with this batch."""
        self._stage = stage = self._stages.popleft() if self._stages else "timed"
        self._enter(TRAINING if stage in ("warm-up", "timed") else EXAMINATION)
        if self._stage == "lead-in" and self.device.type != "cuda":
            self._lead = CPUEvents()
            self._lead.start()
        elif self._stage == "examined":
            self._begin_examination(batch)
        elif self._stage == "kernels" and self._kernels is None:
            self._kernels = KernelProfile(self.device, None if self.plan.trace is None else Path(self.plan.trace))
            self._kernels.start()
        elif self._stage == "timed" and not self._watch.running:
            self._watch.stamp()
            if self.nvml is not None:
                self.nvml.begin_window()

    def end_step(self, tokens: tuple[Tensor | int, int] | None = None) -> None:
        """The step that begun last has ended. `tokens`: without and with padding."""
        stage, self._stage = self._stage, None
        if stage == "timed":
            self._watch.stamp()
            self._tokens.add(tokens)
            self.timed += 1
        elif stage == "examined":
            self._end_examination()
        elif stage == "kernels":
            self._kernel_steps += 1
            if not self._stages:
                self._stop_kernels()

    def _enter(self, phase: str | None) -> None:
        """Be in that phase of the loop, which goes on between its steps."""
        if self._phase == phase:
            return
        if self._phase is not None:
            self.phases.end(self._phase)
        if phase is not None:
            self.phases.begin(phase)
        self._phase = phase

    def pause(self) -> None:
        """Something other than training follows: evaluation, saving. What was timed ends here."""
        self._enter(None)
        if self._watch.running:
            self._watch.close()
            if self.nvml is not None:
                self.nvml.end_window()
        if self._lead is not None and self._examined is None:  # its blocks would be those of something else
            self._lead.stop()
            self._lead = None
            self._stages.appendleft("lead-in")
        if self._kernels is not None and self._stage is None and not self._profiled:
            self._stop_kernels()

    def abort(self) -> None:
        """The step failed: whatever looks into it is taken off."""
        self._stage = None
        if self._examined is not None and self._examined.allocator is None:
            self._examined.stack.close()
        self._stages.clear()
        self.pause()

    def close(self) -> None:
        """The loop has ended."""
        self.pause()
        if self.nvml is not None:
            self.nvml.stop()

    # ---- the examined step

    def _begin_examination(self, batch: Any) -> None:
        if self.device.type != "cuda" and self._lead is None:
            raise RuntimeError("a step is to be examined without the one before; this is an error of the profiler.")
        gc.collect()  # here and at the end: reference cycles are no leak, and their end is not this step's
        self.phases.begin(EXAMINED)
        if self._lead is not None:
            self._lead.mark()
        counter = Counter(self.model, self.optimizer, self.state(), batch, self.device)
        examined = _Examined(counter, OpCounts(), events=self._lead, before=self._level())
        examined.stack.callback(self._end_events)
        examined.stack.enter_context(examined.counter)
        examined.stack.enter_context(examined.ops)
        self._examined = examined

    def _level(self) -> tuple[int, int]:
        """Bytes asked for of the CUDA allocator and not given back, and the ledger's."""
        held = ledger(self.model, self.optimizer, self.state()).total
        if self.device.type != "cuda":
            return 0, held
        return torch.cuda.memory_stats(self.device)["requested_bytes.all.current"], held

    def _end_events(self) -> None:
        if self._lead is not None:
            self._lead.stop()
        self._lead = None

    def _end_examination(self) -> None:
        examined = self._examined
        assert examined is not None
        gc.collect()
        examined.stack.close()
        self.phases.end(EXAMINED)
        level, held = self._level()
        growth = held - examined.before[1]
        if examined.events is not None:
            start = examined.counter.start
            examined.allocator = Allocator(CPU, start + examined.events.peak, examined.events.left - growth)
        else:
            examined.allocator = self._cuda_allocator(level - examined.before[0] - growth)

    def _cuda_allocator(self, left_behind: int) -> Allocator:
        phase = next(phase for phase in self.phases.to_list() if phase.name == EXAMINED)
        stats = torch.cuda.memory_stats(self.device)
        assert phase.peak_requested is not None
        return Allocator(
            CUDA,
            phase.peak_requested,
            left_behind,
            allocated=phase.peak_allocated,
            reserved=phase.peak_reserved,
            inactive_split=stats["inactive_split_bytes.all.current"],
            retries=stats["num_alloc_retries"],
        )

    def _stop_kernels(self) -> None:
        assert self._kernels is not None
        self._kernels.stop(self._kernel_steps)
        self._stages = deque(stage for stage in self._stages if stage != "kernels")
        self._profiled = True

    # ---- results

    def throughput(self) -> Throughput | None:
        """Of the timed steps; None if there were none."""
        seconds = self._watch.seconds
        if not seconds:
            return None
        counts = self._tokens.counts
        return Throughput(
            tokens=None if counts is None else int(counts[0]),
            padded_tokens=None if counts is None else counts[1],
            seconds=sum(seconds),
            steps=len(seconds),
            median_step=statistics.median(seconds),
            longest_step=max(seconds),
            flops=self._examined.ops.flops if self._examined is not None else None,
        )

    def memory(self) -> Memory:
        """The process's peak outside of the examination, and what the examined step held."""
        phases = [phase.peak_rss for phase in self.phases.to_list() if phase.name not in LOOKED_INTO]
        peak = max((size for size in phases if size is not None), default=None)
        method, examined = self.phases.memory.method, self._examined
        if examined is None or examined.allocator is None:
            return Memory(peak, method)
        return Memory(peak, method, examined.counter.saved_peak, examined.counter.held(), examined.allocator)

    def kernels(self) -> Kernels | None:
        """Where the time of the profiled steps went; None if there were none. Measures the device's ceilings."""
        if self._kernels is None or not self._profiled:
            return None
        counts = self._examined.ops if self._examined is not None else None
        return self._kernels.kernels(counts, ceilings(self.device, self.dtype), self.dtype)

    def results(self, failed: bool = False) -> dict[str, Any]:
        """Everything measured, as fields of a `RunRecord`. After a failure nothing more is run on the device."""
        return {
            "device": device_of(self.device),
            "phases": self.phases.to_list(),
            "ledger": ledger(self.model, self.optimizer, self.state()),
            "memory": self.memory(),
            "throughput": self.throughput(),
            "driver": self.nvml.result() if self.nvml is not None else None,
            "kernels": None if failed else self.kernels(),
            "notes": self.notes,
        }

    def record(self, name: str, **fields: Any) -> RunRecord:
        """The record of the loop; `fields` are further ones, or win over what was measured."""
        versions = {"python": platform.python_version(), "torch": version("torch")}
        return RunRecord(name=name, **{"versions": versions, **self.results(), **fields})


def opened(device: torch.device, notes: list[str]) -> NVML | None:
    """The started sampler of a GPU; where there is none, `notes` says why."""
    if device.type != "cuda":
        return None
    try:
        nvml = NVML.of(device)
    except NVMLMissing as missing:
        notes.append(str(missing))
        return None
    nvml.start()
    return nvml


def count_tokens(batch: Any) -> tuple[Tensor | int, int] | None:
    """Tokens of a batch without and with padding, from its `token_mask`, `attention_mask` or `input_ids`, if any."""
    if not isinstance(batch, Mapping):
        return None
    for name in ("token_mask", "attention_mask"):
        if isinstance(batch.get(name), Tensor):
            return batch[name].sum(), batch[name].numel()
    ids = batch.get("input_ids")
    return (ids.numel(), ids.numel()) if isinstance(ids, Tensor) else None


def device_of(device: torch.device) -> Device:
    """What is to be known of the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device("cuda", properties.name, memory=properties.total_memory)
    name = platform.processor() or platform.machine()
    return Device("cpu", name, cores=torch.get_num_threads(), memory=psutil.virtual_memory().total)
