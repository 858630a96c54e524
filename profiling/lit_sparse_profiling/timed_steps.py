"""The timed steps of a run: their seconds, their tokens, and the device's energy."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from torch import Tensor

from lit_sparse_profiling.nvml import NVML
from lit_sparse_profiling.opcounts import OpCounts
from lit_sparse_profiling.paired import Turns
from lit_sparse_profiling.speed_sections import Throughput
from lit_sparse_profiling.stopwatch import NO_TOKENS, Stopwatch, Tokens
from lit_sparse_profiling.witness import Growth


class TimedSteps:
    """Times steps in windows, which `close` ends.

    A step is what comes between `begin` and `end`: from its batch at hand to the end of the optimizer's step, without
    loading data, logging and callbacks, and the same if it is interleaved with another run's. What comes between the
    steps of a window is kept beside.

    Args:
        device: Device of the steps.
        nvml: Sampler whose energy windows are the timed ones.
        turns: Pipes of a bench that interleaves the steps with those of another run.

    Attributes:
        count: Number of steps timed so far.
        growth: Memory in use at their ends.
    """

    def __init__(self, device: torch.device, nvml: NVML | None, turns: Turns | None) -> None:
        self.count = 0
        self._device, self._turns = device, turns
        # In turns a window is a step, too short for the counter, and the other run's energy is in it.
        self._nvml = nvml if turns is None else None
        self._watch, self._tokens = Stopwatch(device), Tokens()
        self._is_step: list[bool] = []  # of each time of the watch, in order; the others are between steps
        self._positions: list[int | None] = []
        self.growth = Growth(device)

    def begin(self) -> None:
        """Begin a step, and a window if none is open."""
        if self._turns is not None:
            self._turns.wait()  # before the stamp: waiting is not this run's time
        if self._watch.running:
            self._stamp(is_step=False)
            return
        if self._nvml is not None:
            torch.cuda.synchronize(self._device)  # else the energy of steps before would be in the window
            self._nvml.begin_window()
        self._watch.stamp()

    def end(self, tokens: tuple[Tensor | int, int] | None) -> None:
        """End the step; `tokens` as in `Profiler.end_step`."""
        self._tokens.add(tokens)
        self._positions.append(None if tokens is None else int(tokens[1]))
        self._stamp(is_step=True)
        self.count += 1
        self.growth.sample()
        if self._turns is not None:
            # A window per step: the other run's step comes next, and its time must not be in this run's window.
            self.close()
            self._turns.report(self._watch.seconds[-1])

    def _stamp(self, is_step: bool) -> None:
        self._is_step.append(is_step)
        self._watch.stamp()

    def _seconds(self, is_step: bool) -> list[float]:
        """Return the seconds of each step in closed windows, or of each time between two."""
        times = zip(self._watch.seconds, self._is_step, strict=False)  # those of an open window are not known yet
        return [seconds for seconds, one in times if one is is_step]

    @property
    def window_is_short(self) -> bool:
        """True while the open window is too short for the device's energy, if that is counted."""
        return self._nvml is not None and self._watch.running and self._nvml.window_is_short

    def close(self) -> None:
        """End the window; do nothing if none is open."""
        if self._watch.running:
            self._watch.close()
            if self._nvml is not None:
                self._nvml.end_window()

    def throughput(self, ops: OpCounts | None, examined: int | None) -> Throughput | None:
        """Return tokens and seconds; None if no step was timed.

        Args:
            ops: Count of the examined step's ops.
            examined: Token positions of the examined step; None if unknown.
        """
        seconds = self._seconds(is_step=True)
        if not seconds:
            return None
        counts = self._tokens.read()
        found = Throughput(
            tokens=None if counts is None else counts[0],
            padded_tokens=None if counts is None else counts[1],
            seconds=sum(seconds),
            steps=len(seconds),
            median_step=statistics.median(seconds),
            longest_step=max(seconds),
            between=sum(self._seconds(is_step=False)) if self._turns is None else None,
        )
        return found if ops is None else _with_flops(found, ops, self._rate(seconds, examined))

    def _rate(self, seconds: list[float], examined: int | None) -> float | None:
        """Return the median rate in examined steps per second, a step's work going by its token positions."""
        known = self._positions[: len(seconds)]
        if not examined or None in known:
            return None
        rates = [(positions or 0) / examined / taken for positions, taken in zip(known, seconds, strict=True) if taken]
        return statistics.median(rates) if rates else None

    def notes(self, ops: OpCounts | None, examined: int | None) -> list[str]:
        """Return a sentence for each figure that could not be measured."""
        if not self.count:
            return []
        found = [] if self._tokens.read() is not None else [NO_TOKENS]
        if self._turns is not None and self._device.type == "cuda":
            found.append("Energy was not measured: windows of one step, between another run's, are too short for it.")
        if ops is not None and ops.flops and self._rate(self._seconds(is_step=True), examined) is None:
            found.append("The FLOPs of the examined step stand for those of all: without tokens, nothing scales them.")
        return found


def _with_flops(found: Throughput, ops: OpCounts, rate: float | None) -> Throughput:
    return replace(
        found,
        flops=ops.flops,
        recomputed=ops.recomputed,
        masked=ops.masked,
        masked_recomputed=ops.masked_recomputed,
        uncounted=ops.uncounted,
        steps_per_second=rate,
    )
