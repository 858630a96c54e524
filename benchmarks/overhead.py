"""Measure the profiler's overhead on the steps that it times, and on the wall time of whole fits.

`python -m benchmarks.overhead` trains the demo model with block-sparse tuning on short rows, so that a step is short
and an overhead of Python's shows: interleaved steps of one fit with and without the profiler, then pairs of whole
processes, `lit-sparse fit` as it is and with `--profile=false`. It appends a line of each to
benchmarks/results/overhead.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.provenance import ROOT, provenance
from lit_sparse.callbacks.profile import Profile
from lit_sparse.data import Synthetic
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import SMT
from lit_sparse_profiling.paired import PairedRun, Turns, compare_rounds, interleave
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.speed_sections import Pair
from lit_sparse_profiling.step_plan import Plan

RESULTS = ROOT / "benchmarks" / "results" / "overhead.jsonl"
WARMUP = 8
"""Steps of warm-up, which include the profiler's examination."""


FIT = (
    *("fit", "--config=smt.yaml", "--data=Synthetic", "--data.max_length=32", "--data.batch_size=1"),
    *("--data.heldout=4", "--trainer.max_steps=60", "--trainer.enable_progress_bar=false"),
)
"""A short fit of short steps, on which measuring weighs most."""


class Begin(Callback):
    """The first callback: waits for its turn, and starts the clock before other callbacks act."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.begun = turns, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:  # pyright: ignore
        if trainer.global_step >= WARMUP:
            self.turns.wait()
        self.begun = perf_counter()


class End(Callback):
    """The last callback: stops the clock."""

    def __init__(self, begin: Begin) -> None:
        self.begin = begin

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:  # pyright: ignore
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if trainer.global_step > WARMUP:
            self.begin.turns.report(perf_counter() - self.begin.begun)


def fit(turns: Turns, rounds: int, folder: Path | None) -> None:
    """Train some steps, with a profiler that writes to `folder`, or without one if it is None."""
    torch.manual_seed(0)
    begin = Begin(turns)
    profile = [] if folder is None else [Profile(folder, Plan(warmup=WARMUP - 4))]
    trainer = L.Trainer(
        max_steps=WARMUP + rounds,
        callbacks=[begin, *profile, End(begin)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    module = CausalLM(updates=[SMT(blocks="random", trainable_fraction=0.0084)], lr=1e-4)
    trainer.fit(module, datamodule=Synthetic(max_length=64, batch_size=1, rows=rounds + WARMUP + 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and append the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="timed steps of each fit (default 200)")
    parser.add_argument("--fits", type=int, default=12, help="pairs of whole fits (default 12)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--profile.turns", dest="turns", help=argparse.SUPPRESS)
    asked, passed = parser.parse_known_args(arguments)
    if asked.turns is not None:
        fit(Turns(asked.turns), asked.rounds, asked.folder)
        return 0
    if asked.rounds:
        pair, record = steps(asked.rounds)
        tell("steps", pair, provenance("overhead", record, model="demo"), asked.results)
    if asked.fits:
        pair, record = fits(asked.fits, passed)
        tell("whole fits", pair, provenance("overhead", record) | {"fits": pair.rounds}, asked.results)
    return 0


def tell(what: str, pair: Pair, line: dict[str, Any], results: Path) -> None:
    """Print a ratio with its interval, and append it to the results."""
    line |= {"ratio_median": pair.median, "ratio_low": pair.low, "ratio_high": pair.high, "rounds": pair.rounds}
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    told = f"{pair.median:.4f} [{pair.low:.4f}, {pair.high:.4f}] ({pair.rounds} rounds)"
    print(f"{what} with the profiler / without: {told}", flush=True)


def steps(rounds: int) -> tuple[Pair, RunRecord]:
    """Return the ratio of interleaved timed steps with and without the profiler, and the record of those with it.

    Raises:
        RuntimeError: if one of the fits failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.overhead", f"--rounds={rounds}"]
        folder = Path(scratch, "profiled-1")
        watched = PairedRun([*command, f"--folder={folder}"], Path(scratch, "with.log"))
        seconds = interleave(watched, lambda: PairedRun(command, Path(scratch, "without.log")), None, lambda: None)
        if watched.end(None, lambda: None) or len(seconds) < rounds:
            raise RuntimeError(Path(scratch, "with.log").read_text())
        return compare_rounds("the same without the profiler", seconds), RunRecord.read(folder / "record.json")


def fits(pairs: int, passed: Sequence[str]) -> tuple[Pair, RunRecord]:
    """Return the ratio of the wall times of whole fits with measuring as it is by default, and without.

    Which of a pair comes first alternates. The processes are timed from outside.

    Raises:
        RuntimeError: if one of them failed.
    """
    seconds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(pairs):
            sides = [("with", []), ("without", ["--profile=false"])]
            taken = {
                name: wall_seconds([*FIT, *passed, *words, f"--trainer.default_root_dir={scratch}", f"--run={name}"])
                for name, words in (sides if number % 2 else sides[::-1])
            }
            seconds.append((taken["with"], taken["without"]))
        record = RunRecord.read(Path(scratch, f"with-{pairs}", "record.json"))
    return compare_rounds("the same without measuring", seconds), record


def wall_seconds(words: Sequence[str]) -> float:
    """Return the seconds that `lit-sparse` takes with these words, from its start to its end.

    Raises:
        RuntimeError: if it fails, with what it said.
    """
    begin = perf_counter()
    done = subprocess.run([sys.executable, "-m", "lit_sparse", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
