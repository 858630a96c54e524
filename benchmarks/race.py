"""How soon arms reach a loss: in steps, in forward passes, and in minutes; and which parts of a method pay."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurements import Line
from benchmarks.pairing import SCORE, difference
from benchmarks.trials import Config, Race
from lit_sparse_profiling.record import RunRecord

PASSES = {False: 3.0, True: 4.0}
"""Passes of a first-order step, its backward pass counted as two: without and with activation checkpointing."""
HEAD = ("steps", "forward passes", "minutes", "peak resident, GiB")


def measured(record: RunRecord, folder: Path, config: Config) -> dict[str, Any]:
    """Return what a race needs of a training in `folder`: the held-out losses on the way, and the passes of a step."""
    chosen = [update["chosen"] for update in record.updates]
    every = config["trainer"]["val_check_interval"] // config["trainer"].get("accumulate_grad_batches", 1)
    own = [float(facts["forwards_per_step"]) for facts in chosen if "forwards_per_step" in facts]
    return {
        "curve": curve(folder / "metrics.csv", every),
        "passes": own[0] if own else PASSES[bool(config["model"].get("activation_checkpointing"))],
    }


def curve(path: Path, every: int) -> list[tuple[int, float]]:
    """Return the held-out loss after every so many steps, as metrics.csv has it."""
    with path.open(encoding="utf-8") as file:
        losses = [float(row[SCORE]) for row in csv.DictReader(file) if row.get(SCORE)]
    return [(every * number, loss) for number, loss in enumerate(losses, 1)]


def reached(start: float, points: Sequence[Sequence[float]], target: float) -> float | None:
    """Return the step at which a curve first is at `target`, between two of its points; None if it never is."""
    if start <= target:
        return 0.0
    before, above = 0.0, start
    for step, loss in ((step, float(loss)) for step, loss in points):  # what is no number is a word in JSON
        if loss <= target:
            return before + (step - before) * (above - target) / (above - loss) if above > loss else before
        before, above = step, loss
    return None


def steps_of(race: Race, arms: Mapping[str, Sequence[Line]], start: float) -> dict[str, float | None]:
    """Return the mean number of steps, over seeds, in which each arm reaches the final loss of `race.to`.

    None for an arm that was not trained, or that does not reach it with every seed; for all where `start`, the loss
    before training, is NaN.
    """
    if not arms.get(race.to) or not math.isfinite(start):
        return dict.fromkeys(arms)
    target = statistics.fmean(float(line["after"][SCORE]) for line in arms[race.to])
    found: dict[str, float | None] = {}
    for name, lines in arms.items():
        steps = [reached(start, line["curve"], target) for line in lines]
        whole = [step for step in steps if step is not None]
        found[name] = statistics.fmean(whole) if whole and len(whole) == len(steps) else None
    found[race.to] = float(arms[race.to][0]["steps"])
    return found


def cells(lines: Sequence[Line], steps: float | None) -> list[str]:
    """Return an arm's columns: steps, forward passes and minutes to the loss, and the peak of its memory."""
    peaks = [line["peak_resident"] for line in lines if line["peak_resident"] is not None]
    peak = f"{max(peaks) / 2**30:.2f}" if peaks else "-"
    if steps is None:
        return [*["not reached" if lines else "-"] * 3, peak]
    seconds = [line["step_seconds"] for line in lines if line["step_seconds"] is not None]
    minutes = f"{steps * statistics.median(seconds) / 60:.1f}" if seconds else "-"
    return [f"{steps:.0f}", f"{steps * lines[0]['passes']:,.0f}", minutes, peak]


def told(race: Race, arms: Mapping[str, Sequence[Line]], start: float) -> Iterator[str]:
    """Yield sentences: how many times fewer steps and passes each arm takes, and which parts of a method pay."""
    known = {name: lines for name, lines in arms.items() if lines}
    if race.to not in known or not math.isfinite(start):
        return
    steps = steps_of(race, known, start)
    base, passes = steps[race.to], known[race.to][0]["passes"]
    assert base is not None
    others = {name: count for name, count in steps.items() if name != race.to}
    yield f"Steps, forward passes and minutes are those to the final loss of {race.to}."
    shares = {name: (count, known[name][0]["passes"] / passes) for name, count in others.items() if count is not None}
    ahead = [
        f"{name} in {count / base:.2f} of its steps and {count / base * each:.2f} of its passes"
        for name, (count, each) in shares.items()
    ]
    if ahead:
        yield f"Beside {race.to}: {'; '.join(ahead)}."
    if never := [name for name, count in others.items() if count is None]:
        yield f"Not reached by {', '.join(never)}."
    if race.whole in known:
        yield f"Parts of {race.whole}: {'; '.join(verdicts(race, known))}."


def verdicts(race: Race, arms: Mapping[str, Sequence[Line]]) -> Iterator[str]:
    """Yield for each part whether the arm without it, or with another in its place, loses by that."""
    for name, part in race.without.items():
        gain = difference(arms.get(name, []), arms[str(race.whole)])
        if gain is None:
            yield f"{part} not judged ({name})"
            continue
        pays = "does not pay, a tie" if gain.tie else "pays" if gain.difference > 0 else "does not pay, it costs"
        yield f"{part} {pays} ({gain} with {name})"
