"""Two runs whose timed steps take turns: what slows the machine meets both, and their ratio holds where times drift.

The process of a run is started with `--profile.turns=READ,WRITE`, two file descriptors. It says READY before each timed
step and waits; told to GO it does the step and says how many seconds it took.
"""

from __future__ import annotations

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

from lit_sparse_profiling.record import Pair

READY, GO = b"r", b"g"
SECONDS = struct.Struct("d")
DEPENDENT = 0.3
"""Size of the lag-1 autocorrelation of the rounds' ratios above which it is reported."""
LOOK = 0.2
"""Seconds between two looks at a process that is waited for."""


class Turns:
    """The side of the run: `wait` before a timed step, `done` after it.

    Args:
        descriptors: "READ,WRITE": where the word to go comes from, and where seconds go to.

    Raises:
        ValueError: if that is not how two file descriptors are written.
    """

    def __init__(self, descriptors: str) -> None:
        parts = descriptors.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"profile.turns is {descriptors!r}; it must be two file descriptors, as in 5,6.")
        self._read, self._write = map(int, parts)

    def wait(self) -> None:
        """Until it is this run's turn.

        Raises:
            RuntimeError: if who gives the turns is gone.
        """
        os.write(self._write, READY)
        if os.read(self._read, 1) != GO:
            raise RuntimeError("the bench that gave this run its turns has ended.")

    def done(self, seconds: float) -> None:
        """The step is over and took so long."""
        os.write(self._write, SECONDS.pack(seconds))


class Player:
    """The bench's side of one of the two processes."""

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
        os.close(reads)
        os.close(writes)

    def ready(self, deadline: float | None, tick: Callable[[], None]) -> bool:
        """Wait until it stands before a timed step; False if it has ended, or is late."""
        return self._read(len(READY), deadline, tick) == READY

    def step(self, deadline: float | None, tick: Callable[[], None]) -> float | None:
        """Seconds of its next step; None if it ended, or is late."""
        os.write(self._go, GO)
        answer = self._read(SECONDS.size, deadline, tick)
        return SECONDS.unpack(answer)[0] if len(answer) == SECONDS.size else None

    def _read(self, size: int, deadline: float | None, tick: Callable[[], None]) -> bytes:
        while not select.select([self._answers], [], [], LOOK)[0]:
            tick()
            if deadline is not None and time.monotonic() > deadline:
                return b""
        return os.read(self._answers, size)

    def end(self, deadline: float | None, tick: Callable[[], None]) -> int | None:
        """Its exit status, once it ended by itself; None if it is late. A process that waits for its turn gets none."""
        os.close(self._go)
        os.close(self._answers)
        try:
            while self.process.poll() is None:
                if deadline is not None and time.monotonic() > deadline:
                    return None
                tick()
                time.sleep(LOOK)
            return self.process.returncode
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


def play(
    first: Player, second: Callable[[], Player], deadline: float | None, tick: Callable[[], None]
) -> list[tuple[float, float]]:
    """Seconds of both in each round, until one of them has no more steps. Who begins alternates.

    `second` is started when the first stands before its first timed step: until there each has the machine for itself.
    If the second does not come so far, the first does its steps alone, and there are no rounds.
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


def rounds_of(players: Sequence[Player], deadline: float | None, tick: Callable[[], None]) -> list[tuple[float, ...]]:
    """Return the seconds of all in each round, until one has no more steps; all must be ready for their first one."""
    out: list[tuple[float, ...]] = []
    while True:
        begins = len(out) % len(players)
        seconds: dict[Player, float | None] = {}
        rested: list[bool] = []
        for player in (*players[begins:], *players[:begins]):
            seconds[player] = player.step(deadline, tick)
            # Callbacks, logging and data loading follow a step: they would slow the next run's step.
            rested.append(player.ready(deadline, tick))
        round_ = tuple(taken for player in players if (taken := seconds[player]) is not None)
        if len(round_) < len(players):
            return out
        out.append(round_)
        if not all(rested):
            return out


def pair_of(against: str, seconds: Sequence[tuple[float, float]]) -> Pair:
    """The comparison that these rounds make: how many times the second's seconds the first takes.

    Raises:
        ValueError: if there are no rounds.
    """
    if not seconds:
        raise ValueError(f"there are no rounds to compare with {against}.")
    ratios = [one / two for one, two in seconds]
    low, high = interval(ratios)
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
    if abs(found) <= DEPENDENT:
        return None
    return (
        f"The rounds against {pair.against} depend on each other (lag-1 autocorrelation {found:.2f}, above "
        f"{DEPENDENT} in size): the interval of their ratio is too narrow or biased; repeat with more rounds."
    )


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[round(0.025 * (draws - 1))], medians[round(0.975 * (draws - 1))]
