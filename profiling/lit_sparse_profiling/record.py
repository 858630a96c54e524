"""What one run took and gave, as one JSON document: the only thing that reports, tables and comparisons read.

Sizes are bytes, times are seconds. What was not measured is None, never 0.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from lit_sparse_profiling.documents import finite, typed

SCHEMA = 1
"""Raised when a record of the version before can no longer be read; a new field with a default does not raise it."""

Status = Literal["ok", "oom", "refused", "failed"]


@dataclass(frozen=True)
class Device:
    """Where the run took place: `kind` is "cpu" or "cuda", `memory` what the device has."""

    kind: str
    name: str
    cores: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class ModelSize:
    """The model trained: its `base` (a name or folder), and how many of its `parameters` are `trainable`."""

    base: str
    parameters: int
    trainable: int

    @property
    def trainable_share(self) -> float:
        """Trainable parameters as a share of all, 0 to 1."""
        return self.trainable / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Phase:
    """All calls of one phase: their `seconds` together, and the highest peaks of any (a phase has its inner ones').

    Attributes:
        peak_rss: Resident memory of the process; how it was measured stands in the record's `memory.method`.
        peak_requested: What had been asked for of the CUDA allocator and not given back.
        peak_allocated: The same as it rounds them.
        peak_reserved: What the CUDA allocator had taken from the driver.
    """

    name: str
    seconds: float
    calls: int
    peak_rss: int | None = None
    peak_requested: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None


@dataclass(frozen=True)
class Ledger:
    """Exact bytes of the storages a training state holds; each storage counts in one category only."""

    trainable: int = 0
    frozen: int = 0
    buffers: int = 0
    gradients: int = 0
    optimizer: int = 0
    strategy: int = 0

    @property
    def total(self) -> int:
        """All categories together."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Held:
    """What a training step held at the moment when it held most, counted storage by storage in an untimed step.

    Each storage counts in one category only.

    Attributes:
        ledger: Weights, buffers, gradients and states, as far as they were there at that moment.
        batch: The step's inputs.
        saved: What autograd had saved for backward and is none of the above.
        temporaries: Other outputs of operations that were alive.
        phase: Where in the step that was: forward, backward, optimizer step, or else in its course.
    """

    ledger: Ledger
    batch: int
    saved: int
    temporaries: int
    phase: str

    @property
    def total(self) -> int:
        """All categories together."""
        return self.ledger.total + self.batch + self.saved + self.temporaries


@dataclass(frozen=True)
class Allocator:
    """What torch's allocator said of the same step.

    Attributes:
        method: Which allocator, and how it was read.
        requested: Most bytes that were asked for and not given back yet.
        allocated: The same as the allocator rounds them; None on a CPU, which does not.
        reserved: Most that it had taken from the driver.
        inactive_split: Free rests of segments in use after the step, which only requests as small can use.
        left_behind: Bytes that the step left allocated beyond the change of the ledger.
        retries: Times in the run that the cache was flushed since nothing in it fitted.
    """

    method: str
    requested: int
    left_behind: int
    allocated: int | None = None
    reserved: int | None = None
    inactive_split: int | None = None
    retries: int = 0


@dataclass(frozen=True)
class Memory:
    """The run's peaks: resident memory of the process, `method` saying how it was read, and what a step held.

    Attributes:
        saved_for_backward: The most that autograd had saved at one time in the examined step.
    """

    peak_resident: int | None
    method: str
    saved_for_backward: int | None = None
    held: Held | None = None
    allocator: Allocator | None = None


@dataclass(frozen=True)
class Pair:
    """Step times of this run over those of another, whose steps took turns with its own.

    Attributes:
        against: Name of the other.
        median: Of the rounds' ratios; `low` to `high` is its 95 % bootstrap interval, `highest` the worst round.
        seconds: Step times of this run and of the other in each round; empty in records before they were kept.
    """

    against: str
    median: float
    low: float
    high: float
    highest: float
    rounds: int
    seconds: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class StateBytes:
    """What the optimizer and the strategies kept at one step of a training whose trainable set changes.

    Attributes:
        step: The optimizer step (from 1) after which that was: the first after a change, by when all that trains has
            its state, or the one that a fit was resumed after.
        optimizer: Bytes of the optimizer's state; `strategy` of the strategies', wherever they keep it.
    """

    step: int
    optimizer: int
    strategy: int


Attribution = Literal["own pid", "only process", "device delta"]


@dataclass(frozen=True)
class Driver:
    """What NVML said of the device while the run used it.

    Attributes:
        device: Name of the device; `uuid` is its own or that of the MIG instance, if `mig`.
        memory: Which call told the memory: "v2" (what the driver reserves is apart) or "v1" (it is within `used`).
        attribution: How this process's share was found: by its own pid, as the only process there (a container sees
            other pids than the driver), or as what the device's use rose by.
        used: Most bytes in use on the device, by anyone.
        process: Most bytes that were this process's.
        context: This process's bytes after CUDA began and before the first tensor; None if that was not caught.
        foreign: Most bytes that others held on the device.
        joules: Energy of the device over the run's timed windows; None if it does not count it.
        watts: Mean power over the same windows; `watts_peak` is the highest sample.
        sm_mhz: Median and lowest clock of the multiprocessors among the samples.
        samples: How many samples were taken.
        lost: One sentence, if the device or NVML failed meanwhile: what is above is what was known until then.
    """

    device: str
    uuid: str
    driver: str
    mig: bool
    memory: Literal["v2", "v1"]
    attribution: Attribution
    used: int
    process: int
    context: int | None
    foreign: int
    samples: int
    joules: float | None = None
    watts: float | None = None
    watts_peak: float | None = None
    sm_mhz: list[float] = field(default_factory=list)
    lost: str | None = None


@dataclass(frozen=True)
class Kernel:
    """One kernel of a profiled step (on a CPU: one op). All figures are of one step.

    Attributes:
        op: The op that launched it; on a CPU, the op itself.
        seconds: On the device; on a CPU the op's own, without those that it calls.
        flops: Counted from shapes; None where there is no count.
        bytes: Of the op's inputs and outputs, each once; None where they were not seen.
        ours: Whether it is a kernel or op of this project.
    """

    name: str
    op: str
    calls: float
    seconds: float
    flops: float | None = None
    bytes: float | None = None
    ours: bool = False


@dataclass(frozen=True)
class Kernels:
    """Where the time of a step goes.

    Attributes:
        steps: Steps profiled.
        seconds: Of a profiled step, from begin to end.
        gaps: Share of it in which the device ran no kernel (on a CPU: in which no op ran, which is Python's share).
        flops_ceiling: FLOP/s of a large matrix product in `dtype` on this device, measured in the same run.
        bytes_ceiling: Bytes/s, read and written, of a large copy.
        top: Those that take longest, longest first; `count` is how many there are in all.
        trace: File of the Chrome trace, if one was asked for.
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

    def share(self, kernel: Kernel) -> float:
        """The kernel's share of the step, 0 to 1."""
        return kernel.seconds / self.seconds

    def achieved(self, kernel: Kernel) -> tuple[float, Literal["FLOP/s", "B/s"]] | None:
        """The share of that ceiling that the kernel comes nearer to, and which it is; None if nothing was counted."""
        rates: list[tuple[float, Literal["FLOP/s", "B/s"]]] = []
        if kernel.flops and kernel.seconds:
            rates.append((kernel.flops / kernel.seconds / self.flops_ceiling, "FLOP/s"))
        if kernel.bytes and kernel.seconds:
            rates.append((kernel.bytes / kernel.seconds / self.bytes_ceiling, "B/s"))
        return max(rates, default=None)


@dataclass(frozen=True)
class Throughput:
    """What the timed steps worked through.

    Attributes:
        tokens: Without padding, `padded_tokens` with it; None where the batches do not tell.
        seconds: Of all timed steps together.
        steps: How many were timed: neither those of warm-up nor examined ones.
        median_step: Median seconds of a step; `longest_step` is the longest.
        flops: Floating-point operations executed in one (counted) step, recomputation included.

    Raises:
        ValueError: if no time passed, or if there are fewer tokens with padding than without.
    """

    tokens: int | None
    padded_tokens: int | None
    seconds: float
    steps: int
    median_step: float | None = None
    longest_step: float | None = None
    flops: int | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"A throughput needs timed steps, but {self.seconds} seconds were given.")
        if (self.padded_tokens or 0) < (self.tokens or 0):
            raise ValueError(f"{self.padded_tokens} tokens with padding are fewer than the {self.tokens} without.")

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second, padding not counted."""
        return None if self.tokens is None else self.tokens / self.seconds

    @property
    def padded_tokens_per_second(self) -> float | None:
        """Token positions computed a second, padding included."""
        return None if self.padded_tokens is None else self.padded_tokens / self.seconds


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run. Only the name is needed: a run refused before it began has a record too.

    Attributes:
        status: How it ended; out of memory is a result.
        reason: One sentence that says why `status` is not "ok"; None if it is.
        created: When, in ISO form.
        versions: Package name to version.
        updates: One `{"class": ..., "fields": {...}}` an update strategy.
        settings: What else defines the run: batch size, length, precision, seed.
        states: Optimizer and strategy state from change to change of the trainable set; empty where it never changes.
        outcome: Metrics by moment: `{"before": {"loss": ...}, "after": {"loss": ...}}`.
        samples: Texts generated, or whatever else is to be shown.
        notes: What could not be measured, a sentence each.

    Raises:
        ValueError: if the status and the reason contradict each other.
    """

    schema: int = SCHEMA
    name: str
    status: Status = "ok"
    reason: str | None = None
    created: str = field(default_factory=_now)
    versions: dict[str, str] = field(default_factory=dict)
    device: Device | None = None
    model: ModelSize | None = None
    updates: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    ledger: Ledger | None = None
    memory: Memory | None = None
    throughput: Throughput | None = None
    pair: Pair | None = None
    driver: Driver | None = None
    kernels: Kernels | None = None
    states: list[StateBytes] = field(default_factory=list)
    outcome: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (self.status == "ok") != (self.reason is None):
            raise ValueError(f'Status {self.status!r} and reason {self.reason!r}: just what is not "ok" has a reason.')

    @property
    def utilization(self) -> float | None:
        """FLOP/s of the timed steps as a share of the device's measured matrix-product rate; None if not measured."""
        if self.throughput is None or self.kernels is None or not self.throughput.flops:
            return None
        seconds = self.throughput.median_step or self.throughput.seconds / self.throughput.steps
        return self.throughput.flops / seconds / self.kernels.flops_ceiling

    def write(self, path: str | Path) -> None:
        """Write the record to `path` at one stroke: a reader sees the old document or the new one, never a half.

        JSON has no number for them, so that NaN and infinities are written as "NaN", "Infinity" and "-Infinity".

        Raises:
            TypeError: if a value is none that JSON has (a tensor, a path); nothing is written then.
            ValueError: if a field holds what `read` would refuse; nothing is written then.
        """
        document = json.dumps(finite(asdict(self)), indent=1, allow_nan=False) + "\n"
        typed(json.loads(document), type(self), "record")
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")  # same folder: a rename across file systems is a copy
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(document)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The record in the file `path`.

        Raises:
            ValueError: if the file is no whole record of this schema; the sentence names file, finding and way out.
            FileNotFoundError: if there is no such file.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a whole JSON document ({error}); make the run again.") from error
        if not isinstance(document, dict) or "schema" not in document:
            raise ValueError(f"{path} is JSON but no run record (it has no schema); give a run's record.json.")
        if document["schema"] != SCHEMA:
            raise ValueError(
                f"{path} is a record of schema {document['schema']}, and this version reads schema {SCHEMA}; "
                "read it with the version that wrote it, or make the run again."
            )
        try:
            return typed(document, cls, "record")
        except ValueError as error:
            raise ValueError(f"{path} is no valid run record: {error}; correct it, or make the run again.") from error
