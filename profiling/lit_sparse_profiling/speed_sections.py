"""The sections of a run's record on time: kernels, throughput, ranks, and pairs of runs.

Sizes are bytes and times are seconds. A figure that was not measured is None, never 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Kernel:
    """One kernel of a profiled step (on a CPU: one op). All figures are per step.

    Attributes:
        op: The op that launched the kernel; on a CPU, the op itself.
        calls: Calls per step.
        seconds: Time on the device; on a CPU, the op's own time without the ops that it calls.
        flops: Floating-point operations, computed from shapes; None where no formula is known.
        bytes: Bytes of the op's inputs and outputs, each counted once; None where they were not seen.
        ours: True for a kernel or op of this project.

    Raises:
        ValueError: if a figure is negative or not finite.
    """

    name: str
    op: str
    calls: float
    seconds: float
    flops: float | None = None
    bytes: float | None = None
    ours: bool = False

    def __post_init__(self) -> None:
        for name in ("calls", "seconds", "flops", "bytes"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"`{name}` of a kernel is {getattr(self, name)}; it must be finite and not negative.")


@dataclass(frozen=True)
class Kernels:
    """Time of a step by kernel.

    Attributes:
        steps: Number of profiled steps.
        seconds: Wall time of a profiled step. The profiler slows steps down, so that it is above a timed step's.
        gaps: Fraction of `seconds` in which the device ran no kernel. On a CPU: in which no op ran, Python's share.
        dtype: Dtype of the matrix product behind `flops_ceiling`.
        flops_ceiling: FLOP/s of a large matrix product on this device, measured in the same run.
        bytes_ceiling: Bytes/s, read plus written, of a large copy, measured in the same run.
        flops_measured: All measurements of which `flops_ceiling` is the highest, in order; they are made before,
            between and after the timed steps. Empty in records of before they were kept.
        bytes_measured: Likewise.
        count: Number of distinct kernels.
        top: The slowest kernels, slowest first.
        trace: File of the Chrome trace, if one was requested.

    Raises:
        ValueError: if the seconds or a ceiling, by which others are divided, is not positive and finite.
    """

    steps: int
    seconds: float
    gaps: float
    dtype: str
    flops_ceiling: float
    bytes_ceiling: float
    count: int
    top: list[Kernel]
    trace: str | None = None
    flops_measured: list[float] = field(default_factory=list)
    bytes_measured: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("seconds", "flops_ceiling", "bytes_ceiling"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` of kernels is {getattr(self, name)}; it must be finite and above 0.")

    def share(self, kernel: Kernel) -> float:
        """Return the kernel's fraction of the step, 0 to 1."""
        return kernel.seconds / self.seconds

    def achieved(self, kernel: Kernel) -> tuple[float, Literal["FLOP/s", "B/s"]] | None:
        """Return the larger of the fractions of both ceilings that the kernel achieves, and the unit of that ceiling.

        The result is None if neither FLOPs nor bytes were counted. The larger fraction names the bound: a kernel at
        80 % of the copy rate is limited by memory, whatever its FLOP/s.
        """
        rates: list[tuple[float, Literal["FLOP/s", "B/s"]]] = []
        if kernel.flops and kernel.seconds:
            rates.append((kernel.flops / kernel.seconds / self.flops_ceiling, "FLOP/s"))
        if kernel.bytes and kernel.seconds:
            rates.append((kernel.bytes / kernel.seconds / self.bytes_ceiling, "B/s"))
        return max(rates, default=None)


@dataclass(frozen=True)
class Throughput:
    """Tokens and seconds of the timed steps.

    Attributes:
        tokens: Tokens without padding; None if a batch does not reveal them.
        padded_tokens: Token positions, padding included; None likewise.
        seconds: Total time of the timed steps, each from its batch at hand to the end of the optimizer's step.
        steps: Number of timed steps, without warm-up and examined steps.
        median_step: Median seconds of a step.
        longest_step: Longest seconds of a step.
        flops: Floating-point operations executed in the examined step, with recomputation, every query of an attention
            with every key.
        recomputed: Those of `flops` that activation checkpointing executes a second time.
        masked: Those of `flops` that are the masked half of causal attention, recomputed ones not included.
        masked_recomputed: Likewise, those that are recomputed.
        uncounted: Calls of ops that multiply matrices and for which no formula is known, by name: `flops` lacks them.
        steps_per_second: Median rate of the timed steps, where a step counts as the fraction of the examined step that
            its token positions, padding included, are of that step's. None without a count of tokens.
        between: Time between the timed steps, which is in no other figure: loading of data, logging, callbacks. None if
            they were interleaved with another run's, and in records of before it was kept apart from `seconds`.

    Raises:
        ValueError: if `seconds` or `steps` is not positive, or if `padded_tokens` is below `tokens`.
    """

    tokens: int | None
    padded_tokens: int | None
    seconds: float
    steps: int
    median_step: float | None = None
    longest_step: float | None = None
    flops: int | None = None
    recomputed: int = 0
    masked: int = 0
    masked_recomputed: int = 0
    uncounted: dict[str, int] = field(default_factory=dict)
    steps_per_second: float | None = None
    between: float | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.steps < 1:  # not `<= 0`: a NaN must be refused too
            raise ValueError(
                f"A throughput needs timed steps, but `seconds` is {self.seconds} and `steps` is {self.steps}; time at "
                "least one step."
            )
        if (self.padded_tokens or 0) < (self.tokens or 0):
            raise ValueError(
                f"`padded_tokens` is {self.padded_tokens}, but it must be at least `tokens`, {self.tokens}: it counts "
                "every position, padding included."
            )

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second, without padding."""
        return None if self.tokens is None else self.tokens / self.seconds

    @property
    def flops_per_second(self) -> float | None:
        """FLOP/s of the median timed step, with recomputation and attention in full; None if not counted."""
        if not self.flops:
            return None
        # The median: one step that waits for a worker or a checkpoint must not change the figure.
        return self.flops * (self.steps_per_second or 1 / (self.median_step or self.seconds / self.steps))

    @property
    def padded_tokens_per_second(self) -> float | None:
        """Token positions per second, padding included."""
        return None if self.padded_tokens is None else self.padded_tokens / self.seconds


@dataclass(frozen=True)
class Rank:
    """Measurements of one rank of a run on several ranks.

    Attributes:
        rank: Its number.
        tokens: Its tokens without padding; None if unknown.
        padded_tokens: Its token positions; None likewise.
        seconds: Total time of its timed steps.
        joules: Energy of its device over its timed windows.
        device: UUID of its GPU: ranks on one device have the same joules.
        peak_memory: Its peak, reserved on a GPU, resident on a CPU.
    """

    rank: int
    tokens: int | None = None
    padded_tokens: int | None = None
    seconds: float | None = None
    joules: float | None = None
    device: str | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class Pair:
    """Ratio of this run's step time to that of another run, whose steps were interleaved with its own.

    Attributes:
        against: Name of the other run.
        median: Median ratio of the rounds.
        low: Lower end of the median's 95 % bootstrap interval.
        high: Upper end of that interval.
        highest: Highest ratio of any round.
        rounds: Number of rounds.
        seconds: Step times of this run and of the other in each round; empty in records of before they were kept.
    """

    against: str
    median: float
    low: float
    high: float
    highest: float
    rounds: int
    seconds: list[list[float]] = field(default_factory=list)
