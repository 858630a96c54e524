"""Counts of the campaign of faults, in pieces: lines of trials with consecutive seeds, summed for each kind of fault.

A line has the first seed of its trials, `first`, and their number, `tried`. Pieces may come from several machines and
commits, in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SUMMED = ("tried", "killed", "survived", "refused", "nothing", "failed", "lost_steps", "corrupted")
"""Counts of a piece. The first ones did not count their kills."""


def seeds_of(lines: Iterable[Mapping[str, Any]], kind: str) -> set[int]:
    """Return the seeds that the pieces of a kind have.

    Raises:
        ValueError: if a seed is in two of them.
    """
    found: set[int] = set()
    for line in lines:
        if line["kind"] != kind:
            continue
        own = range(line["first"], line["first"] + line["tried"])
        if twice := found.intersection(own):
            raise ValueError(f"two pieces of {kind!r} have seed {min(twice)}; delete one of these lines.")
        found.update(own)
    return found


def summed(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the sums of the pieces of each kind, in the order in which the kinds first appear.

    Raises:
        ValueError: if a seed of a kind is in two pieces.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        kinds.setdefault(line["kind"], []).append(line)
    for kind, pieces in kinds.items():
        seeds_of(pieces, kind)
    return {kind: {name: sum(one.get(name, 0) for one in pieces) for name in SUMMED} for kind, pieces in kinds.items()}
