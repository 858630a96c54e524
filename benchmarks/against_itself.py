"""Measure whether a comparison of equal runs covers 1: A against A, with and without untimed work on one side.

`python -m benchmarks.against_itself` runs pairs of fresh processes whose short steps, a matrix product, are interleaved
as `lit-sparse bench --against` interleaves a fit's. In half of the pairs one side works for 50 ms after each step, as
callbacks and data loading do. The 95 % interval of the ratio of times must hold 1 in 93 of 100 pairs of 12 rounds. It
appends a line for each kind of pair to benchmarks/results/against_itself.jsonl; its exit status is 1 if one fell short.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from lit_sparse_profiling.paired import PairedRun, Turns, compare_rounds, interleave
from lit_sparse_profiling.speed_sections import Pair

SHARE = 0.93
"""Least share of pairs whose interval holds 1."""
WIDTH, PRODUCTS = 192, 8
"""Side of the matrices, and products in a step: a few milliseconds."""
WARMUP = 5
UNTIMED = (0.0, 0.05)
"""Seconds of work after each step of one side."""


def side(turns: Turns, rounds: int, untimed: float) -> None:
    """Run the steps of one process, each followed by so many seconds of untimed work."""
    matrix = np.random.default_rng(0).standard_normal((WIDTH, WIDTH))
    for number in range(WARMUP + rounds):
        if number >= WARMUP:
            turns.wait()
        begin = perf_counter()
        work(matrix)
        taken = perf_counter() - begin
        if number >= WARMUP:
            turns.report(taken)
            while perf_counter() - begin - taken < untimed:
                work(matrix)


def work(matrix: np.ndarray) -> None:
    """Work as a step does."""
    for _ in range(PRODUCTS):
        np.matmul(matrix, matrix)


def pair(rounds: int, untimed: tuple[float, float]) -> Pair:
    """Compare two equal processes, each with so much untimed work.

    Raises:
        RuntimeError: if one of them failed.
    """
    with tempfile.TemporaryDirectory() as scratch:

        def start(number: int) -> PairedRun:
            command = [sys.executable, "-m", "benchmarks.against_itself", f"--rounds={rounds}"]
            return PairedRun([*command, f"--untimed={untimed[number]}"], Path(scratch, f"{number}.log"))

        first = start(0)
        seconds = interleave(first, lambda: start(1), None, lambda: None)
        if first.end(None, lambda: None) or len(seconds) < rounds:
            raise RuntimeError(f"A pair ended early: {Path(scratch, '0.log').read_text()}")
    return compare_rounds("itself", seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, append the results, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100, help="pairs of each kind (default 100)")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved steps of each pair (default 12)")
    parser.add_argument("--results", type=Path, help="file of JSON lines to append to")
    parser.add_argument("--untimed", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--profile.turns", dest="turns", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.turns is not None:
        side(Turns(asked.turns), asked.rounds, asked.untimed)
        return 0
    met = [judge(seconds, asked.pairs, asked.rounds, asked.results) for seconds in UNTIMED]
    return 0 if all(met) else 1


def judge(untimed: float, pairs: int, rounds: int, results: Path | None) -> bool:
    """Run pairs, of which the first and the second side has the untimed work in turn; return if enough covered 1."""
    found = [pair(rounds, (untimed, 0.0) if number % 2 else (0.0, untimed)) for number in range(pairs)]
    covered = sum(one.low <= 1 <= one.high for one in found)
    medians = sorted(one.median for one in found)
    met = covered >= SHARE * pairs
    print(
        f"{'met   ' if met else 'missed'} untimed work of {untimed * 1e3:.0f} ms: the interval holds 1 in {covered} of "
        f"{pairs} pairs of {rounds} rounds; medians {medians[0]:.3f} to {medians[-1]:.3f}",
        flush=True,
    )
    append(results, {"untimed_ms": untimed * 1e3, "pairs": pairs, "rounds": rounds, "covered": covered}, medians)
    return met


def append(results: Path | None, figures: dict[str, float], medians: Sequence[float]) -> None:
    """Append a line of results to a file, by default to the measurements of this repository."""
    import torch  # here: the sides of a pair do without, and start in a tenth of a second

    from benchmarks.provenance import ROOT, of_device

    line = of_device("against_itself", torch.device("cpu")) | figures
    line |= {"median_lowest": medians[0], "median_highest": medians[-1]}
    path = results or ROOT / "benchmarks" / "results" / "against_itself.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
