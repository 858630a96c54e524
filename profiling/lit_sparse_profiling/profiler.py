"""Measures a training loop, whoever runs it: a few steps are looked into, the others are timed and left in peace."""

from __future__ import annotations

import gc
import platform
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse_profiling.allocator import CPU, CUDA, CPUEvents
from lit_sparse_profiling.ceilings import DTYPES
from lit_sparse_profiling.counted import COURSE, Counter
from lit_sparse_profiling.kernel_times import KernelProfile, OpCounts, ceilings
from lit_sparse_profiling.ledger import ledger
from lit_sparse_profiling.memory import return_freed
from lit_sparse_profiling.nvml import NVML, NVMLMissing
from lit_sparse_profiling.paired import Turns
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.record import Allocator, Device, Kernels, Memory, RunRecord, Throughput
from lit_sparse_profiling.stopwatch import Stopwatch, Tokens, count_tokens

Stage = str
"""warm-up, lead-in, examined, kernels, or timed; and interrupted, which is none of these any more."""
TRAINING, EXAMINATION, EXAMINED = "training", "examination", "examined step"
INTERRUPTED: Stage = "interrupted"
LOOKED_INTO = (EXAMINATION, EXAMINED, "forward", "backward", "optimizer step")
"""Phases in which the profiler's own tools take memory of the process too."""
GIVEN_UP = {"examined": "Memory was not counted", "kernels": "Kernels were not timed"}
ATTEMPTS = 5
"""How often the steps of one kind are begun anew when evaluation or saving comes in between."""


@dataclass(frozen=True)
class Plan:
    """Which steps of a loop are for what; those that follow are timed.

    Args:
        warmup: Steps that do not count: optimizer states are made in them, kernels are compiled and chosen.
        examine: Whether two steps follow in which memory is counted, by category and beside the allocator.
        profiled: Steps after these in which each kernel (on a CPU, each op) is timed.
        trace: A file for the Chrome trace of these; null writes none.
        timed: After how many timed steps to stop; null goes on to the end of training.
        turns: Two file descriptors, "READ,WRITE", through which another run and this one do timed steps in turn (a
            bench gives them); null steps on at once.

    Raises:
        ValueError: if a number is negative.
    """

    warmup: int = 2
    examine: bool = True
    profiled: int = 2
    trace: str | None = None
    timed: int | None = None
    turns: str | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "profiled", "timed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"profile.{name} is {getattr(self, name)}; it must be 0 or more.")

    def stages(self) -> deque[Stage]:
        """The stages of the steps that are not timed."""
        memory = ["lead-in", "examined"] if self.examine else []
        return deque(["warm-up"] * self.warmup + memory + ["kernels"] * self.profiled)


