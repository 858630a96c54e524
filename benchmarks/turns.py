"""Run `lit-sparse bench` with interleaved steps, and turn its records into lines of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measurements import Line
from benchmarks.provenance import provenance
from lit_sparse.commands.bench import bench
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import method_name, read_runs, run_name
from lit_sparse_profiling.speed_sections import Pair

FLOOR = "floor"
"""The mode that trains nothing: its only trained weight is a placeholder, and is not counted."""


def measure(words: Sequence[str]) -> None:
    """Run `lit-sparse bench`, which makes the missing runs.

    Raises:
        SystemExit: if one of its runs failed, of which it has told.
    """
    if bench(words):
        sys.exit(1)


def newest(folder: Path) -> dict[str, RunRecord]:
    """Read the newest record of each method in `folder`.

    Raises:
        RuntimeError: if one has no result.
    """
    found = {method_name(run_name(path, record)): record for path, record in read_runs([folder])}
    for name, record in found.items():
        if isinstance(record, str) or record.status != "ok":
            raise RuntimeError(f"{folder}: {name} has no result: {record}")
    return found  # pyright: ignore[reportReturnType] - no string is left


def lines_of(study: str, folder: Path, modes: bool = True) -> Iterator[Line]:
    """Yield lines of the newest run of each method (unless `modes` is false) and of its pair with another."""
    for name, record in newest(folder).items():
        if modes:
            yield provenance(study, record) | mode_line(name, record)
        if record.pair is not None:
            yield provenance(study, record) | pair_line(name, record.pair)


def mode_line(mode: str, record: RunRecord) -> Line:
    """Return the line of a mode: trained weights, memory and time."""
    assert record.model is not None
    assert record.memory is not None
    assert record.throughput is not None
    trainable = 0 if mode == FLOOR else record.model.trainable
    selection = next(phase for phase in record.phases if phase.name == "selection")
    training = next(phase for phase in record.phases if phase.name == "training")
    return {
        "mode": mode,
        "trainable": trainable,
        "trainable_share": trainable / record.model.parameters,
        "step_seconds_median": record.throughput.median_step,
        "peak_rss": training.peak_rss,
        "selection_seconds": selection.seconds,
        "selection_peak_rss": selection.peak_rss,
        "memory_method": record.memory.method,
        "saved_bytes": record.memory.saved_for_backward,
    }


def pair_line(mode: str, pair: Pair) -> Line:
    """Return the line of a pair: the ratio of step times."""
    figures = {"ratio_median": pair.median, "ratio_low": pair.low, "ratio_high": pair.high, "ratio_max": pair.highest}
    return {"pair": [mode, pair.against], **figures, "rounds": pair.rounds}


def append(results: Path, lines: Sequence[Line]) -> None:
    """Append `lines` to a file of results; create it if it does not exist."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
