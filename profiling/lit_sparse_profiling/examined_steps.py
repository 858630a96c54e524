"""The examined steps of a run: the first after the warm-up, and later ones with longer batches, which need more memory.

The worst batch decides the peak of a run, and nobody knows beforehand when it comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lit_sparse_profiling.counted import Counter
from lit_sparse_profiling.examination import Examination, Subject
from lit_sparse_profiling.opcounts import OpCounts
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.reconcile import observer
from lit_sparse_profiling.sections import Allocator, Memory, is_longer
from lit_sparse_profiling.witness import PlainSteps

EAGER = (
    "The model is compiled, but the examined step ran eagerly, since nothing sees into compiled code: FLOPs, and "
    "memory by category and at its peak, are of the eager step. Times, energy, kernels and the peaks of other phases "
    "are those of compiled steps."
)


@dataclass(frozen=True)
class _Examined:
    """An examined step: its number, the token positions of its largest batch, and what was found."""

    step: int
    positions: int | None
    counter: Counter
    allocator: Allocator
    examination: Examination


class ExaminedSteps:
    """Examines steps one after the other, and keeps what was found of the longest batch.

    The first step has a lead-in, the step before it, which shows what counting changes. A later one is examined as soon
    as its batch is there, without a lead-in. FLOPs stay the first one's, whose kernels are timed next.

    Args:
        subject: Gives what is counted.
        device: Device of the model, with its index.
        phases: Stop-watch in which the examined steps and their parts are phases.

    Attributes:
        ops: FLOPs and bytes of the first examined step's ops; None before.
        tokens: Token positions of that step, over all of its batches; None if unknown.
    """

    def __init__(self, subject: Subject, device: torch.device, phases: Phases) -> None:
        self.ops: OpCounts | None = None
        self.tokens: int | None = None
        self._subject, self._device, self._phases = subject, device, phases
        self._now = Examination(subject, device, phases)
        self._before: tuple[int | None, set[int]] = (None, set())
        self._first: Allocator | None = None
        self._longest: _Examined | None = None
        self._led_in = self._eager = False

    @property
    def under_way(self) -> bool:
        """True from `lead_in`, on a GPU without the time between the two steps, until `end` or `drop`."""
        return self._now.under_way

    @property
    def done(self) -> bool:
        """True once a step was examined."""
        return self._longest is not None

    def outgrown_by(self, positions: int | None) -> bool:
        """Return whether a batch of so many token positions is clearly longer than all that were examined."""
        return self._longest is not None and is_longer(positions, self._longest.positions)

    # ---- a step

    def lead_in(self) -> None:
        """Begin the step before the examined one."""
        self._now.lead_in()
        self._led_in = True

    def end_lead_in(self, positions: int | None) -> None:
        """End it; `positions` as in `end`."""
        self._now.end_lead_in()
        self._before = positions, self._trainable()

    def begin(self, batch: Any) -> None:
        """Begin an examined step with its batch, or with that one of the batches that it accumulates."""
        if not self._led_in:
            self._now.lead_in()
            self._now.end_lead_in()
            self._before = None, set()
        self._now.begin(batch)

    def begin_part(self, name: str) -> None:
        """Begin a part of the examined step, such as "forward"."""
        self._now.begin_part(name)

    def end_part(self, name: str) -> None:
        """End a part; do nothing if it is not open."""
        self._now.end_part(name)

    def end(self, step: int, positions: int | None, tokens: int | None) -> None:
        """End the examined step.

        Args:
            step: Number of the step.
            positions: Token positions of its largest batch, padding included; None if unknown.
            tokens: Those of all of its batches; None likewise.
        """
        one, self._now = self._now, Examination(self._subject, self._device, self._phases)
        one.end()
        assert one.counter is not None
        assert one.allocator is not None
        allocator, led_in, self._led_in = one.allocator, self._led_in, False
        if not led_in or positions is None or self._before != (positions, self._trainable()):
            # Nothing came before, or another batch or other trainable weights, with another peak.
            allocator = replace(allocator, uncounted=None)
        if self._longest is None:
            self.ops, self.tokens, self._first = one.ops, tokens, allocator
        self._eager |= one.ran_eagerly
        self._longest = _Examined(step, positions, one.counter, allocator, one)

    def drop(self) -> None:
        """Remove the instruments of the step under way, which failed, was interrupted, or did not come."""
        self._now.drop()
        self._now, self._led_in = Examination(self._subject, self._device, self._phases), False

    def _trainable(self) -> set[int]:
        return {id(parameter) for parameter in self._subject()[0].parameters() if parameter.requires_grad}

    # ---- results

    def add_to(self, memory: Memory, plain: PlainSteps) -> Memory:
        """Return the memory of the run with what the longest batch showed, beside the steps without instruments."""
        memory, one = replace(memory, plain_positions=plain.positions), self._longest
        if one is None:
            return memory
        outside, resident = one.examination.outside, memory.peak_resident
        before = peak = None
        if outside is not None:
            needed = outside + one.allocator.requested
            before, peak = plain.highest_rise(needed)
            if resident is not None and is_longer(one.positions, plain.positions):
                resident = max(resident, needed)
        return replace(
            memory,
            peak_resident=resident,
            saved_for_backward=one.counter.saved_peak,
            held=one.counter.at_peak(),
            allocator=one.allocator,
            outside=outside,
            plain_before=before,
            plain_peak=peak,
            examined_step=one.step,
            examined_positions=one.positions,
            largest=one.counter.largest(),
            course=one.counter.levels(),
            left=one.examination.left,
            held_by=one.counter.held_by,
        )

    def notes(self) -> Iterator[str]:
        """Yield a sentence for what the first step showed that a longer one, which replaced it, cannot show."""
        if self._eager:
            yield EAGER
        if self._first is not None and self._longest is not None and self._longest.allocator is not self._first:
            for sentence in observer(self._first):
                yield f"Of the step that was examined first: {sentence}"