@dataclass
class _Examined:
    """What the examined step gave."""

    counter: Counter
    ops: OpCounts
    allocator: Allocator | None = None
    stack: ExitStack = field(default_factory=ExitStack)
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
        dtype: Of the computation, for the ceiling that FLOP/s are compared with; taken from the first parameter in
            which products can be timed.
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
        self.device = with_index(device or first.device)
        self.dtype = dtype or next((p.dtype for p in model.parameters() if p.dtype in DTYPES), first.dtype)
        self.phases = phases or Phases(self.device)
        self.notes: list[str] = []
        self.timed = 0
        self.nvml = nvml or opened(self.device, self.notes)
        self._stages = plan.stages()
        self._stage: Stage | None = None
        self._phase: str | None = None
        self._parts: list[str] = []
        self._attempts: dict[Stage, int] = {}
        self._interrupted = 0
        self._watch = Stopwatch(self.device)
        self._turns = None if plan.turns is None else Turns(plan.turns)
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
            self._parts.append(name)
            self._examined.counter.phase = name
            self.phases.begin(name)

    def end_phase(self, name: str) -> None:
        """The same without a `with`; one that did not begin, or whose step was interrupted, need not end."""
        if name in self._parts and self._examined is not None:
            self._parts.remove(name)
            self._examined.counter.phase = self._parts[-1] if self._parts else COURSE
            self.phases.end(name)

    @property
    def done(self) -> bool:
        """Whether as many steps were timed as the plan asks for."""
        planned = self._stages or self.in_step
        return self.plan.timed is not None and not planned and self.timed >= self.plan.timed

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._stage is not None

    def begin_step(self, batch: Any = None) -> None:
        """The next optimizer step begins, with this batch."""
        self._stage = stage = self._stages.popleft() if self._stages else "timed"
        self._enter(TRAINING if stage in ("warm-up", "timed") else EXAMINATION)
        if self._stage == "lead-in" and self.device.type != "cuda":
            lead = CPUEvents()
            lead.start()
            self._lead = lead
        elif self._stage == "examined":
            self._begin_examination(batch)
        elif self._stage == "kernels" and self._kernels is None:
            kernels = KernelProfile(self.device, None if self.plan.trace is None else Path(self.plan.trace))
            kernels.start()
            self._kernels = kernels
        elif self._stage == "timed":
            self._begin_timed()

    def _begin_timed(self) -> None:
        if self._turns is not None:
            self._turns.wait()
        if self._watch.running:
            return
        self._watch.stamp()
        if self.nvml is not None:
            self.nvml.begin_window()

    def _end_timed(self) -> None:
        self._watch.stamp()
        self.timed += 1
        if self._turns is not None:
            self._close_window()
            self._turns.done(self._watch.seconds[-1])

    def _close_window(self) -> None:
        if self._watch.running:
            self._watch.close()
            if self.nvml is not None:
                self.nvml.end_window()

    def end_step(self, tokens: tuple[Tensor | int, int] | None = None) -> None:
        """The step that begun last has ended. `tokens`: without and with padding."""
        stage, self._stage = self._stage, None
        if stage == "timed":
            self._tokens.add(tokens)
            self._end_timed()
        elif stage == "examined":
            self._end_examination()
        elif stage == "kernels":
            self._kernel_steps += 1
            if not self._stages:
                self._stop_kernels()
        elif stage == INTERRUPTED:
            self._interrupted += 1

    def _enter(self, phase: str | None) -> None:
        """Be in that phase of the loop, which goes on between its steps."""
        if self._phase == phase:
            return
        if self._phase is not None:
            self.phases.end(self._phase)
        if self._phase == EXAMINATION:
            gc.collect()
            return_freed()  # else the peaks of what follows have the examination's own tools in them
        if phase is not None:
            self.phases.begin(phase)
        self._phase = phase

    def pause(self) -> None:
        """Something other than training follows: evaluation, saving. What was timed ends here.

        Steps that are looked into go together: if this comes in between, they are begun anew. So they are if it comes
        in the middle of one; a timed step then does not count.
        """
        self._enter(None)
        self._close_window()
        if self._kernel_steps and not self._profiled and not self.in_step:
            self._stop_kernels()
        self._put_off(self._take_off())
        if self.in_step:
            self._stage = INTERRUPTED

    def resume(self) -> None:
        """What `pause` was for is over: if it came in the middle of a step, the rest is training."""
        if self.in_step:
            self._enter(TRAINING)

    def abort(self) -> None:
        """The step failed: whatever looks into it is taken off, and none of those that follow is looked into."""
        self._take_off()
        self._stage = None
        self._stages.clear()
        self.pause()

    def close(self) -> None:
        """The loop has ended."""
        self.pause()
        self._stage = None
        if self.nvml is not None:
            self.nvml.stop()

    def _take_off(self) -> list[Stage]:
        """Take off, without a result, what looks into a step or waits for the next; gives the stages to do again."""
        unfinished = self._examined is not None and self._examined.allocator is None
        if unfinished or self._lead is not None:
            self._drop_examination()
            return ["lead-in", "examined"]
        if self._kernels is not None and not self._profiled:
            self._kernels.close()
            self._kernels, self._kernel_steps = None, 0
            return ["kernels"] * self.plan.profiled
        return []

    def _put_off(self, again: list[Stage]) -> None:
        """Plan these stages for the steps that follow, unless that was tried often enough."""
        if not again:
            return
        name = again[-1]
        self._attempts[name] = self._attempts.get(name, 0) + 1
        others = [stage for stage in self._stages if stage not in again]
        if self._attempts[name] < ATTEMPTS:
            self._stages = deque(again + others)
            return
        self._stages = deque(others)
        self.notes.append(
            f"{GIVEN_UP[name]}: in {ATTEMPTS} attempts evaluation or saving came in between; do these less often."
        )

    # ---- the examined step

    def _begin_examination(self, batch: Any) -> None:
        if self.device.type != "cuda" and self._lead is None:
            raise RuntimeError("a step is to be examined without the one before; this is an error of the profiler.")
        gc.collect()  # here and at the end: reference cycles are no leak, and their end is not this step's
        self.phases.begin(EXAMINED)
        counter = Counter(self.model, self.optimizer, self.state(), batch, self.device)
        self._examined = examined = _Examined(counter, OpCounts(), before=self._level())
        if self._lead is not None:
            self._lead.mark(counter.addresses())
        examined.stack.enter_context(counter)
        examined.stack.enter_context(examined.ops)

    def _level(self) -> tuple[int, int]:
        """Bytes asked for of the CUDA allocator and not given back, and the ledger's."""
        held = ledger(self.model, self.optimizer, self.state()).total
        if self.device.type != "cuda":
            return 0, held
        return torch.cuda.memory_stats(self.device)["requested_bytes.all.current"], held

    def _drop_examination(self) -> None:
        for name in reversed(self._parts.copy()):
            self.end_phase(name)
        if self._examined is not None:
            self._examined.stack.close()
            self.phases.end(EXAMINED)
            self._examined = None
        if self._lead is not None:
            self._lead.close()
            self._lead = None

    def _end_examination(self) -> None:
        examined = self._examined
        assert examined is not None
        gc.collect()
        examined.stack.close()
        events, self._lead = self._lead, None
        if events is not None:
            events.stop()
        self.phases.end(EXAMINED)
        level, held = self._level()
        growth = held - examined.before[1]
        if events is not None:
            begun = examined.counter.start + events.others
            examined.allocator = Allocator(CPU, begun + events.peak, events.left - growth)
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
        try:
            return self._kernels.kernels(counts, ceilings(self.device, self.dtype), self.dtype)
        except RuntimeError as error:  # no right to CUPTI, no room for the ceilings: the rest of the record stands
            self.notes.append(f"Kernels have no figures: {str(error).strip().splitlines()[0]}")
            return None

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
            "notes": [*self.notes, *self._uncounted()],
        }

    def _uncounted(self) -> Iterator[str]:
        if self._interrupted:
            yield f"Steps not measured, since evaluation or saving came in the middle of them: {self._interrupted}."

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


def with_index(device: torch.device) -> torch.device:
    """The device as its tensors name it: "cuda" alone is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def device_of(device: torch.device) -> Device:
    """What is to be known of the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device("cuda", properties.name, memory=properties.total_memory)
    name = platform.processor() or platform.machine()
    return Device("cpu", name, cores=torch.get_num_threads(), memory=psutil.virtual_memory().total)
