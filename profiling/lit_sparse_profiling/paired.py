"""Two runs with interleaved timed steps: whatever slows the machine slows both, so that the ratio of times is stable.

Each run is a process started with `--profile.turns=READ,WRITE`, two file descriptors. It writes READY before each timed
step and waits. On GO, it runs the step and writes its seconds.
"""

from __future__ import annotations

import math
import os
import random
import select
import statistics
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lit_sparse_profiling.speed_sections import Pair

READY, GO = b"r", b"g"
SECONDS = struct.Struct("d")
DEPENDENT, UNLIKELY = 0.3, 1.64
"""Size of the lag-1 autocorrelation of the rounds' ratios above which it is reported: at least, and in standard
deviations of that of independent rounds, 1 over the root of their number."""
POLL_SECONDS = 0.2
"""Seconds between two polls of a process."""


class Turns:
    """The run's end of the pipes: `wait` before each timed step, `report` after it.

    Args:
        descriptors: "READ,WRITE", the file descriptors from which GO is read and to which seconds are written.

    Raises:
        ValueError: if `descriptors` is not two numbers.
    """

    def __init__(self, descriptors: str) -> None:
        parts = descriptors.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"profile.turns is {descriptors!r}; it must be two file descriptors, as in 5,6.")
        self._read, self._write = map(int, parts)

    def wait(self) -> None:
        """Block until it is this run's turn.

        Raises:
            RuntimeError: if the bench has ended.
        """
        os.write(self._write, READY)
        if os.read(self._read, 1) != GO:
            raise RuntimeError("The bench that interleaves this run has ended; start the bench again.")

    def report(self, seconds: float) -> None:
        """Report the seconds of the step that has ended."""
        os.write(self._write, SECONDS.pack(seconds))


class PairedRun:
    """The bench's end of the pipes of one of the two processes.

    Args:
        command: Command of the run, to which `--profile.turns` is appended.
        log: File for its output.
        popen: Further arguments of `subprocess.Popen`.
    """

    def __init__(self, command: Sequence[str], log: Path, **popen: Any) -> None:
        reads, self._go = os.pipe()
        self._answers, writes = os.pipe()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, f"--profile.turns={reads},{writes}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(reads, writes),
                **popen,
            )
        # Close our copies of the child's ends: `os.read` sees the child's death only if nobody else can write.
        os.close(reads)
        os.close(writes)

    def ready(self, deadline: float | None, tick: Callable[[], None]) -> bool:
        """Wait until the process is ready for a timed step; return False if it ends or the deadline passes first."""
        return self._read(len(READY), deadline, tick) == READY

    def step(self, deadline: float | None, tick: Callable[[], None]) -> float | None:
        """Run the next step and return its seconds; None if the process ends or the deadline passes first."""
        try:
            os.write(self._go, GO)
        except BrokenPipeError:  # killed while it waited for its turn, by the OOM killer for example
            return None
        answer = self._read(SECONDS.size, deadline, tick)
        return SECONDS.unpack(answer)[0] if len(answer) == SECONDS.size else None

    def _read(self, size: int, deadline: float | None, tick: Callable[[], None]) -> bytes:
        while not select.select([self._answers], [], [], POLL_SECONDS)[0]:
            tick()
            if deadline is not None and time.monotonic() > deadline:
                return b""
        return os.read(self._answers, size)

    def end(self, deadline: float | None, tick: Callable[[], None]) -> int | None:
        """Wait for the process to end and return its exit status; kill it and return None at the deadline.

        A process that still waits for its turn fails, since its pipe is closed.
        """
        os.close(self._go)
        os.close(self._answers)
        try:
            while self.process.poll() is None:
                if deadline is not None and time.monotonic() > deadline:
                    return None
                tick()
                time.sleep(POLL_SECONDS)
            return self.process.returncode
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


def interleave(
    first: PairedRun, second: Callable[[], PairedRun], deadline: float | None, tick: Callable[[], None]
) -> list[tuple[float, float]]:
    """Run both with interleaved timed steps until one has no more; return the seconds of both in each round.

    `second` is started when the first is ready for its first timed step, so that selection, warm-up and compilation of
    each have the machine to themselves. If the second fails before its first timed step, the first runs its steps alone
    and there are no rounds.

    Args:
        first: A started run.
        second: Starts the other run.
        deadline: Time of `time.monotonic()` at which to give up; None waits for ever.
        tick: Called a few times a second.
    """
    if not first.ready(deadline, tick):
        return []
    other = second()
    try:
        if other.ready(deadline, tick):
            return [(one, two) for one, two in rounds_of((first, other), deadline, tick)]
        while first.step(deadline, tick) is not None and first.ready(deadline, tick):
            pass
        return []
    finally:
        other.end(deadline, tick)


def rounds_of(runs: Sequence[PairedRun], deadline: float | None, tick: Callable[[], None]) -> list[tuple[float, ...]]:
    """Return the seconds of all in each round, until one has no more steps; all must be ready for their first one."""
    out: list[tuple[float, ...]] = []
    while True:
        begins = len(out) % len(runs)
        seconds: dict[PairedRun, float | None] = {}
        rested: list[bool] = []
        for run in (*runs[begins:], *runs[:begins]):
            seconds[run] = run.step(deadline, tick)
            # Callbacks, logging and data loading follow a step: they would slow the next run's step.
            rested.append(run.ready(deadline, tick))
        round_ = tuple(taken for run in runs if (taken := seconds[run]) is not None)
        if len(round_) < len(runs):
            return out
        out.append(round_)
        if not all(rested):
            return out


def compare_rounds(against: str, seconds: Sequence[tuple[float, float]]) -> Pair:
    """Return median, interval and maximum of the ratio of the first run's seconds to the second's.

    Raises:
        ValueError: if there are no rounds.
    """
    if not seconds:
        raise ValueError(f"there are no rounds to compare with {against}.")
    ratios = [one / two for one, two in seconds]
    low, high = bootstrap_interval(ratios)
    rounds = [list(one) for one in seconds]
    return Pair(against, statistics.median(ratios), low, high, max(ratios), len(ratios), rounds)


def autocorrelation(values: Sequence[float]) -> float:
    """Return the lag-1 autocorrelation of `values`; 0 if they are constant or fewer than three."""
    mean = statistics.fmean(values) if values else 0.0
    off = [value - mean for value in values]
    spread = sum(one * one for one in off)
    return sum(one * two for one, two in pairwise(off)) / spread if len(off) > 2 and spread else 0.0


def dependence(pair: Pair) -> str | None:
    """Return a sentence if the rounds' ratios depend on each other, so that the interval is not to be relied on."""
    found = autocorrelation([one / two for one, two in pair.seconds])
    limit = max(DEPENDENT, UNLIKELY / math.sqrt(len(pair.seconds) or 1))
    if abs(found) <= limit:
        return None
    return (
        f"The rounds against {pair.against} depend on each other (lag-1 autocorrelation {found:.2f}, above "
        f"{limit:.2f} in size): the interval of their ratio is too narrow or biased; repeat with more rounds."
    )


def bootstrap_interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median; the random numbers are seeded.

    Of an even number of values, the low median is drawn for the lower end and the high one for the upper. Their mean
    varies less than the median does: with 12 rounds its interval holds the true ratio 92 times in 100, this one 95.
    """
    generator = random.Random(0)
    drawn = [sorted(generator.choices(values, k=len(values))) for _ in range(draws)]
    lows, highs = (sorted(median(one) for one in drawn) for median in (statistics.median_low, statistics.median_high))
    return lows[round(0.025 * (draws - 1))], highs[round(0.975 * (draws - 1))]
