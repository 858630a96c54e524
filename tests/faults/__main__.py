"""The command of `make faults`: trials of faults, counted, and noted so that an interrupted campaign goes on.

Each kind of fault has its number of trials, whose numbers are the seeds of their draws. What was found is noted in
runs/faults/, one line a trial. Counts are appended to benchmarks/results/faults.jsonl as pieces: a piece runs the seeds
that no earlier one has, so that machines add to each other's counts. `python -m tests.faults kills=300 --minutes 20`
runs the kinds named, up to these numbers, and begins no trial after 20 minutes.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.provenance import of_device
from tests.faults.damage import Files
from tests.faults.fits import Bench, Found, Refused, bench, export, full_disk, kill
from tests.faults.inputs import odd
from tests.faults.notes import Notes, counts, told
from tests.faults.soak import METHODS as SOAKED
from tests.faults.soak import soak

KINDS = {
    "kills": 920,  # 2,000 kills, with those of the power cuts
    "power cuts": 100,
    "damage": 2800,
    "good loads": 10_000,
    "full disks": 100,
    "exports": 100,
    "odd input": 1000,
    "soak": len(SOAKED),
}
"""Kinds of faults with their number of trials."""
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "faults.jsonl"
NOTED = 20
"""Trials of a kind between two lines on the screen."""


class Campaign:
    """Trials by kind, in a folder with tiny models that is made on first use."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._files: Files | None = None

    @property
    def files(self) -> Files:
        """Files of all kinds that runs leave."""
        if self._files is None:
            folder = self.bench.home.parent / "files"
            folder.mkdir()
            self._files = Files(self.bench, folder)
        return self._files

    def trial(self, kind: str, number: int) -> Found:
        """Run the trial of a kind that has this number."""
        draw = random.Random(f"{kind} {number}")
        acts: dict[str, Callable[[], Found]] = {
            "kills": lambda: kill(self.bench, draw),
            "power cuts": lambda: kill(self.bench, draw, power=True),
            "damage": lambda: self.files.damage(draw),
            "good loads": lambda: self.files.load(draw),
            "full disks": lambda: full_disk(self.bench, draw),
            "exports": lambda: export(self.bench, draw),
            "odd input": lambda: odd(draw),
            "soak": lambda: soak(self.bench, SOAKED[number]),
        }
        try:
            return acts[kind]()
        except Refused as refusal:
            return Found("nothing", why=str(refusal)[:200])


def run(campaign: Campaign, kind: str, count: int, notes: Notes, commit: str, end: float) -> None:
    """Run the trials of a kind that are not done yet, with the seeds below `count`, until the time `end`."""
    left = notes.left(count)
    for number in left:
        begun = time.monotonic()
        if begun > end:
            break
        with quiet():
            found = campaign.trial(kind, number)
        took = round(time.monotonic() - begun, 3)
        notes.add({"number": number, "commit": commit, **vars(found), "seconds": took})
        if found.how == "failed":
            print(f"{kind} {number} failed: {found.about} {found.why}", flush=True)
        if number % NOTED == 0:
            print(told(kind, [*notes.found.values()]), flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries say off the screen."""
    before = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def main() -> None:
    """Run a campaign; exit with status 1 if a trial failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND=COUNT", help=f"default: all, {KINDS}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no trial after so many minutes")
    parser.add_argument("--into", type=Path, default=Path("runs/faults"), help="folder of the notes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the counts")
    asked = parser.parse_args()
    wanted = {kind: int(count or KINDS[kind]) for kind, _, count in (word.partition("=") for word in asked.kinds)}
    folder, results, end = asked.into.resolve(), asked.results.resolve(), time.monotonic() + 60 * asked.minutes
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    source, failed = of_device("faults", torch.device("cpu")), 0
    with bench(folder / "undisturbed") as made:
        campaign = Campaign(made)
        for kind, count in (wanted or KINDS).items():
            notes = Notes(kind, folder, results)
            try:
                run(campaign, kind, count, notes, source["commit"], end)
            finally:
                notes.publish(source)
            failed += counts([*notes.found.values()])["failed"]
            print(told(kind, [*notes.found.values()]), flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
