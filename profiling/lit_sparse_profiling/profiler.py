"""Measures a training loop of any framework: a few steps are instrumented, the others are only timed."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse_profiling.budget import CEILING, MEMORY, Budget
from lit_sparse_profiling.ceilings import DTYPES, CeilingSeries
from lit_sparse_profiling.devices import describe_device, resolve_index
from lit_sparse_profiling.examined_steps import ExaminedSteps
from lit_sparse_profiling.kernel_times import KernelProfile, ceilings
from lit_sparse_profiling.ledger import ledger
from lit_sparse_profiling.memory import free_heap
from lit_sparse_profiling.nvml import NVML, open_nvml
from lit_sparse_profiling.paired import Turns
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import CEILINGS, EXAMINATION, INSTRUMENTED_PHASES, Memory
from lit_sparse_profiling.speed_sections import Kernels, Throughput
from lit_sparse_profiling.stages import Stages
from lit_sparse_profiling.step_plan import INTERRUPTED, Plan, Stage, plan_on
from lit_sparse_profiling.stopwatch import Tokens, count_positions, count_tokens, largest
from lit_sparse_profiling.timed_steps import TimedSteps
from lit_sparse_profiling.witness import PlainSteps

TRAINING = "training"


class Profiler:
    """Profiler of a training loop. A step is either instrumented or timed, since instruments cost time and memory::

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
        model: The trained model.
        optimizer: Its optimizer, for the ledger.
        plan: The purpose of each step; `Plan()` by default.
        device: Device of the model; that of its first parameter by default.
        dtype: Dtype of the computation, in which the FLOP/s ceiling is measured. By default, the dtype of the first
            parameter that matrix products can have: a quantized weight's cannot be timed.
        phases: Stop-watch to continue; a new one by default.
        nvml: Open sampler of the device. One that was opened before the first tensor knows the CUDA context's size.
        state: Returns the tensors that update strategies keep, for the ledger.
        budget: Limits what the plan measures only where it takes little of the run; None sets no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        plan: Plan | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        phases: Phases | None = None,
        nvml: NVML | None = None,
        state: Callable[[], Any] = lambda: None,
        budget: Budget | None = None,
    ) -> None:
        first = next(model.parameters())
        self.model, self.optimizer, self.state = model, optimizer, state
        self.notes: list[str] = []
        self.device = resolve_index(device or first.device)
        self.plan = plan = plan_on(self.device, plan or Plan(), self.notes)
        self.dtype = dtype or next((p.dtype for p in model.parameters() if p.dtype in DTYPES), first.dtype)
        self.phases = phases or Phases(self.device)
        self.nvml = nvml or open_nvml(self.device, self.notes)
        self._stages = Stages(plan, self.device, self.phases, budget, self.notes)
        self._stage: Stage | None = None
        self._phase: str | None = None
        self._interrupted = 0
        self._steps = TimedSteps(self.device, self.nvml, None if plan.turns is None else Turns(plan.turns))
        self._ceilings = CeilingSeries(lambda: ceilings(self.device, self.dtype))
        self._begun = 0
        self._positions: int | None = None  # of the largest batch of the step
        self._tokens = Tokens()  # of all of its batches
        self._most: int | None = None  # of any step
        self._kernels: KernelProfile | None = None
        self._kernel_steps = 0
        self._plain = PlainSteps()
        self._examined = ExaminedSteps(lambda: (self.model, self.optimizer, self.state()), self.device, self.phases)
        self._profiled = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.close()

    # ---- the loop

    @contextmanager
    def step(self, batch: Any = None, tokens: tuple[Tensor | int, int] | None = None) -> Iterator[None]:
        """Measure one optimizer step.

        Args:
            batch: Batch of the step; if the step accumulates gradients, a list of its micro-batches.
            tokens: Number of tokens without and with padding; by default, those of the batch, and of all added to it.
        """
        self.begin_step(batch)
        try:
            yield
        except BaseException:
            self.abort()
            raise
        self.end_step(tokens)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a part of a step: forward, backward, optimizer step. Does nothing outside the examined step.

        A phase costs a synchronisation of the device at its begin and end, which would slow down a timed step.
        """
        self.begin_phase(name)
        try:
            yield
        finally:
            self.end_phase(name)

    def begin_phase(self, name: str) -> None:
        """Begin a part of a step, as `phase` does."""
        if self._stage == "examined":
            self._examined.begin_part(name)

    def end_phase(self, name: str) -> None:
        """End a part of a step; do nothing if it was not begun, or if its step was interrupted."""
        self._examined.end_part(name)

    @property
    def timed(self) -> int:
        """Number of steps timed so far."""
        return self._steps.count

    @property
    def done(self) -> bool:
        """True once as many steps were timed as the plan requests, and for long enough to count a GPU's energy."""
        planned = self._stages.left or self.in_step
        enough = self.plan.timed is not None and self.timed >= self.plan.timed
        return enough and not planned and not self._steps.window_is_short

    @property
    def tokens(self) -> tuple[Tensor | int, int] | None:
        """Tokens of the step's batches so far, without and with padding; None if a batch does not tell them."""
        return self._tokens.counts

    @property
    def in_step(self) -> bool:
        """True between the begin and the end of a step."""
        return self._stage is not None

    def begin_step(self, batch: Any = None) -> None:
        """Begin the next optimizer step, with this batch.

        Only one torch.profiler can run. If another one does when this one's is due, the step is not instrumented, nor
        are those that would belong to it, and a note says so.
        """
        stage = self._stages.take(self._examined.under_way or self._kernels is not None)
        self._positions, self._begun = count_positions(batch), self._begun + 1
        self._tokens = Tokens()
        self._tokens.add(count_tokens(batch))
        if stage == "timed" and self._is_worse():
            stage = "examined"
            self._steps.close()
        self._stage = stage
        due = stage == "timed" and self._profiled and self._ceilings.due
        if due and self._stages.affords(CEILING) and not self._steps.window_is_short:  # measuring ends the window
            self._measure_ceilings()
        self._enter_phase(TRAINING if stage in ("warm-up", "timed") else EXAMINATION)
        if stage == "lead-in":
            self._examined.lead_in()
        elif stage == "examined":
            self._examined.begin(batch)
        elif stage == "kernels" and self._kernels is None:
            kernels = KernelProfile(self.device, None if self.plan.trace is None else Path(self.plan.trace))
            kernels.start()
            self._kernels = kernels
        elif stage == "timed":
            self._steps.begin()

    def add_batch(self, batch: Any) -> None:
        """Note a further batch of the step that was begun last, which accumulates its gradients.

        If it is clearly longer than all that were examined, the rest of the step is examined, and not timed.
        """
        self._positions = largest(self._positions, count_positions(batch))
        self._tokens.add(count_tokens(batch))
        if self._stage == "timed" and self.plan.turns is None and self._is_worse():
            self._steps.close()
            self._stage = "examined"
            self._enter_phase(EXAMINATION)
            self._examined.begin(batch)

    def _is_worse(self) -> bool:
        """Return whether the step is to be examined, since its largest batch decides the peak of those so far."""
        if not self._examined.outgrown_by(self._positions) or not self._stages.allows_longer():
            return False
        return self.plan.examine is True or self._stages.affords(MEMORY)

    def end_step(self, tokens: tuple[Tensor | int, int] | None = None) -> None:
        """End the step that was begun last. `tokens`: as in `step`."""
        stage, self._stage = self._stage, None
        tokens = self.tokens if tokens is None else tokens
        padded = None if tokens is None else int(tokens[1])
        positions = padded if self._positions is None else self._positions
        self._most = max(self._most or 0, positions or 0) or None
        if stage in ("warm-up", "timed"):
            self._plain.positions = max(self._plain.positions or 0, positions or 0) or None
        if stage == "timed":
            self._steps.end(tokens)
        elif stage == "examined":
            self._examined.end(self._begun, positions, padded)
        elif stage == "lead-in":
            self._examined.end_lead_in(positions)
        elif stage == "kernels":
            self._kernel_steps += 1
            if not self._stages.left:
                self._stop_kernels()
        elif stage == INTERRUPTED:
            self._interrupted += 1

    def pause(self) -> None:
        """End the current window of timed steps: evaluation or saving follows.

        Instrumented steps belong together. If the pause falls between or within them, they are scheduled anew. A timed
        step that is interrupted does not count.
        """
        self._enter_phase(None)
        self._steps.close()
        if self._steps.growth.unsettled:
            with self.phases(EXAMINATION):
                self._steps.growth.settle()
        if self._kernel_steps and not self._profiled and not self.in_step:
            self._stop_kernels()  # whole steps were profiled, if fewer than planned: they are a result
        self._stages.retry(self._remove_instruments())
        if self.in_step:
            self._stage = INTERRUPTED

    def resume(self) -> None:
        """Continue after a pause. If it interrupted a step, the rest of that step is in the training phase."""
        if self.in_step:
            self._enter_phase(TRAINING)

    def abort(self) -> None:
        """Remove the instruments after a step failed, and instrument no further step."""
        self._remove_instruments()
        self._stage = None
        self._stages.clear()
        self.pause()

    def close(self) -> None:
        """End the loop and stop sampling the device."""
        self.pause()
        self._stage = None
        self._steps.growth.end()
        if self.nvml is not None:
            self.nvml.stop()

    # ---- phases and instruments

    def _measure_ceilings(self) -> None:
        """Measure the device's ceilings between two steps, in a phase of its own and unseen by the driver's sampler."""
        self._steps.close()
        self._enter_phase(CEILINGS)
        with self.nvml.paused() if self.nvml is not None else nullcontext():
            self._ceilings.measure()

    def _enter_phase(self, phase: str | None) -> None:
        """Change the phase of the loop, which also covers the time between steps; None is no phase."""
        if self._phase == phase:
            return
        if self._phase in (EXAMINATION, CEILINGS):
            free_heap()  # the instruments' memory must not be in the resident peak of the phases that follow
        if self._phase is not None:
            self._plain.end(self.phases.end(self._phase).peak_rss)
        if phase == TRAINING:
            if self._phase is None and not self._plain.begun and self._witnesses:
                with self.phases(EXAMINATION):
                    free_heap()  # what came before the first step has freed is not the steps'
            self._plain.begin(self.phases.memory.current())
        if phase is not None:
            self.phases.begin(phase)
        self._phase = phase

    @property
    def _witnesses(self) -> bool:
        """True if the process is the third witness of the memory: on a CPU, where a step is to be examined."""
        return self.device.type == "cpu" and self.plan.examine is not False

    def _remove_instruments(self) -> list[Stage]:
        """Remove instruments that have no result yet, and return the stages that must be repeated for one."""
        if self._examined.under_way:
            self._examined.drop()
            if not self._examined.done:
                return ["lead-in", "examined"]
            self._stages.count_longer()
            return []
        if self._kernels is not None and not self._profiled:
            self._kernels.close()
            self._kernels, self._kernel_steps = None, 0
            return self.plan.kernel_stages
        return []

    def _stop_kernels(self) -> None:
        assert self._kernels is not None
        self._kernels.stop(self._kernel_steps)
        self._stages.remove("kernels")
        self._profiled = True

    # ---- results

    def throughput(self) -> Throughput | None:
        """Return tokens, seconds and FLOPs of the timed steps; None if there were none."""
        return self._steps.throughput(self._examined.ops, self._examined.tokens)

    def memory(self) -> Memory:
        """Return the resident peak outside the instrumented phases, and the memory of the examined step."""
        phases = [phase.peak_rss for phase in self.phases.to_list() if phase.name not in INSTRUMENTED_PHASES]
        peak = max((size for size in phases if size is not None), default=None)
        growth = self._steps.growth.per_step()
        found = Memory(peak, self.phases.memory.method, growth=growth, most_positions=self._most)
        if growth:
            with self.phases(EXAMINATION):
                found = replace(found, keeper=self._steps.growth.keeper())
        return self._examined.add_to(found, self._plain)

    def kernels(self) -> Kernels | None:
        """Return the time of the profiled steps by kernel; None if there were none. Measures the device's ceilings."""
        if self._kernels is None or not self._profiled:
            return None
        with self.phases(CEILINGS):
            self._ceilings.measure()
        best = self._ceilings.best
        try:
            if best is None:
                raise RuntimeError(self._ceilings.failure)
            with self.phases(EXAMINATION):
                found = self._kernels.kernels(self._examined.ops, best, self.dtype)
        except RuntimeError as error:
            # CUPTI needs a right that containers often lack, and the ceilings need 768 MiB that may be taken. Neither
            # may cost the rest of the record.
            self.notes.append(f"Kernels have no figures: {str(error).strip().splitlines()[0]}")
            return None
        measured = self._ceilings.found
        return replace(
            found, flops_measured=[one.flops for one in measured], bytes_measured=[one.bytes for one in measured]
        )

    def results(self, failed: bool = False) -> dict[str, Any]:
        """Return all measurements as fields of a `RunRecord`.

        Args:
            failed: The run failed, and nothing may run on the device again: after an OOM, the ceilings would fail too.
        """
        kernels = None if failed else self.kernels()  # first: its time is in the phases
        return {
            "device": describe_device(self.device),
            "seconds": self.phases.elapsed,
            "phases": self.phases.to_list(),
            "ledger": ledger(self.model, self.optimizer, self.state()),
            "memory": self.memory(),
            "throughput": self.throughput(),
            "driver": self.nvml.result() if self.nvml is not None else None,
            "kernels": kernels,
            "notes": [*self.notes, *self._further_notes()],
        }

    def _further_notes(self) -> Iterator[str]:
        yield from self._steps.notes(self._examined.ops, self._examined.tokens)
        yield from self._examined.notes()
        if self.nvml is not None:
            yield from self.nvml.notes
        if self._interrupted:
            yield f"Steps not measured, since evaluation or saving interrupted them: {self._interrupted}."

    def record(self, name: str, **fields: Any) -> RunRecord:
        """Return the record of the loop. `fields` are added to the measurements, and override them."""
        versions = {"python": platform.python_version(), "torch": version("torch")}
        return RunRecord(name=name, **{"versions": versions, **self.results(), **fields})
