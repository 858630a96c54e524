"""What trials found, one line each, and the counts of trials with consecutive seeds that are added to the results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.fault_counts import seeds_of

HOW = ("survived", "refused", "nothing", "failed")
Note = dict[str, Any]


class Notes:
    """The trials of a kind on this machine, in a file of JSON lines, and the pieces of it that the results have.

    Attributes:
        found: What each trial found, by its seed.
    """

    def __init__(self, kind: str, folder: Path, results: Path) -> None:
        self.kind, self.results = kind, results
        self._file = folder / f"{kind.replace(' ', '-')}.jsonl"
        self.found = {note["number"]: note for note in _read(self._file)}

    def left(self, end: int) -> list[int]:
        """Return the seeds below `end` that neither the results nor the notes have."""
        done = seeds_of(_read(self.results), self.kind)
        return [seed for seed in range(end) if seed not in done and seed not in self.found]

    def add(self, note: Note) -> None:
        """Note what a trial found."""
        self.found[note["number"]] = note
        with self._file.open("a") as file:
            file.write(json.dumps(note) + "\n")

    def publish(self, source: Note) -> None:
        """Append the counts of the trials that the results do not have, a line for each run of seeds and commit.

        Args:
            source: Provenance of this machine, whose commit is replaced by that of the trials.
        """
        done = seeds_of(_read(self.results), self.kind)
        new = [self.found[seed] for seed in sorted(self.found.keys() - done)]
        with self.results.open("a") as file:
            for piece in pieces(new):
                line = {**source, "commit": piece[0]["commit"], "kind": self.kind, "first": piece[0]["number"]}
                file.write(json.dumps({**line, **counts(piece)}) + "\n")


def _read(path: Path) -> list[Note]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def pieces(notes: list[Note]) -> Iterator[list[Note]]:
    """Yield the trials of each run of consecutive seeds that one commit tried."""
    numbered = enumerate(notes)
    for _, piece in groupby(numbered, key=lambda one: (one[1]["commit"], one[1]["number"] - one[0])):
        yield [note for _, note in piece]


def counts(done: list[Note]) -> dict[str, Any]:
    """Return the counts of trials."""
    how = Counter(one["how"] for one in done)
    return {
        "tried": len(done),
        "killed": sum(one["killed"] for one in done),
        **{name: how[name] for name in HOW},
        "lost_steps": sum(one["lost"] for one in done),
        "corrupted": sum(one["why"] == "believed" or "differs" in one["why"] for one in done),
        "seconds": round(sum(one["seconds"] for one in done)),
    }


def told(kind: str, done: list[Note]) -> str:
    """Return the counts as a sentence."""
    found = counts(done)
    return (
        f"{kind}: {found['tried']} tried, {found['killed']} kills, {found['survived']} survived, "
        f"{found['refused']} refused by name, {found['nothing']} came to nothing, {found['failed']} failed; "
        f"{found['lost_steps']} steps taken again, {found['corrupted']} corrupted results"
    )
