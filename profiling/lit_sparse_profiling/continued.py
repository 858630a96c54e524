"""One record of a run that was interrupted and goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Driver, Memory, Phase, StateBytes
from lit_sparse_profiling.speed_sections import Rank, Throughput


def continued(earlier: RunRecord, later: RunRecord) -> RunRecord:
    """Return the record of a run that consists of two parts.

    Seconds, calls, steps, tokens and energy are sums, and peaks the highest of both. What only one part measured is
    that part's. The command is the earlier part's; all else, such as the status and the scores at the end, the later's.
    A later note replaces an earlier one that begins alike, up to a colon: it says the same with its own numbers.
    """
    before = later.outcome.get("before", {}) | earlier.outcome.get("before", {})
    return replace(
        later,
        created=earlier.created,
        command=earlier.command or later.command,
        seconds=_sum(earlier.seconds, later.seconds),
        phases=joined_phases(earlier.phases, later.phases),
        memory=joined_memory(earlier.memory, later.memory),
        throughput=joined_throughput(earlier.throughput, later.throughput),
        driver=joined_driver(earlier.driver, later.driver),
        ranks=joined_ranks(earlier.ranks, later.ranks),
        kernels=later.kernels or earlier.kernels,
        states=joined_states(earlier.states, later.states),
        outcome={moment: scores for moment, scores in {**later.outcome, "before": before}.items() if scores},
        notes=list({note.partition(":")[0]: note for note in [*earlier.notes, *later.notes]}.values()),
    )


def joined_phases(earlier: Sequence[Phase], later: Sequence[Phase]) -> list[Phase]:
    """Return the phases of both parts, those of one name as one."""
    found = {phase.name: phase for phase in earlier}
    for phase in later:
        found[phase.name] = joined_phase(found[phase.name], phase) if phase.name in found else phase
    return list(found.values())


def joined_phase(earlier: Phase, later: Phase) -> Phase:
    """Return the sum of a phase's seconds and calls, with the higher peaks."""
    peaks = ("peak_rss", "peak_requested", "peak_allocated", "peak_reserved")
    return replace(
        later,
        seconds=earlier.seconds + later.seconds,
        calls=earlier.calls + later.calls,
        own=_sum(earlier.own, later.own),
        **{name: _highest(getattr(earlier, name), getattr(later, name)) for name in peaks},
    )


def joined_memory(earlier: Memory | None, later: Memory | None) -> Memory | None:
    """Return the higher peaks, with the examined step of the longer batch."""
    if earlier is None or later is None:
        return later or earlier
    examined = [part for part in (later, earlier) if part.held is not None]
    longest = max(examined, key=lambda part: part.examined_positions or 0, default=later)
    peaks = ("peak_resident", "most_positions", "plain_positions")
    return replace(
        longest,
        method=later.method,
        growth=earlier.growth if later.growth is None else later.growth,
        keeper=earlier.keeper if later.growth is None else later.keeper,
        **{name: _highest(getattr(earlier, name), getattr(later, name)) for name in peaks},
    )


def joined_throughput(earlier: Throughput | None, later: Throughput | None) -> Throughput | None:
    """Return the sum of both parts; the median step is that of the part with more steps."""
    if earlier is None or later is None:
        return later or earlier
    # What one step executes is the part's that has examined one.
    return replace(
        later if later.flops is not None else earlier,
        tokens=_sum(earlier.tokens, later.tokens),
        padded_tokens=_sum(earlier.padded_tokens, later.padded_tokens),
        seconds=earlier.seconds + later.seconds,
        steps=earlier.steps + later.steps,
        between=_sum(earlier.between, later.between),
        median_step=max(later, earlier, key=lambda part: part.steps).median_step,
        longest_step=_highest(earlier.longest_step, later.longest_step),
    )


def joined_driver(earlier: Driver | None, later: Driver | None) -> Driver | None:
    """Return the energy of both parts, with the higher peaks; clocks and mean power are the later part's."""
    if earlier is None or later is None:
        return later or earlier
    peaks = {name: max(getattr(earlier, name), getattr(later, name)) for name in ("used", "process", "foreign")}
    return replace(
        later,
        **peaks,
        samples=earlier.samples + later.samples,
        joules=_sum(earlier.joules, later.joules),
        energy_seconds=_sum(earlier.energy_seconds, later.energy_seconds),
        watts_peak=_highest(earlier.watts_peak, later.watts_peak),
    )


def joined_ranks(earlier: Sequence[Rank], later: Sequence[Rank]) -> list[Rank]:
    """Return each rank's sums of both parts; those of the later part if the run went on with other ranks."""
    if len(earlier) != len(later):
        return list(later)
    return [
        replace(
            now,
            tokens=_sum(before.tokens, now.tokens),
            padded_tokens=_sum(before.padded_tokens, now.padded_tokens),
            seconds=_sum(before.seconds, now.seconds),
            joules=_sum(before.joules, now.joules),
            peak_memory=_highest(before.peak_memory, now.peak_memory),
        )
        for before, now in zip(earlier, later, strict=True)
    ]


def joined_states(earlier: Sequence[StateBytes], later: Sequence[StateBytes]) -> list[StateBytes]:
    """Return the bytes of state of both parts, each step once: a resumed fit measures its first step again."""
    found = {state.step: state for state in [*later, *earlier]}
    return [found[step] for step in sorted(found)]


def _highest(*values: Any) -> Any:
    return max((value for value in values if value is not None), default=None)


def _sum(one: Any, other: Any) -> Any:
    return None if one is None or other is None else one + other
