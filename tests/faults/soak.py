"""Long fits on a tiny model: memory, file handles and threads stay as they are."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import lightning as L

from tests.faults.child import command
from tests.faults.fits import Bench, Found
from tests.fuzz import FIXED

METHODS = ("lisa", "smt", "mezo")
STEPS = 2000
EVERY = 20
"""Steps between two readings."""
FLAT = 0.01
"""Share by which resident memory may be above that of the first half."""
LIMIT = 3600
"""Seconds a fit may take; on a quiet core it takes two minutes."""


class Readings(L.Callback):
    """Writes resident bytes, file handles and threads every so many steps into `readings.jsonl`."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        if trainer.global_step % EVERY:
            return
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        reading = [
            pages * os.sysconf("SC_PAGE_SIZE"),
            *(len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")),
        ]
        with open("readings.jsonl", "a") as file:
            file.write(json.dumps(reading) + "\n")


def soak(bench: Bench, method: str, steps: int = STEPS) -> Found:
    """Fit for `steps` steps; the second half may hold no more than the first."""
    with bench.place() as place:
        words = ["fit", "--config", f"{method}.yaml", *(word for word in FIXED if "tests.fuzz" not in word)]
        words += [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=0"]
        words += ["--data.batch_size=2", "--run=mine", "--checkpoint_steps=500"]
        (ended,) = command([*words, "--trainer.callbacks+=tests.faults.soak.Readings"], place, limit=LIMIT)
        if ended.status:
            why = ended.told[-1500:] or f"it was killed, or did not end within {LIMIT} seconds"
            return Found("failed", why=why, about={"method": method})
        readings = [json.loads(line) for line in (place / "readings.jsonl").read_text().splitlines()]
    quarter = len(readings) // 4
    early, late = readings[quarter : 2 * quarter], readings[-quarter:]
    before, after = ([statistics.median(column) for column in zip(*part, strict=True)] for part in (early, late))
    about = {"method": method, "steps": steps, "growth": round(after[0] / before[0] - 1, 5)}
    about |= {"handles": int(after[1]), "threads": int(after[2])}
    flat = after[0] <= before[0] * (1 + FLAT) and after[1:] == before[1:]
    return Found("survived" if flat else "failed", why="" if flat else f"{before} grew to {after}", about=about)
