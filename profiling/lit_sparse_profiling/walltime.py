"""The wall time of a run by what it was spent on, in parts that add up."""

from __future__ import annotations

from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import EXAMINATION, INSTRUMENTED_PHASES, PREDICTION

OTHER = "other"
"""Time outside of all phases."""
NAMES = {"loading": "model", **dict.fromkeys(INSTRUMENTED_PHASES, EXAMINATION), PREDICTION: PREDICTION}
"""Part of the wall time in which a phase counts, if it does not bear the phase's name."""
ORDER = (
    *("imports", "command line", "data", PREDICTION, "model", "selection", "samples", "evaluation", EXAMINATION),
    *("training", "saving", "forgetting"),
)


def parts(record: RunRecord) -> dict[str, float]:
    """Return the seconds of each part of the wall time; they add up to it. Empty where it was not measured."""
    if record.seconds is None:
        return {}
    found: dict[str, float] = {}
    for phase in record.phases:
        name = NAMES.get(phase.name, phase.name)
        found[name] = found.get(name, 0.0) + (phase.own or 0.0)
    known = {name: found.pop(name) for name in ORDER if name in found}
    told = {**known, **found}
    return {**told, OTHER: record.seconds - sum(told.values())}


def describe(record: RunRecord) -> str | None:
    """Return a line with the wall time and its parts; None where it was not measured."""
    told = parts(record)
    if not record.seconds or not told:
        return None
    shares = (f"{name} {seconds:.1f} ({seconds / record.seconds:.0%})" for name, seconds in told.items())
    return f"Wall time {record.seconds:.1f} s: {', '.join(shares)}."
