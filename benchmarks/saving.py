"""Time of a save that is hashed, synced, read back and renamed, beside Lightning's own, which is none of these.

`python -m benchmarks.saving` saves the same checkpoint by both in turns and appends a line to
benchmarks/results/saving.jsonl; the target is at most 1.15 times. Lightning's save is followed by a sync, which a user
has to wait for as well before the file is there: without it only the page cache would be timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from benchmarks.provenance import of_device
from lit_sparse.storage.whole import write_whole

RESULTS = Path(__file__).parent / "results" / "saving.jsonl"
TARGET = 1.15


def unprotected(checkpoint: dict[str, Any], path: Path) -> None:
    """Save as Lightning does, and wait until the disk has it."""
    TorchCheckpointIO().save_checkpoint(checkpoint, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def seconds(save: Callable[[dict[str, Any], Path], None], checkpoint: dict[str, Any], path: Path) -> float:
    """Return the seconds of one save."""
    begun = time.perf_counter()
    save(checkpoint, path)
    return time.perf_counter() - begun


def measure(size: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Save a checkpoint of `size` MiB by both ways, in `rounds` pairs whose order alternates."""
    values = torch.randn(8, size * 2**20 // 32)
    checkpoint = {"state_dict": {str(n): row for n, row in enumerate(values)}, "lit_sparse": {}}
    ways = {"protected": write_whole, "unprotected": unprotected}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in [*ways][:: 1 if turn % 2 else -1]:
            taken = seconds(ways[name], checkpoint, folder / f"{name}.ckpt")
            if turn:  # the first round warms up
                found[name].append(taken)
    ratios = [a / b for a, b in zip(found["protected"], found["unprotected"], strict=True)]
    medians = {name: statistics.median(times) for name, times in found.items()}
    return {"mib": size, "rounds": rounds, **medians, "ratio": statistics.median(ratios)}


def main() -> None:
    """Measure, print and append a line for each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 256], help="MiB of the checkpoints")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to save; a temporary folder when not given")
    asked = parser.parse_args()
    source = of_device("saving", torch.device("cpu"))
    for size in asked.sizes:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            line = {**source, **measure(size, asked.rounds, Path(folder))}
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{size} MiB: {line['ratio']:.3f} times an unprotected save (target {TARGET})", flush=True)


if __name__ == "__main__":
    main()
