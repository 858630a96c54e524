"""The sections of a run's record but those on time (speed_sections.py): device, model, phases, memory, driver.

Sizes are bytes and times are seconds. A figure that was not measured is None, never 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

EXAMINATION = "examination"
"""Phase of the instrumented steps, in which those below are nested."""
LEAD_IN, EXAMINED = "lead-in step", "examined step"
CEILINGS = "ceilings"
"""Phase in which the device's ceilings are measured: its memory is the profiler's, and no part of the run's peaks."""
PREDICTION = "prediction"
"""Phase of predicting the memory of a fit before its model is loaded."""
SAMPLES = "samples"
"""Phase of answering questions before and after training."""
INSTRUMENTED_PHASES = (PREDICTION, EXAMINATION, CEILINGS, LEAD_IN, EXAMINED, "forward", "backward", "optimizer step")
"""Phases whose time is the profiler's, and whose resident memory includes its instruments."""
CLEARLY_LONGER = 1.05
"""Ratio of token positions from which a batch is worth another examination."""


def is_longer(positions: int | None, than: int | None) -> bool:
    """Return whether a batch is clearly longer than another, by their token positions; False if one is unknown."""
    return positions is not None and than is not None and positions > CLEARLY_LONGER * than


@dataclass(frozen=True)
class Device:
    """The device of a run.

    Attributes:
        kind: "cpu" or "cuda".
        name: Model name of the GPU or processor.
        cores: Threads that torch uses; None on a GPU.
        memory: Bytes that the device has.
    """

    kind: str
    name: str
    cores: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class ModelSize:
    """Size of the trained model.

    Attributes:
        base: Name or folder of the base model.
        parameters: Number of all parameters.
        trainable: Number of trainable parameters.
    """

    base: str
    parameters: int
    trainable: int

    @property
    def trainable_share(self) -> float:
        """Trainable parameters as a fraction of all parameters, 0 to 1."""
        return self.trainable / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Phase:
    """All calls of one phase. A phase includes the phases nested in it.

    Attributes:
        seconds: Total time of all calls.
        calls: Number of calls.
        own: Those of the seconds in which no phase was open that began later: they add up over phases. None in records
            of before they were kept.
        peak_rss: Highest resident memory of the process in any call. `Memory.method` says how it was read.
        peak_requested: Highest number of bytes requested from the CUDA allocator and not freed.
        peak_allocated: The same after the allocator's rounding.
        peak_reserved: Highest number of bytes that the CUDA allocator held from the driver.
    """

    name: str
    seconds: float
    calls: int
    peak_rss: int | None = None
    peak_requested: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    own: float | None = None


# ---- memory


@dataclass(frozen=True)
class Ledger:
    """Exact bytes of the storages of a training state. Each storage counts in exactly one category."""

    trainable: int = 0
    frozen: int = 0
    buffers: int = 0
    gradients: int = 0
    optimizer: int = 0
    strategy: int = 0

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Held:
    """Bytes alive at the peak of one training step, counted storage by storage in an untimed step.

    Each storage counts in exactly one category.

    Attributes:
        ledger: Weights, buffers, gradients and states that existed at the peak.
        batch: Inputs of the step.
        saved: Saved for backward by autograd, and in no category above.
        temporaries: Other outputs of operations that were alive.
        before: Tensors that were alive before the step and are in no category, whoever holds them.
        phase: Phase of the peak: "forward", "backward", "optimizer step", or "course" outside of these.
    """

    ledger: Ledger
    batch: int
    saved: int
    temporaries: int
    phase: str
    before: int = 0

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return self.ledger.total + self.batch + self.saved + self.temporaries + self.before


@dataclass(frozen=True)
class Large:
    """One of the largest tensors alive at the peak of the examined step.

    Attributes:
        bytes: Bytes of its storage.
        category: Category of `Held` or `Ledger` in which it counted.
        shape: Shape of the tensor when it was first seen.
        dtype: Dtype, likewise.
        module: Name of the parameter, of the module whose forward made it, or of the autograd node whose backward did.
        line: Line of code outside of torch that made it; of a tensor from before the step, who holds it.
    """

    bytes: int
    category: str
    shape: list[int]
    dtype: str
    module: str
    line: str


@dataclass(frozen=True)
class Level:
    """Bytes alive at a moment of the examined step.

    Attributes:
        seconds: Time since the step began; the counting slows it down.
        phase: Phase of the step, as in `Held`.
        held: Bytes by category of `Held` or `Ledger`.
    """

    seconds: float
    phase: str
    held: dict[str, int]


@dataclass(frozen=True)
class Allocator:
    """Figures of torch's allocator for the step that `Held` counts.

    Attributes:
        method: Which allocator was read, and how.
        requested: Peak of the bytes requested and not freed.
        left_behind: Bytes that the step left allocated beyond the change of the ledger.
        allocated: The peak after the allocator's rounding; None on a CPU, where nothing is rounded.
        reserved: Peak of the bytes held from the driver; None on a CPU.
        inactive_split: Free bytes in partly used segments after the step. Only smaller requests fit into them.
        retries: How often in the run the allocator flushed its cache to satisfy a request.
        uncounted: Peak of the step before, in which nothing was counted, if it had as many tokens: what the counting
            itself adds is missing in it. None if not measured.
    """

    method: str
    requested: int
    left_behind: int
    allocated: int | None = None
    reserved: int | None = None
    inactive_split: int | None = None
    retries: int = 0
    uncounted: int | None = None


