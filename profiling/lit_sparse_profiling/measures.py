"""The figures by which runs are compared: one number each, with its unit and its better direction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_sparse_profiling import walltime
from lit_sparse_profiling.reconcile import residue
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import device_kind, peak_memory
from lit_sparse_profiling.sections import (
    CEILINGS,
    CONTEXT_BYTES,
    EXAMINATION,
    INSTRUMENTED_PHASES,
    PREDICTION,
    is_longer,
)

GIB = 2**30
UNTRAINED = ("general_loss", "text_loss")
"""Losses of text that a run was not trained on, the first that it has: their rise is what it forgot."""


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes:
        key: Its name in files.
        title: Its name for readers, with the unit.
        value: Reads it from a record; None if it was not measured.
        better: Whether lower or higher is better; None if neither is.
        digits: Digits after the point.
    """

    key: str
    title: str
    value: Callable[[RunRecord], float | None]
    better: Literal["low", "high"] | None = None
    digits: int = 2

    def of(self, records: Sequence[RunRecord]) -> list[float]:
        """Return the finite values of those records that have one."""
        found = (self.value(record) for record in records)
        return [value for value in found if value is not None and math.isfinite(value)]

    def median(self, records: Sequence[RunRecord]) -> float | None:
        """Return the median over the records that have the number; None if none has."""
        values = self.of(records)
        return statistics.median(values) if values else None


def peak_gib(record: RunRecord) -> float | None:
    """Return the memory peak in GiB: reserved on a GPU, resident on a CPU."""
    peak = peak_memory(record, device_kind(record))
    return None if peak is None else peak / GIB


def context_gib(record: RunRecord) -> float:
    """Return the GiB that a card needs beside the peak: of the CUDA context, 0 on a CPU."""
    if device_kind(record) != "cuda":
        return 0.0
    return ((record.driver.context if record.driver is not None else None) or CONTEXT_BYTES) / GIB


def loss_name(record: RunRecord) -> str | None:
    """Return the name of the run's first metric that is a loss."""
    names = [name for moment in ("after", "before") for name in record.outcome.get(moment, {})]
    return next((name for name in names if name.endswith("loss")), None)


def loss(record: RunRecord, moment: str = "after") -> float | None:
    """Return the run's loss, in nats per token, after or before training."""
    return record.outcome.get(moment, {}).get(str(loss_name(record)))


def accuracy(record: RunRecord) -> float | None:
    """Return the share of right answers or tokens after training, 0 to 1."""
    after = record.outcome.get("after", {})
    return next((value for name, value in after.items() if name.endswith(("accuracy", "zero_shot"))), None)


def forgetting(record: RunRecord) -> float | None:
    """Return the rise of the loss on text that was not trained on, in nats per token."""
    before, after = (record.outcome.get(moment, {}) for moment in ("before", "after"))
    if "forgetting" in after:  # of PEFT's comparison, which keeps the difference only
        return after["forgetting"]
    name = next((name for name in UNTRAINED if name in before and name in after), None)
    return None if name is None or name == loss_name(record) else after[name] - before[name]


def energy(record: RunRecord) -> float | None:
    """Return kJ of the device per million tokens of the timed steps, without padding."""
    throughput, joules = record.throughput, record.joules_per_step
    if throughput is None or not throughput.tokens or joules is None:
        return None
    return joules * throughput.steps / throughput.tokens * 1e3  # J a token times 10^6, in kJ


def phase_seconds(record: RunRecord) -> dict[str, float]:
    """Return the seconds of each part of a run's wall time, in order; they add up.

    Records of before the wall time was kept have the phases that are part of no other, in the order of their begin.
    """
    nested = set(INSTRUMENTED_PHASES) - {PREDICTION, EXAMINATION, CEILINGS}
    return walltime.parts(record) or {phase.name: phase.seconds for phase in record.phases if phase.name not in nested}


def seconds(record: RunRecord) -> float | None:
    """Return the seconds of the whole run; of all phases where that was not measured."""
    return record.seconds or sum(phase_seconds(record).values()) or None


def tokens_per_second(record: RunRecord) -> float | None:
    """Return tokens per second of the timed steps, without padding."""
    return None if record.throughput is None else record.throughput.tokens_per_second


def step_milliseconds(record: RunRecord) -> float | None:
    """Return the median milliseconds of a timed step."""
    step = None if record.throughput is None else record.throughput.median_step
    return None if step is None else step * 1e3


def predicted(record: RunRecord, what: Literal["peak", "reserved"] = "peak") -> tuple[int, int] | None:
    """Return the allocator's peak, or what it reserved, in bytes: predicted, and measured.

    None if one is unknown, or if the longest batch that was measured is clearly shorter than the one predicted for.
    """
    told, memory = record.predicted, record.memory
    if told is None or memory is None or memory.allocator is None:
        return None
    plain = next((phase for phase in record.phases if phase.name == "training"), None)
    everywhere = plain is not None and plain.peak_requested is not None  # a GPU tells the peak of every step
    if is_longer(told.batch_size * told.length, memory.most_positions if everywhere else memory.examined_positions):
        return None
    key = "reserved" if what == "reserved" else "requested"
    peaks = [getattr(memory.allocator, key), getattr(plain, f"peak_{key}", None)]
    measured = max((peak for peak in peaks if peak), default=None)
    size = told.reserved_bytes if what == "reserved" else told.peak_bytes
    return (size, measured) if size > 0 and measured else None


def prediction_error(record: RunRecord) -> float | None:
    """Return how far the predicted peak is above the measured one, in percent."""
    both = predicted(record)
    return None if both is None else (both[0] / both[1] - 1) * 100


def percent(share: float | None) -> float | None:
    """Return a fraction in percent."""
    return None if share is None else share * 100


PEAK = Measure("peak_memory_gib", "peak memory, GiB", peak_gib, "low")
SPEED = Measure("tokens_per_second", "tokens/s", tokens_per_second, "high", 1)
LOSS = Measure("loss_after", "loss after, nats/token", loss, "low", 3)
FORGETTING = Measure("forgetting", "forgetting, nats/token", forgetting, "low", 3)
ENERGY = Measure("energy_kj_per_million_tokens", "energy, kJ per million tokens", energy, "low", 1)
MEASURES = (
    PEAK,
    SPEED,
    Measure("step_ms", "median step, ms", step_milliseconds, "low", 1),
    LOSS,
    Measure("loss_before", "loss before, nats/token", lambda record: loss(record, "before"), None, 3),
    Measure("accuracy", "accuracy after, %", lambda record: percent(accuracy(record)), "high", 1),
    FORGETTING,
    ENERGY,
    Measure("trainable_percent", "trained, %", lambda r: percent(r.model and r.model.trainable_share), None, 3),
    Measure("utilization_percent", "utilization, %", lambda record: percent(record.utilization), "high", 1),
    Measure("residue_percent", "residue, %", lambda record: percent(residue(record)), None, 1),
    Measure("prediction_error_percent", "prediction error, %", prediction_error, None, 1),
    Measure("timed_steps", "timed steps", lambda r: r.throughput and float(r.throughput.steps), None, 0),
    Measure("seconds", "whole run, s", seconds, "low", 0),
)
"""All of them, in the order of the table."""
