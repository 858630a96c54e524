"""The command of `make faults`: trials of faults, counted, and noted so that an interrupted campaign goes on.

Each kind of fault has its number of trials, whose numbers are the seeds of their draws. What was found is noted in
runs/faults/, one line a trial, and the counts of a kind are appended to benchmarks/results/faults.jsonl whenever it has
gone on. `python -m tests.faults kills=20` runs the kinds named, up to these numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import of_device
from tests.faults.damage import Files
from tests.faults.fits import Bench, Found, Refused, bench, export, full_disk, kill
from tests.faults.inputs import odd
from tests.faults.soak import METHODS as SOAKED
from tests.faults.soak import soak

KINDS = {
    "kills": 1800,
    "power cuts": 200,
    "damage": 2000,
    "good loads": 10_000,
    "full disks": 100,
    "exports": 100,
    "odd input": 1000,
    "soak": len(SOAKED),
}
"""Kinds of faults with their number of trials."""
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "faults.jsonl"
HOW = ("survived", "refused", "nothing", "failed")
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


def run(campaign: Campaign, kind: str, count: int, notes: Path) -> list[dict[str, Any]]:
    """Run the trials of a kind that are not noted yet, up to `count`; return all notes of them."""
    file = notes / f"{kind.replace(' ', '-')}.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for number in range(len(done), count):
        begun = time.monotonic()
        with quiet():
            found = campaign.trial(kind, number)
        done.append({"number": number, **vars(found), "seconds": round(time.monotonic() - begun, 3)})
        with file.open("a") as noted:
            noted.write(json.dumps(done[-1]) + "\n")
        if found.how == "failed":
            print(f"{kind} {number} failed: {found.about} {found.why}", flush=True)
        if len(done) % NOTED == 0 or len(done) == count:
            print(told(kind, done), flush=True)
    return done


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


def counts(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of the trials of a kind."""
    how = Counter(one["how"] for one in done)
    corrupted = sum(one["why"] == "believed" or "differs" in one["why"] for one in done)
    lost = {"lost_steps": sum(one["lost"] for one in done), "corrupted": corrupted}
    return {"tried": len(done), **{name: how[name] for name in HOW}, **lost}


def told(kind: str, done: list[dict[str, Any]]) -> str:
    """Return the counts as a sentence."""
    found = counts(done)
    return (
        f"{kind}: {found['tried']} tried, {found['survived']} survived, {found['refused']} refused by name, "
        f"{found['nothing']} came to nothing, {found['failed']} failed; {found['lost_steps']} steps taken again, "
        f"{found['corrupted']} corrupted results"
    )


def main() -> None:
    """Run a campaign; exit with status 1 if a trial failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND=COUNT", help=f"default: all, {KINDS}")
    parser.add_argument("--into", type=Path, default=Path("runs/faults"), help="folder of the notes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the counts")
    asked = parser.parse_args()
    wanted = {kind: int(count or KINDS[kind]) for kind, _, count in (word.partition("=") for word in asked.kinds)}
    notes, results = asked.into.resolve(), asked.results.resolve()
    notes.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    source, failed = of_device("faults", torch.device("cpu")), 0
    with bench() as made:
        campaign = Campaign(made)
        for kind, count in (wanted or KINDS).items():
            begun = time.monotonic()
            done = run(campaign, kind, count, notes)
            failed += counts(done)["failed"]
            line = {**source, "kind": kind, **counts(done), "seconds": round(time.monotonic() - begun)}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(told(kind, done), flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