@dataclass(frozen=True)
class Predicted:
    """Memory that was predicted before the first step, for a step with the largest batch; bytes of one rank.

    Attributes:
        peak_bytes: Peak of the tensors, as they are requested from the allocator.
        reserved_bytes: Peak of what CUDA's caching allocator holds from the driver; `peak_bytes` on a CPU.
        needed_bytes: `reserved_bytes` and the CUDA context.
        free_bytes: Memory of the device that was free when this was predicted.
        phase: Phase of the peak.
        categories: Bytes at the peak by category.
        batch_size: Rows of the batch.
        length: Tokens of each row.
        seconds: Time that the prediction took.
    """

    peak_bytes: int
    reserved_bytes: int
    needed_bytes: int
    free_bytes: int
    phase: str
    categories: dict[str, int]
    batch_size: int
    length: int
    seconds: float

    @property
    def fits(self) -> bool:
        """True if the device has what is needed."""
        return self.needed_bytes <= self.free_bytes


@dataclass(frozen=True)
class Memory:
    """Memory peaks of the run.

    Attributes:
        peak_resident: Peak resident memory of the process, without the examined steps. If one of these had the longest
            batch, at least `outside` with the allocator's peak.
        method: How `peak_resident` was read.
        saved_for_backward: Peak of the bytes that autograd had saved in the examined step.
        held: Bytes alive at the peak of the examined step, by category.
        allocator: The allocator's figures for the same step.
        outside: Resident bytes, before the examined step, that are in no tensor: interpreter, libraries, arrays of
            numpy. Only on a CPU.
        growth: Bytes by which the memory in use grows from the end of one timed step to the next: on a GPU torch's, on
            a CPU the whole heap's; garbage that Python has not collected yet does not count. 0 if it does not keep
            growing, None if that is not known, as after few steps.
        keeper: In what the items are that memory grew by, such as "Cache.kept (24 items)"; "" if that was not found.
        examined_step: Number of the examined step, from 1, in the fit or the part of it that examined one.
        examined_positions: Token positions of the largest batch of the examined step, padding included.
        most_positions: Token positions of the largest batch of any step.
        plain_positions: Token positions of the largest batch of the steps that were not instrumented.
        plain_before, plain_peak: Resident bytes when steps that were not instrumented began or went on, and at their
            peak, where it rose most above both these and `outside` with the allocator's peak. Only on a CPU.
        largest: The largest tensors alive at the peak of the examined step, largest first.
        course: What was alive from the beginning of the examined step to its end, at the highest moment of each of at
            most a hundred equal parts of it.
        held_by: Bytes of tensors that were alive before the examined step and are in no category, by who holds them.
        left: The largest tensors that the examined step made and left behind in no category, largest first.
    """

    peak_resident: int | None
    method: str
    saved_for_backward: int | None = None
    held: Held | None = None
    allocator: Allocator | None = None
    outside: int | None = None
    growth: float | None = None
    keeper: str = ""
    examined_step: int | None = None
    examined_positions: int | None = None
    most_positions: int | None = None
    plain_positions: int | None = None
    plain_before: int | None = None
    plain_peak: int | None = None
    largest: list[Large] = field(default_factory=list)
    course: list[Level] = field(default_factory=list)
    left: list[Large] = field(default_factory=list)
    held_by: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer and strategy state at one step of a run whose trainable set changes.

    Attributes:
        step: Optimizer step, from 1, after which the state was measured. It is the first step after a change, when
            every trainable parameter has its state, or the step from which a fit was resumed.
        optimizer: Bytes of the optimizer's state.
        strategy: Bytes of the strategies' state, on whatever device.
    """

    step: int
    optimizer: int
    strategy: int


# ---- driver

CONTEXT_BYTES = 760 * 2**20
"""Bytes of a CUDA context with its kernels, beside the allocator, where none was observed: as measured on an H200
(benchmarks/results/gpu.jsonl, `nvml_process` less `reserved`)."""

Attribution = Literal["own pid", "only process", "device delta"]


@dataclass(frozen=True)
class Driver:
    """Figures of NVML for the device while the run used it.

    Attributes:
        device: Name of the device.
        uuid: UUID of the device, or of the MIG instance if `mig`.
        driver: Version of the driver.
        mig: True for a MIG instance, which reports neither power nor energy nor clocks.
        memory: NVML call that was used: "v2" excludes memory reserved by the driver from `used`, "v1" includes it.
        attribution: How this process's share was found: by its own pid; as the only process on the device, since a
            container sees other pids than the driver; or as the rise of the device's use.
        used: Peak of the bytes in use on the device, by all processes.
        process: Peak of the bytes of this process and of those that it started.
        context: This process's bytes after CUDA was initialised and before the first tensor; None if not observed.
        foreign: Peak of the bytes of other processes.
        samples: Number of samples.
        joules: Energy of the device over the timed windows in which its counter could be read; None if it has none.
        energy_seconds: Seconds of these windows; None in records of before it was kept.
        watts: Mean power over the timed windows.
        watts_peak: Highest power sample.
        sm_mhz: Median and lowest clock of the multiprocessors over the samples.
        lost: One sentence if the device or NVML failed during the run; the figures end there.
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
    energy_seconds: float | None = None
