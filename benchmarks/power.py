"""Say what a quality table can tell: its smallest difference, and what took its power away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from benchmarks.measurements import Line
from benchmarks.pairing import Interval, scores_of, smallest
from benchmarks.trials import Arm, Config, Table


class Row(Protocol):
    """The results of one arm, as `benchmarks.ranking.Row` has them."""

    arm: Arm
    fits: list[Line]
    beside: Interval | None

    @property
    def end(self) -> str:
        """Which end of its sweep the best rate is, if any."""
        ...


FEWEST = 10_000
"""Scored tokens of answers below which a table says that they are too few."""


def power_of(made: Table, found: Sequence[Row]) -> Iterator[str]:
    """Yield sentences for the head of a table, what it lost first; none before anything was trained."""
    ranked = {group: rows for group, rows in groups(found).items() if any(row.fits for row in rows)}
    if not any(row.fits for row in found):
        return
    if reasons := [*lost(made, found, ranked)]:
        yield f"**This table has lost its power:** {'; '.join(reasons)}."
    told = [f"{values} in {group}" for group, rows in ranked.items() if (values := tellable(rows))]
    if told:
        yield (
            f"Smallest difference to the best arm of a group that it can tell (two-sided 95 %, power 80 %), in nats a "
            f"token of the held-out loss: {', '.join(told)}; pair by pair, over {basis(ranked)}."
        )
    if diverged := [row.arm.name for row in found if row.fits and scores_of(row.fits) is None]:
        yield f"Diverged, and in no interval: {', '.join(diverged)}."


def groups(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each group that are ranked."""
    names = dict.fromkeys(row.arm.group for row in found if row.arm.group is not None)
    return {name: [row for row in found if row.arm.group == name] for name in names}


def tellable(rows: Sequence[Row]) -> str:
    """Format the least and the largest of the smallest differences to a group's best row; "" where there is none.

    They differ with the arms: some have more seeds, and some change more from seed to seed.
    """
    scores = {row.arm.name: one for row in rows if (one := scores_of(row.fits)) is not None}
    best = next((row.arm.name for row in rows if row.beside is None and row.arm.name in scores), None)
    pairs = [smallest([scores[row.arm.name], scores[best]]) for row in rows if best and row.beside is not None]
    found = [value for value in pairs if value is not None]
    return " to ".join(dict.fromkeys(f"{end(found):.4f}" for end in (min, max))) if found else ""


def basis(ranked: Mapping[str, Sequence[Row]]) -> str:
    """Describe what the differences are paired over: seeds, and rows where all, some or none of the lines keep them."""
    fits = [line for rows in ranked.values() for row in rows for line in row.fits]
    kept = sum("heldout" in line.get("rows", {}) for line in fits)
    if not kept:
        return "seeds alone: the losses of rows were not kept, so that other rows may rank the arms differently"
    if kept < len(fits):
        return f"seeds, and over rows where both arms kept them ({kept} of {len(fits)} trainings did)"
    return "seeds and scored rows"


# ---- what was lost


def lost(made: Table, found: Sequence[Row], ranked: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yield what takes power away from the table."""
    if at_end := [row.arm.name for row in found if row.end]:
        yield f"at an end of the sweep (or the only one tried) is the best learning rate of {', '.join(at_end)}"
    compared = [row for rows in ranked.values() for row in rows if row.beside is not None]
    if compared and all(row.beside is not None and row.beside.tie for row in compared):
        yield "all arms tie"
    yield from few(made, found)


def few(made: Table, found: Sequence[Row]) -> Iterator[str]:
    """Yield that too few tokens are scored, if they are known to be."""
    kept = [scores for row in found if (scores := scores_of(row.fits)) is not None and scores.tokens is not None]
    exact = min((int(scores.tokens.sum()) for scores in kept if scores.tokens is not None), default=None)
    most, unit = most_scored(made.workload)
    count = most if exact is None else exact
    if count is not None and count < FEWEST:
        said = "only" if exact is not None or unit == "labels" else "at most"
        yield f"{said} {count:,} {unit} are scored ({FEWEST:,} are needed)"


def most_scored(workload: Config) -> tuple[int | None, str]:
    """Return the most tokens that a workload's held-out rows can have, and their unit; None where it does not say."""
    kind = workload["data"]["class_path"].rpartition(".")[2]
    data = {"batch_size": 4, **workload["data"].get("init_args", {})}
    batches, rows = workload["trainer"].get("limit_val_batches"), data.get("heldout")
    if rows is not None and type(batches) is int:
        rows = min(rows, batches * data["batch_size"])
    if kind == "Labelled":
        return rows, "labels"
    length = data.get("max_length")
    return (None if rows is None or length is None else rows * length), "tokens of answers"
