"""Measure the profiler's overhead on the steps that it times: interleaved steps of one fit with and without it.

`python -m benchmarks.overhead` trains the demo model with block-sparse tuning on short rows, so that a step is short
and an overhead of Python's shows, and appends one line to benchmarks/results/overhead.jsonl.
"""

from __future__ import annotations

import argparse
import json
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
from lit_sparse_profiling.profiler import Plan
from lit_sparse_profiling.record import RunRecord

RESULTS = ROOT / "benchmarks" / "results" / "overhead.jsonl"
WARMUP = 8
"""Steps of warm-up, which include the profiler's examination."""


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
    """Measure and append the result; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="timed steps of each fit (default 200)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--profile.turns", dest="turns", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.turns is not None:
        fit(Turns(asked.turns), asked.rounds, asked.folder)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.overhead", f"--rounds={asked.rounds}"]
        folder = Path(scratch, "profiled-1")
        watched = PairedRun([*command, f"--folder={folder}"], Path(scratch, "with.log"))
        plain = lambda: PairedRun(command, Path(scratch, "without.log"))  # noqa: E731
        seconds = interleave(watched, plain, None, lambda: None)
        if watched.end(None, lambda: None) or len(seconds) < asked.rounds:
            print(Path(scratch, "with.log").read_text(), file=sys.stderr)
            return 1
        record = RunRecord.read(folder / "record.json")
    pair = compare_rounds("the same without the profiler", seconds)
    line = provenance("overhead", record, model="demo")
    line |= {"ratio_median": pair.median, "ratio_low": pair.low, "ratio_high": pair.high, "rounds": pair.rounds}
    with asked.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"with the profiler / without: {pair.median:.4f} [{pair.low:.4f}, {pair.high:.4f}] ({pair.rounds} rounds)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
